#!/usr/bin/env bash
# Shared by quickstart.sh and run_m4.sh: looks for earlier runs of a demo. Sourced, not called.
set -euo pipefail

choose_fresh() {  # choose_fresh RUN_NAME: sets $fresh to --fresh if a run of that name is finished and none unfinished
  local folder finished='' unfinished=''
  fresh=''
  # shellcheck disable=SC2046  # the names contain no spaces
  for folder in "adapters/$1" $(printf '%s\n' "adapters/$1"-[0-9]* | sort -V); do
    if grep -qs '"status": "complete"' "$folder/manifest.json"; then finished=$folder
    elif [[ -d $folder ]]; then unfinished=$folder; fi
  done
  if [[ -n $finished && -z $unfinished ]]; then
    echo "$finished is finished; starting a new run next to it"
    # shellcheck disable=SC2034  # read by the script that sources this
    fresh=--fresh
  fi
}
