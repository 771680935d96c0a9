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

finished='' unfinished=''
for folder in adapters/demo-cpu adapters/demo-cpu-[0-9]*; do
  if grep -qs '"status": "complete"' "$folder/manifest.json"; then finished=$folder
  elif [[ -d $folder ]]; then unfinished=$folder; fi
done
fresh=()
if [[ -n $finished && -z $unfinished ]]; then
  echo "$finished is finished; this run is a fresh one beside it"
  fresh=(--fresh)
fi
echo "training"
.venv/bin/python src/train.py --config cpu ${fresh[@]+"${fresh[@]}"}
