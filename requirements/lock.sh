#!/usr/bin/env bash
# Resolves pyproject.toml into h100.lock, m4.lock and cpu.lock, one for each of its extras; dev.in into dev.lock; and the
# tools that compile flash-attn into flash-attn.lock. Needs uv (pip install uv) and a package index.
#   requirements/lock.sh [--upgrade]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# PyPI has no CPU build of torch: pyproject.toml names PyTorch's own index, and a folder of wheels can replace it.
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
resolve flash-attn flash-attn.in x86_64-manylinux_2_28 --generate-hashes "$@"  # after h100, whose versions it uses
MACOSX_DEPLOYMENT_TARGET=14.0 resolve m4 ../pyproject.toml aarch64-apple-darwin --extra m4 --generate-hashes "$@"
# With one hash, pip requires all of them, and only PyTorch's index has the CPU build's: this lock has no hashes.
# Resolves torch again; otherwise the CUDA build, which the shortened pin below also matches, would be kept.
resolve cpu ../pyproject.toml x86_64-manylinux_2_28 --extra cpu --upgrade-package torch \
  ${cpu_torch[@]+"${cpu_torch[@]}"} "$@"
# 2.13.0 also matches 2.13.0+cpu, and installs from an index without the CPU build.
sed -i.bak 's/^\(torch==[0-9.]*\)+cpu/\1/' cpu.lock && rm cpu.lock.bak
resolve dev dev.in x86_64-manylinux_2_28 --no-strip-markers "$@"  # the Mac uses it too
