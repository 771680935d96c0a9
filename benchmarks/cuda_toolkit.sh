#!/usr/bin/env bash
# Unpacks the CUDA compiler and headers of a Debian or Ubuntu release into a folder, for flash_attn_build.py --cuda-home.
# Installs nothing; about 1 GB is fetched. Needs a Debian or Ubuntu machine (apt-get, dpkg) that trusts the release's key.
#   benchmarks/cuda_toolkit.sh FOLDER 'deb http://deb.debian.org/debian trixie main contrib non-free'                  # 12.4
#   benchmarks/cuda_toolkit.sh FOLDER 'deb [signed-by=KEYRING] http://archive.ubuntu.com/ubuntu noble universe multiverse'  # 12.0
set -euo pipefail

(($# == 2)) || { echo "usage: benchmarks/cuda_toolkit.sh FOLDER 'deb URL RELEASE COMPONENT...'" >&2; exit 2; }
mkdir -p "$1"
folder=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
mkdir -p "$work/lists/partial" "$work/tree"
printf '%s\n' "$2" >"$work/sources.list"
options=(-o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts=/dev/null
         -o Dir::State::Lists="$work/lists" -o APT::Sandbox::User=root)
apt-get -qq "${options[@]}" update
(cd "$work" && apt-get -qq "${options[@]}" download \
  nvidia-cuda-toolkit nvidia-cuda-dev libcudart12 libcu++-dev libcub-dev libthrust-dev)
for deb in "$work"/*.deb; do  # the libraries are gigabytes, and only what links needs them
  dpkg-deb --fsys-tarfile "$deb" | tar --extract --directory "$work/tree" --exclude '*.a' --exclude '*.so*'
done

# NVIDIA's own layout: Debian's nvcc.profile names folders of the system.
mkdir -p "$folder/bin" "$folder/nvvm/bin" "$folder/nvvm/libdevice"
own="$work/tree/usr/lib/nvidia-cuda-toolkit"
cp "$own/bin/nvcc" "$work"/tree/usr/bin/{cudafe++,fatbinary,ptxas} "$folder/bin/"
cp "$own/bin/cicc" "$folder/nvvm/bin/"
cp "$own/libdevice/libdevice.10.bc" "$folder/nvvm/libdevice/"
cp -R "$work/tree/usr/include" "$folder/include"
# shellcheck disable=SC2016  # nvcc reads these names
printf '%s\n' 'TOP = $(_HERE_)/..' 'NVVMIR_LIBRARY_DIR = $(TOP)/nvvm/libdevice' 'PATH += $(TOP)/nvvm/bin:$(_HERE_):' \
  'INCLUDES += "-I$(TOP)/include" $(_SPACE_)' >"$folder/bin/nvcc.profile"
"$folder/bin/nvcc" --version
