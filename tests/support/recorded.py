"""Machines as they were recorded, and what their torch said: what tests of hardware that is not here start from."""

from __future__ import annotations

from dataclasses import replace

from finetune.machine.device import Torch
from finetune.machine.inspect import GpuProcess, Machine

H100 = Machine(
    system="Linux", architecture="x86_64", gpus=("NVIDIA H100 80GB HBM3",), gpu_free_gib=79.1, gpu_memory_gib=79.6,
    driver="550.90.07", memory_gib=1007.6, memory_free_gib=950.0, release="5.15.0-119-generic", python="3.11.9",
    container=True, shm_gib=1.0,
)  # fmt: skip
H100_TORCH = Torch("2.10.0+cu128", built_for="12.8", sees_nvidia=True, capability=(9, 0))

A100_80 = replace(H100, gpus=("NVIDIA A100-SXM4-80GB",), gpu_free_gib=78.9, gpu_memory_gib=80.0)
A100_40 = replace(H100, gpus=("NVIDIA A100-SXM4-40GB",), gpu_free_gib=39.4, gpu_memory_gib=40.0)
RTX_4090 = replace(H100, gpus=("NVIDIA GeForce RTX 4090",), gpu_free_gib=23.5, gpu_memory_gib=24.0)
T4 = replace(H100, gpus=("Tesla T4",), gpu_free_gib=14.7, gpu_memory_gib=15.0)
GH200 = replace(
    H100, architecture="aarch64", gpus=("NVIDIA GH200 480GB",), gpu_free_gib=None, gpu_memory_gib=None,
    memory_gib=573.0, memory_free_gib=500.0,
)  # fmt: skip
EIGHT = replace(H100, gpus=("NVIDIA H100 80GB HBM3",) * 8)
BUSY = (GpuProcess(4711, "python", 61.5), GpuProcess(4712, "/usr/bin/ollama", None))

M4 = Machine(
    system="Darwin", architecture="arm64", gpus=(), gpu_free_gib=None, memory_gib=32.0, memory_free_gib=20.5,
    release="15.1", python="3.11.9", chip="Apple M4",
)  # fmt: skip
M4_TORCH = Torch("2.14.1", mps_built=True, sees_mps=True, working_set_gib=21.3)
M4_16 = replace(M4, memory_gib=16.0, memory_free_gib=9.0)
M2_32 = replace(M4, chip="Apple M2 Max")
INTEL_MAC = replace(
    M4, architecture="x86_64", chip="Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz", memory_gib=16.0, memory_free_gib=8.0
)
ROSETTA = replace(M4, architecture="x86_64", translated=True)

LINUX = Machine(
    system="Linux", architecture="x86_64", gpus=(), gpu_free_gib=None, memory_gib=15.6, memory_free_gib=12.0,
    release="6.8.0-45-generic", python="3.11.9",
)  # fmt: skip
LINUX_ARM = replace(LINUX, architecture="aarch64", memory_gib=7.7, memory_free_gib=6.0)
LINUX_TORCH = Torch("2.13.0+cpu")
