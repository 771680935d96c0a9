#!/usr/bin/env bash
# Runs the tests from a fresh clone: environment, style, types, then pytest.
#   scripts/test.sh [--slow] [PYTEST_ARGUMENT...]      --slow adds the tests marked slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
echo "test: about 5 minutes the first time, 4 when run again (2 CPU cores, fast network), an expectation"

scripts/make_venv.sh --dev
selection=(-m 'not slow')
if [[ ${1:-} == --slow ]]; then selection=(); shift; fi

.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
.venv/bin/python -m mypy src scripts benchmarks
.venv/bin/yamllint --strict ./*.yaml ./*.yml configs tests .yamllint.yaml
.venv/bin/hadolint docker/Dockerfile
.venv/bin/python -m pytest ${selection[@]+"${selection[@]}"} "$@"
if [[ ${#selection[@]} -gt 0 ]]; then echo "left out: the tests marked slow; scripts/test.sh --slow runs them too"; fi
