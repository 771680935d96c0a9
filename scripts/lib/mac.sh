#!/usr/bin/env bash
# What setup_m4.sh and run_m4.sh share: colored lines, which Mac can train, the variables of MPS. Sourced, not called.
set -euo pipefail

RED='' GREEN='' YELLOW='' NC=''
if [[ -t 1 && -t 2 && -z ${NO_COLOR:-} ]]; then
  RED=$'\033[31m' GREEN=$'\033[32m' YELLOW=$'\033[33m' NC=$'\033[0m'
fi

good() { printf '%s\n' "$GREEN$1$NC"; }
warn() { printf '%s\n' "$YELLOW$1$NC" >&2; }
fail() { printf '%s\n' "$RED$1$NC" >&2; exit "$2"; }

need_apple_silicon() {  # exit 2 and what to do on anything but macOS 14 or later on Apple silicon; 15 is asked for
  local system machine version script=scripts/${0##*/}
  system=$(uname -s) machine=$(uname -m)
  if [[ $system != Darwin ]]; then
    fail "$script needs a Mac with Apple silicon, this is $system on $machine; scripts/setup_local.sh finds what fits" 2
  fi
  if [[ $machine != arm64 ]]; then
    # A program under Rosetta is told that the machine is an Intel one; only this says otherwise.
    if [[ $(sysctl -n sysctl.proc_translated 2>/dev/null) == 1 ]]; then
      fail "this terminal runs under Rosetta, where PyTorch has no GPU; type: arch -arm64 /bin/bash $script" 2
    fi
    fail "this Mac has an Intel processor, for which there is no such PyTorch; train on an H100 (README.md, Run it)" 2
  fi
  version=$(sw_vers -productVersion)
  if [[ ${version%%.*} -lt 14 ]]; then
    fail "macOS $version, and PyTorch's bfloat16 needs 14 or later; type: softwareupdate --install --all --restart" 2
  fi
  if [[ ${version%%.*} -lt 15 ]]; then
    warn "macOS $version; macOS 15 or later is expected; type: softwareupdate --install --all --restart"
  fi
}

set_mps_variables() {
  # How much PyTorch takes, in shares of the GPU's working set (about 22.9 GB of 32). Beyond it, PyTorch fails with "out
  # of memory"; its own limit, about 36 GB, is more than the whole Mac has: it would swap for hours. Never 0.0: no limit.
  export PYTORCH_MPS_HIGH_WATERMARK_RATIO="${PYTORCH_MPS_HIGH_WATERMARK_RATIO:-1.2}"
  # From here on it gives cached memory back. PyTorch's own value, 1.4, is above the limit, and PyTorch would not start.
  export PYTORCH_MPS_LOW_WATERMARK_RATIO="${PYTORCH_MPS_LOW_WATERMARK_RATIO:-1.0}"
  # An operation that the GPU lacks fails with its name; with this variable it would run on the CPU without a word.
  if [[ ${PYTORCH_ENABLE_MPS_FALLBACK:-0} != 0 ]]; then
    warn "PYTORCH_ENABLE_MPS_FALLBACK=$PYTORCH_ENABLE_MPS_FALLBACK is not passed on: nothing falls back to the CPU unsaid"
  fi
  unset PYTORCH_ENABLE_MPS_FALLBACK
}
