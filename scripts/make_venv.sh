#!/usr/bin/env bash
# Makes .venv in the project's root, or brings it up to date. quickstart.sh, test.sh and the setup scripts call it.
#   scripts/make_venv.sh [--dev]        --dev adds what the tests need
# PYTHON=/path/to/python chooses the interpreter; pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...) are honored.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=/dev/null
source scripts/lib/python.sh

fail() { printf '%s\n' "$1" >&2; exit "$2"; }

pip_install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }

no_python() {
  [[ -z ${PYTHON:-} ]] || fail "PYTHON=$PYTHON is no Python 3.11, 3.12 or 3.13; name another, or unset it" 2
  fail "found no Python 3.11, 3.12 or 3.13; install one (Ubuntu: sudo apt install python3.11 python3.11-venv; macOS: brew install python@3.11), or name it: PYTHON=/path/to/python $0" 2
}

lock=requirements/cpu.lock
hashes=()
if [[ $(uname -s) == Darwin ]]; then lock=requirements/m4.lock hashes=(--require-hashes); fi
locks=("$lock")
[[ ${1:-} != --dev ]] || locks+=(requirements/dev.lock)

installed=.venv/installed
if [[ $lock == requirements/cpu.lock && -d .venv/conda-meta ]]; then
  fail '.venv is the environment of environment-remote.yml; demo and tests need another torch: run them in another clone' 2
fi
for wanted in "${locks[@]}"; do
  if [[ -x .venv/bin/python ]] && grep -qsF "$(cksum <"$wanted") $wanted" "$installed"; then continue; fi
  if [[ ! -x .venv/bin/python ]]; then
    python=$(find_python)
    [[ -n $python ]] || no_python
    echo "making .venv with $("$python" --version)"
    if ! "$python" -m venv .venv; then
      rm -rf .venv  # half of one would pass for whole next time
      version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
      fail "could not make .venv; on Ubuntu: sudo apt install python$version-venv, then the same command again" 2
    fi
  fi
  echo "installing $wanted (minutes without output)"
  if [[ $wanted == requirements/cpu.lock && -z ${PIP_FIND_LINKS:-} && -z ${PIP_EXTRA_INDEX_URL:-} ]]; then
    # PyPI's torch for Linux brings gigabytes of CUDA; PyTorch's own index has the CPU build of the same version.
    pip_install --no-deps --extra-index-url https://download.pytorch.org/whl/cpu "$(grep '^torch==' "$wanted")" ||
      echo "PyTorch's own index does not answer: the next step takes torch from PyPI, with several GB of CUDA"
  fi
  options=(); [[ $wanted != "$lock" ]] || options=(${hashes[@]+"${hashes[@]}"})
  pip_install ${options[@]+"${options[@]}"} -r "$wanted" ||
    fail "installing $wanted failed (see above); check the network, then the same command again" 6
  { grep -vsF " $wanted" "$installed" || true; echo "$(cksum <"$wanted") $wanted"; } >"$installed.partial"
  mv "$installed.partial" "$installed"
done
