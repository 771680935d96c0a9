#!/usr/bin/env bash
# Creates or updates .venv in the project's root. quickstart.sh, test.sh and the setup scripts call it.
#   scripts/make_venv.sh [--dev]        --dev adds what the tests need
# PYTHON=/path/to/python selects the interpreter. pip reads its usual settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=/dev/null
source scripts/lib/python.sh

fail() { printf '%s\n' "$1" >&2; exit "$2"; }

pip_install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }

no_python() {
  [[ -z ${PYTHON:-} ]] || fail "PYTHON=$PYTHON is not Python 3.11, 3.12 or 3.13; name one of them, or unset it" 2
  fail "found no Python 3.11, 3.12 or 3.13; install one (Ubuntu: sudo apt install python3.11 python3.11-venv; macOS: brew install python@3.11), or set the path: PYTHON=/path/to/python $0" 2
}

lock=requirements/cpu.lock
hashes=()
if [[ $(uname -s) == Darwin ]]; then lock=requirements/m4.lock hashes=(--require-hashes); fi
locks=("$lock")
[[ ${1:-} != --dev ]] || locks+=(requirements/dev.lock)

installed=.venv/installed
if [[ $lock == requirements/cpu.lock && -d .venv/conda-meta ]]; then
  fail '.venv is from environment-remote.yml; the demo and the tests need another torch: run them in another clone' 2
fi
for wanted in "${locks[@]}"; do
  if [[ -x .venv/bin/python ]] && grep -qsF "$(cksum <"$wanted") $wanted" "$installed"; then continue; fi
  if [[ ! -x .venv/bin/python ]]; then
    python=$(find_python)
    [[ -n $python ]] || no_python
    echo "creating .venv with $("$python" --version)"
    if ! "$python" -m venv .venv; then
      rm -rf .venv  # an incomplete one would look complete next time
      version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
      fail "could not create .venv; on Ubuntu: sudo apt install python$version-venv, then type the same command again" 2
    fi
  fi
  echo "installing $wanted (takes minutes, prints nothing)"
  if [[ $wanted == requirements/cpu.lock && -z ${PIP_FIND_LINKS:-} && -z ${PIP_EXTRA_INDEX_URL:-} ]]; then
    # PyPI's torch for Linux brings gigabytes of CUDA; PyTorch's own index has the CPU build of the same version.
    pip_install --no-deps --extra-index-url https://download.pytorch.org/whl/cpu "$(grep '^torch==' "$wanted")" ||
      echo "PyTorch's index did not answer; installing torch from PyPI instead, with several GB of CUDA libraries"
  fi
  options=(); [[ $wanted != "$lock" ]] || options=(${hashes[@]+"${hashes[@]}"})
  pip_install ${options[@]+"${options[@]}"} -r "$wanted" ||
    fail "installing $wanted failed (see above); check the network, then type the same command again" 6
  { grep -vsF " $wanted" "$installed" || true; echo "$(cksum <"$wanted") $wanted"; } >"$installed.partial"
  mv "$installed.partial" "$installed"
done
