#!/usr/bin/env bash
# Runs the tests from a fresh clone: environment, style, types, then pytest.
#   scripts/test.sh [--slow] [PYTEST_ARGUMENT...]      --slow adds the tests marked slow
#   scripts/test.sh --h100-torch [PYTEST_ARGUMENT...]  tests of data, machine and model alone, with the H100's torch
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
echo "test: about 7 minutes the first time, 5 when run again (2 CPU cores, fast network); --slow takes 28, --h100-torch 2 plus a download; all estimates"

# Several processes of one thread each: these models are too small to gain from a second thread.
export OMP_NUM_THREADS=1
side_by_side=(-n logical --maxprocesses 4 --no-loadscope-reorder)

h100_torch() {  # h100_torch [PYTEST_ARGUMENT...]: .venv-h100 has the torch of h100.lock; the rest comes from .venv
  local torch triton site='import sysconfig; print(sysconfig.get_path("purelib"))'
  torch=$(grep -o '^torch==[0-9.]*' requirements/h100.lock)
  triton=$(grep -o '^triton==[0-9.]*' requirements/h100.lock)  # the CPU build does not require it
  if ! grep -qsxF "$torch $triton" .venv-h100/installed; then
    .venv/bin/python -m venv --clear .venv-h100
    .venv/bin/python -c "$site" >"$(.venv-h100/bin/python -c "$site")/venv.pth"
    local pip=(.venv-h100/bin/python -m pip install --quiet --disable-pip-version-check)
    "${pip[@]}" --no-deps --extra-index-url https://download.pytorch.org/whl/cpu "$torch"  # has its CPU build
    "${pip[@]}" "$torch"  # without that index it is PyPI's build, which needs gigabytes of CUDA
    "${pip[@]}" --no-deps "$triton; sys_platform == 'linux'"
    echo "$torch $triton" >.venv-h100/installed
  fi
  .venv-h100/bin/python -m pytest "${side_by_side[@]}" -m 'not slow' tests/data tests/machine tests/model --ignore tests/data/test_preview.py "$@"
}

if [[ ${1:-} == --h100-torch ]]; then
  scripts/make_venv.sh --dev
  h100_torch "${@:2}"
  exit
fi

scripts/make_venv.sh --dev
selection=(-m 'not slow')
if [[ ${1:-} == --slow ]]; then selection=(); shift; fi

.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
.venv/bin/python -m mypy src scripts benchmarks
.venv/bin/yamllint --strict ./*.yaml ./*.yml configs tests .github .yamllint.yaml
.venv/bin/hadolint docker/Dockerfile
.venv/bin/zizmor --quiet --offline --persona pedantic .github
.venv/bin/python -m pytest "${side_by_side[@]}" ${selection[@]+"${selection[@]}"} "$@"
if [[ ${#selection[@]} -gt 0 ]]; then echo "skipped the tests marked slow; to include them: scripts/test.sh --slow"; fi
