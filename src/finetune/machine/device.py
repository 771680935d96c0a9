"""The device that a platform computes on, as torch reaches it: memory, random state, and what it must be told first."""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil

from finetune.errors import CheckFailed, OutOfResource
from finetune.files import GIB
from finetune.machine.inspect import read_machine
from finetune.machine.platforms import Platform
from finetune.wording import first_line


@dataclass(frozen=True)
class Torch:
    """What the installed torch can reach. `built_for` is the CUDA version that it was built for, None for none.

    `capability` is the first NVIDIA GPU's compute capability, (9, 0) on an H100; `working_set_gib` is how much of a
    Mac's unified memory its GPU may use before the system swaps.
    """

    version: str
    built_for: str | None = None
    sees_nvidia: bool = False
    capability: tuple[int, int] | None = None
    mps_built: bool = False
    sees_mps: bool = False
    working_set_gib: float | None = None


def read_torch() -> Torch:
    """Ask torch. Raises CheckFailed where it cannot be imported."""
    try:
        import torch
    except (ImportError, OSError, RuntimeError) as error:  # a broken shared library is an OSError
        raise CheckFailed(f"torch cannot be imported: {first_line(error)}") from None
    nvidia, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    return Torch(
        version=str(torch.__version__),
        built_for=torch.version.cuda,
        sees_nvidia=nvidia,
        capability=torch.cuda.get_device_capability(0) if nvidia else None,
        mps_built=torch.backends.mps.is_built(),
        sees_mps=mps,
        working_set_gib=torch.mps.recommended_max_memory() / GIB if mps else None,
    )


def prepare_device(platform: Platform) -> None:
    """See that torch has the device, and tell it what it must know before the first kernel runs.

    Raises CheckFailed where the config is for a device that is not here.
    """
    import torch

    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not present[platform.device]:
        found = f"this config is for {platform.label} ({platform.name}), and torch {torch.__version__} sees none"
        raise CheckFailed(f"device: {found}", "try --config cpu, or --dry-run, which needs no device")
    compute_repeatably(platform)


def compute_repeatably(platform: Platform) -> None:
    """Set what decides how torch and flash-attn compute on `platform`: the same at each start, as exactly as they can.

    docs/architecture.md, "Which bits are the same", has what that does not reach.
    """
    import torch

    os.environ.update(platform.environment)
    if platform.device == "cuda":
        # A weight gradient of LoRA is a sum over all tokens of a micro-batch. cuBLAS may split it, and by default adds
        # the partial sums in bfloat16, with 8 bits. In float32 that is expected to cost next to nothing.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        # From torch 2.11 on, cuDNN's attention is reported to give NaN on an H100 (pytorch#196678).
        torch.backends.cuda.enable_cudnn_sdp(False)


def is_memory_error(error: RuntimeError) -> bool:
    """Whether CUDA, MPS or the CPU raised `error` because memory is short."""
    words = "out of memory|can't allocate memory|not enough memory|ALLOC_FAILED"
    return re.search(words, str(error), re.IGNORECASE) is not None


@contextmanager
def memory_errors_explained(advice: str) -> Iterator[None]:
    """Turn what CUDA, MPS and the CPU raise when memory is short into OutOfResource with `advice`."""
    try:
        yield
    except RuntimeError as error:
        if not is_memory_error(error):
            raise
        raise OutOfResource(f"out of memory: {first_line(error)}", advice, between="\n") from None


def peak_memory_gib(platform: Platform) -> float:
    """Most memory this process has held where the model lives, GiB: on a GPU allocated and paged, on a CPU resident."""
    import torch

    if platform.accelerated:
        return float(torch.accelerator.max_memory_allocated() / GIB) + paged_gib(platform)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / GIB  # macOS counts bytes, Linux KiB


def peak_held_gib(platform: Platform) -> float:
    """As `peak_memory_gib`, and on a GPU what torch held beside what was allocated: what its driver saw."""
    import torch

    if platform.accelerated:
        return float(torch.accelerator.max_memory_reserved() / GIB) + paged_gib(platform)
    return peak_memory_gib(platform)


def paged_gib(platform: Platform) -> float:
    """Optimizer state that bitsandbytes holds in CUDA's unified memory, GiB; torch does not count it.

    That of tensors with 100,000 values or more. All of it counts as the GPU's, where a step needs it; when the GPU is
    full, the driver may keep some in the machine's memory.
    """
    if not platform.nvidia:
        return 0.0
    from bitsandbytes.functional import GlobalPageManager

    return float(sum(tensor.nbytes for tensor in GlobalPageManager.get_instance().paged_tensors) / GIB)


def capacity_gib(platform: Platform) -> float:
    """Memory that this process may fill where the model lives, GiB: what is free, and what it holds already.

    On a Mac at most the GPU's working set, beyond which the system swaps.
    """
    import torch

    if platform.device == "cuda":
        return float((torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()) / GIB)
    machine = read_machine()
    if platform.device == "mps":
        held_gib = torch.mps.driver_allocated_memory() / GIB
        return float(min(machine.memory_free_gib + held_gib, torch.mps.recommended_max_memory() / GIB))
    held_gib = psutil.Process().memory_info().rss / GIB
    return min(machine.memory_free_gib + held_gib, machine.memory_limit_gib or machine.memory_gib)


def synchronize(platform: Platform) -> None:
    """Wait until the device has done all that it was given, so that a clock may be read."""
    import torch

    torch.get_device_module(platform.device).synchronize()


def random_state(platform: Platform) -> Any:
    """The state of the device's own random numbers, which dropout draws from."""
    return _random_numbers(platform).get_rng_state()


def set_random_state(platform: Platform, state: Any) -> None:
    """Restore what `random_state` returned."""
    _random_numbers(platform).set_rng_state(state)


def _random_numbers(platform: Platform) -> Any:
    import torch

    return torch.get_device_module(platform.device) if platform.accelerated else torch


def free_cache(platform: Platform) -> None:
    """Give unused device memory back."""
    import torch

    if platform.accelerated:
        torch.accelerator.empty_cache()


def forget_memory(platform: Platform) -> None:
    """As `free_cache`, and count the peak from here on where that can be done."""
    import torch

    free_cache(platform)
    if platform.accelerated:
        torch.accelerator.reset_peak_memory_stats()
