#!/usr/bin/env bash
# Shared by make_venv.sh and setup_m4.sh: finds a Python that this program supports. Sourced, not called.
set -euo pipefail

find_python() {  # find_python [TEST]: prints the first of 3.11 to 3.13 that passes TEST; tries only PYTHON if set
  local candidate candidates=(python3.11 python3.12 python3.13 python3)
  [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    if "${1:-true}" "$candidate" &&
      "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; then
      printf '%s\n' "$candidate"; return
    fi
  done
}
