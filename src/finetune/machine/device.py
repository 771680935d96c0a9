"""Uses a platform's device through torch: settings, memory and random state."""

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
    """What the installed torch can use. `built_for` is the CUDA version it was built for, or None.

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
    """Return what torch can use. Raises CheckFailed if it cannot be imported."""
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
    """Check that torch has the device, and configure it before the first kernel runs.

    Raises CheckFailed if the device is missing.
    """
    import torch

    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not present[platform.device]:
        found = f"this config is for {platform.label} ({platform.name}), but torch {torch.__version__} sees none"
        raise CheckFailed(f"device: {found}", "try --config cpu, or --dry-run, which needs no device")
    compute_repeatably(platform)


def compute_repeatably(platform: Platform) -> None:
    """Configure torch and flash-attn to compute as reproducibly and exactly as they can on `platform`.

    For the limits, see "Which bits are the same" in docs/architecture.md.
    """
    import torch

    os.environ.update(platform.environment)
    if platform.device == "cuda":
        # A LoRA weight's gradient is a sum over all tokens of a micro-batch. cuBLAS may split it, and by default adds
        # the partial sums in bfloat16, with 8 bits. Adding in float32 is expected to cost almost nothing.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        # From torch 2.11 on, cuDNN's attention is reported to give NaN on an H100 (pytorch#196678).
        torch.backends.cuda.enable_cudnn_sdp(False)


def is_memory_error(error: RuntimeError) -> bool:
    """Return whether `error` means that CUDA, MPS or the CPU ran out of memory."""
    words = "out of memory|can't allocate memory|not enough memory|ALLOC_FAILED"
    return re.search(words, str(error), re.IGNORECASE) is not None


@contextmanager
def memory_errors_explained(advice: str) -> Iterator[None]:
    """Turn out-of-memory errors of CUDA, MPS and the CPU into OutOfResource with `advice`."""
    try:
        yield
    except RuntimeError as error:
        if not is_memory_error(error):
            raise
        raise OutOfResource(f"out of memory: {first_line(error)}", advice, between="\n") from None


def peak_memory_gib(platform: Platform) -> float:
    """Return this process's peak memory on the device, GiB: allocated and paged on a GPU, resident on a CPU."""
    import torch

    if platform.accelerated:
        return float(torch.accelerator.max_memory_allocated() / GIB) + paged_gib(platform)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / GIB  # macOS counts bytes, Linux KiB


def peak_held_gib(platform: Platform) -> float:
    """Like `peak_memory_gib`, but on a GPU with all memory that torch reserved, as the driver reports it."""
    import torch

    if platform.accelerated:
        return float(torch.accelerator.max_memory_reserved() / GIB) + paged_gib(platform)
    return peak_memory_gib(platform)


def paged_gib(platform: Platform) -> float:
    """Return the optimizer state in CUDA's unified memory, GiB, which bitsandbytes allocates and torch does not count.

    Only tensors with 100,000 values or more are paged. All of it counts as the GPU's, as a step needs it there; if the
    GPU is full, the driver may keep some in the machine's memory.
    """
    if not platform.nvidia:
        return 0.0
    from bitsandbytes.functional import GlobalPageManager

    return float(sum(tensor.nbytes for tensor in GlobalPageManager.get_instance().paged_tensors) / GIB)


def capacity_gib(platform: Platform) -> float:
    """Return the memory this process can use on the model's device, GiB: what is free plus what it has allocated.

    On a Mac this is at most the GPU's working set, beyond which the system swaps.
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
    """Wait until the device has finished, to measure time."""
    import torch

    torch.get_device_module(platform.device).synchronize()


def random_state(platform: Platform) -> Any:
    """Return the state of the device's random number generator, which dropout uses."""
    return _random_numbers(platform).get_rng_state()


def set_random_state(platform: Platform, state: Any) -> None:
    """Restore what `random_state` returned."""
    _random_numbers(platform).set_rng_state(state)


def _random_numbers(platform: Platform) -> Any:
    """Return the torch module with the device's random number generator."""
    import torch

    return torch.get_device_module(platform.device) if platform.accelerated else torch


def free_cache(platform: Platform) -> None:
    """Release unused device memory."""
    import torch

    if platform.accelerated:
        torch.accelerator.empty_cache()


def forget_memory(platform: Platform) -> None:
    """Like `free_cache`, and reset the peak if the device can."""
    import torch

    free_cache(platform)
    if platform.accelerated:
        torch.accelerator.reset_peak_memory_stats()
