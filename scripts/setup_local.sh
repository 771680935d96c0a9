#!/usr/bin/env bash
# Looks at this machine and sets up what it can do: a Mac to train, an NVIDIA machine by the README, any other the demo.
#   scripts/setup_local.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

system=$(uname -s) machine=$(uname -m)
case $system in
  Darwin)
    echo "found macOS: scripts/setup_m4.sh"
    exec scripts/setup_m4.sh
    ;;
  Linux)
    if gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null) && [[ -n $gpu ]]; then
      echo "found ${gpu%%$'\n'*}: this machine is for --config h100"
      if command -v docker >/dev/null; then
        echo "docs/h100.md has its lines; nothing is installed here by itself"
      else
        echo "Docker is not here: docs/h100.md has four lines for a rented pod, which is a container itself"
      fi
      exit 0
    fi
    echo "found Linux on $machine without an NVIDIA driver: the demo on its CPU"
    scripts/make_venv.sh
    echo "the environment is ready in .venv; next: scripts/quickstart.sh"
    ;;
  *)
    echo "found $system on $machine: this program runs on Linux and macOS; on Windows, in WSL 2" >&2
    exit 2
    ;;
esac
