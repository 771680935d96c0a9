#!/usr/bin/env bash
# From a bare Mac with Apple silicon to a working environment in .venv: by conda, mamba or micromamba where there is one,
# else by Python 3.11 to 3.13 alone; requirements/m4.lock, with its hashes, either way. Ends with every check and what to
# type next.
#   scripts/setup_m4.sh
# May be run again: what is there and whole is kept, and brought up to date where the lock changed.
# PYTHON=/path/to/python takes that one, whatever conda there is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=/dev/null
source scripts/lib/mac.sh
# shellcheck source=/dev/null
source scripts/lib/python.sh

find_conda() {  # the first of the three; as shell functions, which scripts do not see, two of them name their program
  local candidate
  for candidate in conda mamba micromamba "${CONDA_EXE:-}" "${MAMBA_EXE:-}"; do
    if [[ -n $candidate ]] && command -v "$candidate" >/dev/null; then printf '%s\n' "$candidate"; return; fi
  done
}

listed() {  # listed SECTION: the plain entries of environment-m4.yml's channels or dependencies, one a line
  awk -v title="$1:" '/^[a-z]/ { inside = $1 == title } inside && /^  - [^:]+( #|$)/ { print $2 }' environment-m4.yml
}

make_with_conda() {  # Python and pip; the lock is make_venv.sh's, since mamba looks for "-r FILE" in a folder of its own
  local tool=$1 entry wanted=()
  for entry in $(listed channels); do wanted+=(--channel "$entry"); done
  for entry in $(listed dependencies); do wanted+=("$entry"); done
  good "making .venv with ${tool##*/}"
  # CONDA_SUBDIR: an Intel conda, brought over from an older Mac, would make an Intel environment.
  if ! CONDA_SUBDIR=osx-arm64 "$tool" create --yes --quiet --prefix "$PWD/.venv" --override-channels "${wanted[@]}"; then
    [[ -x .venv/bin/python ]] || rm -rf .venv  # half of one would stand in the way of the next try
    fail "${tool##*/} could not make .venv (see above); check the network, then the same command again" 6
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
      missing="found no conda, mamba or micromamba, and no Python 3.11 to 3.13 that is built for Apple silicon"
      fail "$missing; type: brew install python@3.11, or name one: PYTHON=/path/to/python scripts/setup_m4.sh" 2
    fi
    export PYTHON
  fi
fi
if [[ -x .venv/bin/python ]] && ! is_arm_python .venv/bin/python; then
  fail ".venv holds a Python that is not built for Apple silicon; type: rm -r .venv; scripts/setup_m4.sh" 2
fi
scripts/make_venv.sh  # installs the lock; makes .venv where there is none yet, says nothing where all is there
good "the environment is ready in .venv"

set_mps_variables  # as run_m4.sh does, so that the checks see what a training will
checks=0
.venv/bin/python scripts/validate_environment.py --config m4 || checks=$?
if [[ $checks -ne 0 ]]; then
  warn "the environment is ready, and the checks found what is still to do before a training (above)"
  good "what needs no account and no large download: scripts/run_m4.sh --demo"
  exit "$checks"
fi
good "next: scripts/run_m4.sh --demo, in minutes and without the large base; then scripts/run_m4.sh"
