#!/usr/bin/env bash
# Trains on this Mac, in the environment of setup_m4.sh; the Mac stays awake until it is done.
#   scripts/run_m4.sh [ARGUMENT...]      arguments go to src/train.py, for example --dry-run or --set dataset.max_rows=40
#   scripts/run_m4.sh --demo [ARGUMENT...]      first: the demo's small base, in minutes, without an account or a large download
# The exit code is train.py's; the same command again goes on with a run that was stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=/dev/null
source scripts/lib/mac.sh
# shellcheck source=/dev/null
source scripts/lib/demo.sh

checkpoints() { printf '%s\n' adapters/demo-m4*/checkpoints/checkpoint-*; }

demo_until_a_checkpoint() {  # returns once the demo was stopped by SIGTERM; exits where it ended otherwise
  local before process code=0 asked=''
  before=$(checkpoints)
  trap 'asked=130' INT
  trap 'asked=143' TERM
  .venv/bin/python src/train.py "$@" &
  process=$!
  while [[ -z $asked && $(checkpoints) == "$before" ]] && kill -0 "$process" 2>/dev/null; do sleep 1; done
  kill -TERM "$process" 2>/dev/null || true
  wait "$process" || code=$?
  if [[ $code -ne 143 ]]; then exit "$code"; fi
  if [[ -n $asked ]]; then exit "$asked"; fi  # by Ctrl-C too it was SIGTERM that reached the training
  trap - INT TERM
}

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

config=configs/training_config_m4.yaml
if [[ ${1:-} == --demo ]]; then
  shift
  config=configs/training_config_m4_demo.yaml
  .venv/bin/python scripts/make_demo_model.py
  choose_fresh demo-m4
  good "the demo is stopped after its first checkpoint, to see that this works here; then it resumes"
  demo_until_a_checkpoint --config "$config" ${fresh:+"$fresh"} "$@"
  good "stopped; the same command again"
fi
exec .venv/bin/python src/train.py --config "$config" "$@"
