#!/usr/bin/env bash
# Trains on this Mac, in the environment that setup_m4.sh created, and keeps the Mac awake until training ends.
#   scripts/run_m4.sh [ARGUMENT...]      arguments go to src/train.py, for example --dry-run or --set dataset.max_rows=40
#   scripts/run_m4.sh --demo [ARGUMENT...]      try this first: a small base, minutes, no account, no large download
# The exit code is train.py's; the same command resumes a stopped run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=/dev/null
source scripts/lib/mac.sh
# shellcheck source=/dev/null
source scripts/lib/demo.sh

checkpoints() { printf '%s\n' adapters/demo-m4*/checkpoints/checkpoint-*; }

demo_until_a_checkpoint() {  # returns if SIGTERM stopped the demo, exits if it ended in another way
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
  if [[ -n $asked ]]; then exit "$asked"; fi  # after Ctrl-C, too, the training received SIGTERM
  trap - INT TERM
}

need_apple_silicon
[[ -x .venv/bin/python ]] || fail ".venv is missing; type: scripts/setup_m4.sh" 2
export PATH="$PWD/.venv/bin:$PATH"

set_mps_variables
if command -v pmset >/dev/null; then
  if [[ $(pmset -g batt) == *"'Battery Power'"* ]]; then
    warn "this Mac is on battery power, where it may sleep despite caffeinate, and a run takes hours; plug it in"
  fi
  if [[ $(pmset -g) =~ (low)?powermode[[:space:]]+1 ]]; then  # a Pro or Max has powermode
    warn "low power mode is on and slows the GPU; type: sudo pmset -a ${BASH_REMATCH[1]:-}powermode 0"
  fi
fi

# caffeinate watches this process, which becomes train.py, so nothing needs to forward signals or the exit code.
if command -v caffeinate >/dev/null; then caffeinate -i -s -w $$ </dev/null >/dev/null 2>&1 & fi

config=configs/training_config_m4.yaml
if [[ ${1:-} == --demo ]]; then
  shift
  config=configs/training_config_m4_demo.yaml
  .venv/bin/python scripts/make_demo_model.py
  choose_fresh demo-m4
  good "the demo will stop after its first checkpoint and then resume, to test both on this Mac"
  demo_until_a_checkpoint --config "$config" ${fresh:+"$fresh"} "$@"
  good "stopped; resuming with the same command"
fi
exec .venv/bin/python src/train.py --config "$config" "$@"
