#!/usr/bin/env bash
# Resolves pyproject.toml into h100.lock, m4.lock and cpu.lock, one for each of its extras; dev.in into dev.lock; and the
# tools that compile flash-attn into flash-attn.lock. Needs uv (pip install uv) and a package index.
#   requirements/lock.sh [--upgrade]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# A CPU build of torch is not on PyPI: pyproject.toml names PyTorch's own index, and a folder of wheels may replace it.
export UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}"
cpu_torch=()
[[ -z $UV_FIND_LINKS ]] || cpu_torch=(--no-sources)

resolve() {  # resolve NAME INPUT PYTHON_PLATFORM ARGUMENT...
  local name=$1 input=$2 platform=$3; shift 3
  uv pip compile "$input" --output-file "$name.lock" --quiet --python-version 3.11 --python-platform "$platform" \
    --custom-compile-command 'requirements/lock.sh' "$@"
  echo "$name.lock: $(grep -c '==' "$name.lock") packages"
}

resolve h100 ../pyproject.toml x86_64-manylinux_2_28 --extra h100 --generate-hashes "$@"
resolve flash-attn flash-attn.in x86_64-manylinux_2_28 --generate-hashes "$@"  # after h100, whose versions it takes
MACOSX_DEPLOYMENT_TARGET=14.0 resolve m4 ../pyproject.toml aarch64-apple-darwin --extra m4 --generate-hashes "$@"
# One hash would make pip ask for all, and the CPU build's hash is another index's: this lock has none.
# Resolved anew, or the CUDA build that the shortened pin below also names would be kept.
resolve cpu ../pyproject.toml x86_64-manylinux_2_28 --extra cpu --upgrade-package torch \
  ${cpu_torch[@]+"${cpu_torch[@]}"} "$@"
# 2.13.0 also matches 2.13.0+cpu, and an index without the CPU build still installs.
sed -i.bak 's/^\(torch==[0-9.]*\)+cpu/\1/' cpu.lock && rm cpu.lock.bak
resolve dev dev.in x86_64-manylinux_2_28 --no-strip-markers "$@"  # it serves the Mac too
