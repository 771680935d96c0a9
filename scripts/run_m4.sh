#!/usr/bin/env bash
# Trains on this Mac, in the environment of setup_m4.sh; the Mac stays awake until it is done.
#   scripts/run_m4.sh [ARGUMENT...]      arguments go to src/train.py, for example --dry-run or --set dataset.max_rows=40
# The exit code is train.py's; the same command again goes on with a run that was stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=/dev/null
source scripts/lib/mac.sh

need_apple_silicon
[[ -x .venv/bin/python ]] || fail "there is no environment yet; type: scripts/setup_m4.sh" 2
export PATH="$PWD/.venv/bin:$PATH"

set_mps_variables
if command -v pmset >/dev/null; then
  if [[ $(pmset -g batt) == *"'Battery Power'"* ]]; then
    warn "on battery power, where caffeinate cannot keep the Mac from all sleep, and a run takes hours; plug it in"
  fi
  if [[ $(pmset -g) =~ (low)?powermode[[:space:]]+1 ]]; then  # without "low" on a Pro or Max
    warn "low power mode is on, and the GPU is slower for it; type: sudo pmset -a ${BASH_REMATCH[1]:-}powermode 0"
  fi
fi

# It watches this process, which becomes train.py, and is not its parent: signals and exit code need no go-between.
if command -v caffeinate >/dev/null; then caffeinate -i -s -w $$ </dev/null >/dev/null 2>&1 & fi

exec .venv/bin/python src/train.py --config configs/training_config_m4.yaml "$@"
