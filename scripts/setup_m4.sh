#!/usr/bin/env bash
# Sets up .venv on a Mac with Apple silicon: with conda, mamba or micromamba if one is installed, otherwise with Python
# 3.11 to 3.13. Both ways install requirements/m4.lock with its hashes. Ends with all checks and the next command.
#   scripts/setup_m4.sh
# Safe to rerun: a complete environment is kept, and updated if the lock changed.
# PYTHON=/path/to/python selects that Python, even if conda is installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=/dev/null
source scripts/lib/mac.sh
# shellcheck source=/dev/null
source scripts/lib/python.sh

find_conda() {  # the first one found; a conda or mamba that is a shell function is found by its variable
  local candidate
  for candidate in conda mamba micromamba "${CONDA_EXE:-}" "${MAMBA_EXE:-}"; do
    if [[ -n $candidate ]] && command -v "$candidate" >/dev/null; then printf '%s\n' "$candidate"; return; fi
  done
}

listed() {  # listed SECTION: the plain entries of environment-m4.yml's channels or dependencies, one per line
  awk -v title="$1:" '/^[a-z]/ { inside = $1 == title } inside && /^  - [^:]+( #|$)/ { print $2 }' environment-m4.yml
}

make_with_conda() {  # Python and pip only; make_venv.sh installs the lock, since mamba looks for "-r FILE" elsewhere
  local tool=$1 entry wanted=()
  for entry in $(listed channels); do wanted+=(--channel "$entry"); done
  for entry in $(listed dependencies); do wanted+=("$entry"); done
  good "creating .venv with ${tool##*/}"
  # Without CONDA_SUBDIR, an Intel conda copied from an older Mac would create an Intel environment.
  if ! CONDA_SUBDIR=osx-arm64 "$tool" create --yes --quiet --prefix "$PWD/.venv" --override-channels "${wanted[@]}"; then
    [[ -x .venv/bin/python ]] || rm -rf .venv  # an incomplete one would block the next try
    fail "${tool##*/} could not create .venv (see above); check the network, then type the same command again" 6
  fi
}

is_arm_python() { [[ $("$1" -c 'import platform; print(platform.machine())' 2>/dev/null) == arm64 ]]; }

need_apple_silicon
if [[ ! -x .venv/bin/python ]]; then
  conda=''
  [[ -n ${PYTHON:-} ]] || conda=$(find_conda)
  if [[ -n $conda ]]; then
    make_with_conda "$conda"
  else
    PYTHON=$(find_python is_arm_python)
    if [[ -z $PYTHON ]]; then
      missing="found no conda, mamba or micromamba, and no Python 3.11 to 3.13 built for Apple silicon"
      fail "$missing; type: brew install python@3.11, or set its path: PYTHON=/path/to/python scripts/setup_m4.sh" 2
    fi
    export PYTHON
  fi
fi
if [[ -x .venv/bin/python ]] && ! is_arm_python .venv/bin/python; then
  fail ".venv contains a Python that is not built for Apple silicon; type: rm -r .venv; scripts/setup_m4.sh" 2
fi
scripts/make_venv.sh  # installs the lock; creates .venv if it is missing, prints nothing if all is installed
good "the environment is ready in .venv"

set_mps_variables  # as in run_m4.sh, for the checks to see what training sees
checks=0
.venv/bin/python scripts/validate_environment.py --config m4 || checks=$?
if [[ $checks -ne 0 ]]; then
  warn "the environment is ready, but checks failed (see above); fix them before training"
  good "without an account or a large download: scripts/run_m4.sh --demo"
  exit "$checks"
fi
good "next: scripts/run_m4.sh --demo (minutes, small base model), then scripts/run_m4.sh"
