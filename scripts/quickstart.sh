#!/usr/bin/env bash
# From a fresh clone to a trained adapter: environment, demo base model, validation, training, base and tuned answers.
# No GPU, no account. May be run again: what is there and whole is kept, and a finished run gets a fresh one beside it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
echo "quickstart: about 10 minutes the first time, 6 when run again (2 CPU cores, expectation); downloads about 600 MB"

scripts/make_venv.sh
.venv/bin/python scripts/make_demo_model.py

echo "validating"
.venv/bin/python src/train.py --config cpu --dry-run

fresh=()
newest=$(printf '%s\n' adapters/demo-cpu*/ | sort -V | tail -n 1)
if grep -qs '"status": "complete"' "$newest/manifest.json"; then
  echo "${newest%/} is finished; this run is a fresh one beside it"
  fresh=(--fresh)
fi
echo "training"
.venv/bin/python src/train.py --config cpu ${fresh[@]+"${fresh[@]}"}
