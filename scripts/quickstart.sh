#!/usr/bin/env bash
# From a fresh clone to a trained adapter: environment, demo base model, validation, training, base and tuned answers.
#   scripts/quickstart.sh [ARGUMENT...]      arguments go to the training, for example --fresh
# In the container image, which has the environment, it only builds the base model, validates and trains.
# Needs no GPU and no account. Safe to rerun: complete parts are kept, and a new run starts next to a finished one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=/dev/null
source scripts/lib/demo.sh
echo "quickstart: about 5 minutes the first time, 4 when run again (2 CPU cores, fast network); downloads about 500 MB"

python=python
if [[ -z ${IMAGE_LOCK:-} ]]; then
  scripts/make_venv.sh
  python=.venv/bin/python
fi
"$python" scripts/make_demo_model.py

"$python" scripts/validate_environment.py --config cpu

choose_fresh demo-cpu
echo "training"
exec "$python" src/train.py --config cpu ${fresh:+"$fresh"} "$@"
