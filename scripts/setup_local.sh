#!/usr/bin/env bash
# Sets up a Mac for training and other machines for the demo; with an NVIDIA GPU it only names the page to read.
#   scripts/setup_local.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

system=$(uname -s) machine=$(uname -m)
case $system in
  Darwin)
    echo "found macOS; running scripts/setup_m4.sh"
    exec scripts/setup_m4.sh
    ;;
  Linux)
    if gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null) && [[ -n $gpu ]]; then
      echo "found ${gpu%%$'\n'*}; train here with --config h100"
      if command -v docker >/dev/null; then
        echo "nothing was installed; follow docs/h100.md"
      else
        echo "nothing was installed, and Docker is missing; on a rented pod, follow 'A rented pod' in docs/h100.md"
      fi
      exit 0
    fi
    echo "found Linux on $machine without an NVIDIA driver; setting up the CPU demo"
    scripts/make_venv.sh
    echo "the environment is ready in .venv; next: scripts/quickstart.sh"
    ;;
  *)
    echo "found $system on $machine; this program needs Linux or macOS (on Windows, use WSL 2)" >&2
    exit 2
    ;;
esac
