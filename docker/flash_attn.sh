#!/usr/bin/env bash
# Puts flash-attn's wheel into a folder and prints its path: a matching wheel from docker/wheels, or one it compiles.
# Exits with 3 if it must compile the wheel and torch is missing.
# docker/Dockerfile calls it; a host without Docker can too (environment-remote.yml). It needs `python`; to compile,
# it also needs the packages in requirements/flash-attn.lock, nvcc of CUDA 12 and g++, but no GPU.
#   docker/flash_attn.sh FOLDER
# Variables: FLASH_ATTN               build (default) or skip
#            FLASH_ATTN_CUDA_ARCHS    90 (default: the H100), or several, as in "80;90"
#            NVCC_THREADS             threads of each nvcc (default 1; more help only with several architectures)
#            MAX_JOBS                 files compiled at once (default: as many as cores and memory allow)
set -euo pipefail

# The largest peak measured for one file in benchmarks/results/*-flash-attn-build-*.json, rounded up.
gib_per_file=7
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
sources="$here/../requirements/flash-attn.txt" tools="$here/../requirements/flash-attn.lock"

say() { printf 'flash-attn: %s\n' "$1" >&2; }

stop() { say "$1"; exit 2; }

whole() {  # whole NAME VALUE
  [[ $2 =~ ^[1-9][0-9]*$ ]] || stop "$1 is \"$2\"; set it to a whole number from 1, or leave it empty"
}

# Free memory, or the container's limit if that is lower. "max" means no limit, as does 2^63 in cgroup version 1.
available_gib() {
  local kib file limit
  kib=$(awk '$1 == "MemAvailable:" { print $2 }' /proc/meminfo)
  for file in /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes; do
    limit=$(cat "$file" 2>/dev/null) || continue
    [[ $limit == max ]] || ((limit / 1024 >= kib)) || kib=$((limit / 1024))
  done
  echo $((kib / 1024 / 1024))
}

choose_jobs() {
  local cores available needed
  if [[ -n ${MAX_JOBS:-} ]]; then
    whole MAX_JOBS "$MAX_JOBS"
    say "files compiled at once: $MAX_JOBS (set by MAX_JOBS)"
    return
  fi
  cores=$(nproc) available=$(available_gib) needed=$((gib_per_file * NVCC_THREADS))
  MAX_JOBS=$((available / needed))
  ((MAX_JOBS <= cores)) || MAX_JOBS=$cores
  ((MAX_JOBS >= 1)) || MAX_JOBS=1
  say "files compiled at once: $MAX_JOBS ($cores cores; $available GiB of memory free, up to $needed GiB per file)"
  ((available >= needed)) || say 'one file may need more than the free memory; if a compiler is killed, add memory or swap'
}

compile() {  # compile FOLDER BUILD_TAG
  local folder
  command -v nvcc >/dev/null || [[ -x ${CUDA_HOME:-/usr/local/cuda}/bin/nvcc ]] ||
    stop 'no nvcc on PATH or in CUDA_HOME; install the CUDA 12.1 toolkit, or set FLASH_ATTN=skip'
  choose_jobs
  export MAX_JOBS NVCC_THREADS FLASH_ATTN_CUDA_ARCHS FLASH_ATTENTION_FORCE_BUILD=TRUE
  folder=$(mktemp -d)
  # pip's cache could return a wheel that was compiled against another torch.
  python -m pip wheel --no-cache-dir --no-deps --no-build-isolation --require-hashes --requirement "$sources" \
    --wheel-dir "$folder" >&2 || {
    say "compiling failed; if a compiler was killed, memory ran out: set MAX_JOBS below $MAX_JOBS, or add memory or swap"
    exit 1
  }
  python -m wheel tags --remove --build "$2" "$folder"/*.whl >/dev/null
  mv "$folder"/*.whl "$1/"
  rmdir "$folder"
}

(($# == 1)) || stop 'usage: docker/flash_attn.sh FOLDER'
mkdir -p "$1"
case ${FLASH_ATTN:-build} in
  build) ;;
  skip) say 'skipped, because FLASH_ATTN=skip is set'; exit 0 ;;
  *) stop "FLASH_ATTN is \"$FLASH_ATTN\"; set it to build or skip" ;;
esac
NVCC_THREADS=${NVCC_THREADS:-1} FLASH_ATTN_CUDA_ARCHS=${FLASH_ATTN_CUDA_ARCHS:-90}
whole NVCC_THREADS "$NVCC_THREADS"

# A wheel's name says what it was compiled for. The build tag (the part after the version) is ours: flash-attn's own
# name mentions neither torch nor the architectures.
version=$(sed -n 's/^flash-attn==\([^ ]*\).*/\1/p' "$sources")
installed=$(python -c 'from importlib.metadata import version; print(version("torch").partition("+")[0])' 2>/dev/null) ||
  installed=''
torch=${installed:-$(sed -n 's/^torch==\([^ ]*\).*/\1/p' "$tools")}  # using an existing wheel needs no torch
python=$(python -c 'import sys; print("cp{}{}".format(*sys.version_info))')
build="${torch}torch.sm${FLASH_ATTN_CUDA_ARCHS//;/.}"
wheel="flash_attn-$version-$build-$python-$python-linux_$(uname -m).whl"

if [[ -f $here/wheels/$wheel ]]; then
  say "using docker/wheels/$wheel"
  [[ $1 -ef $here/wheels ]] || cp "$here/wheels/$wheel" "$1/"
  echo "$1/$wheel"
  exit 0
fi
for other in "$here"/wheels/*.whl; do
  [[ ! -f $other ]] || say "ignoring docker/wheels/${other##*/}, whose name does not match"
done
if [[ -z $installed ]]; then
  say "docker/wheels has no $wheel; to compile it, first type: python -m pip install --require-hashes -r requirements/flash-attn.lock"
  exit 3
fi
say "docker/wheels has no $wheel; compiling it"
compile "$1" "$build"
echo "$1/$wheel"
