#!/usr/bin/env bash
# Shared by setup_m4.sh and run_m4.sh: colored messages, the check of the Mac, MPS variables. Sourced, not called.
set -euo pipefail

RED='' GREEN='' YELLOW='' NC=''
if [[ -t 1 && -t 2 && -z ${NO_COLOR:-} ]]; then
  RED=$'\033[31m' GREEN=$'\033[32m' YELLOW=$'\033[33m' NC=$'\033[0m'
fi

good() { printf '%s\n' "$GREEN$1$NC"; }
warn() { printf '%s\n' "$YELLOW$1$NC" >&2; }
fail() { printf '%s\n' "$RED$1$NC" >&2; exit "$2"; }

need_apple_silicon() {  # exits with 2 unless this is Apple silicon with macOS 14 or later; warns below 15
  local system machine version script=scripts/${0##*/}
  system=$(uname -s) machine=$(uname -m)
  if [[ $system != Darwin ]]; then
    fail "$script needs a Mac with Apple silicon, but this is $system on $machine; type: scripts/setup_local.sh" 2
  fi
  if [[ $machine != arm64 ]]; then
    # Under Rosetta, uname reports an Intel machine; only this variable reveals Rosetta.
    if [[ $(sysctl -n sysctl.proc_translated 2>/dev/null) == 1 ]]; then
      fail "this terminal runs under Rosetta, which hides the GPU; type: arch -arm64 /bin/bash $script" 2
    fi
    fail "this Mac has an Intel processor, which this PyTorch does not support; train on an H100 (README.md, Run it)" 2
  fi
  version=$(sw_vers -productVersion)
  if [[ ${version%%.*} -lt 14 ]]; then
    fail "found macOS $version; bfloat16 in PyTorch needs 14 or later; type: softwareupdate --install --all --restart" 2
  fi
  if [[ ${version%%.*} -lt 15 ]]; then
    warn "found macOS $version, expected 15 or later; type: softwareupdate --install --all --restart"
  fi
}

set_mps_variables() {
  # PyTorch's memory limit, as a multiple of the GPU's working set (about 22.9 GB of 32). Above it, PyTorch fails with
  # "out of memory". Its default, about 36 GB, exceeds the Mac's memory: it would swap for hours. Never 0.0: no limit.
  export PYTORCH_MPS_HIGH_WATERMARK_RATIO="${PYTORCH_MPS_HIGH_WATERMARK_RATIO:-1.2}"
  # Above this, PyTorch frees cached memory. Its default, 1.4, is above the limit set here, and PyTorch would not start.
  export PYTORCH_MPS_LOW_WATERMARK_RATIO="${PYTORCH_MPS_LOW_WATERMARK_RATIO:-1.0}"
  # An operation that MPS lacks fails with its name; with this variable it would silently run on the CPU.
  if [[ ${PYTORCH_ENABLE_MPS_FALLBACK:-0} != 0 ]]; then
    warn "PYTORCH_ENABLE_MPS_FALLBACK=$PYTORCH_ENABLE_MPS_FALLBACK is ignored: it hides slow work on the CPU; unset it"
  fi
  unset PYTORCH_ENABLE_MPS_FALLBACK
}
