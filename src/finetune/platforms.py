"""The machines this program runs on, as rows of facts; the only file that knows device names.

Nothing here imports torch: what a machine is must still be known when torch is the thing that is broken.
"""

from __future__ import annotations

import platform as host
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from finetune.errors import CheckFailed, OutOfResource

GIB = 2**30


@dataclass(frozen=True)
class Platform:
    """What a config may ask for on one kind of machine.

    `optimizers` and `attentions` are the values that work there; `any_base` lets the base model be something other than
    Mistral-7B (the demo and the tests).
    """

    name: str
    label: str
    device: str
    optimizers: tuple[str, ...]
    attentions: tuple[str, ...]
    any_base: bool

    @property
    def pin_memory(self) -> bool:
        """Whether batches go through page-locked memory, which only an NVIDIA GPU copies from."""
        return self.device == "cuda"


PLATFORMS = {
    row.name: row
    for row in (
        Platform(
            name="h100",
            label="NVIDIA GPU",
            device="cuda",
            optimizers=("paged_adamw_32bit", "paged_adamw_8bit", "adamw_torch_fused", "adamw_torch"),
            attentions=("flash_attention_2", "sdpa"),
            any_base=False,
        ),
        Platform(
            name="m4",
            label="Apple silicon",
            device="mps",
            optimizers=("adamw_torch",),  # paged and 8-bit optimizers live in CUDA memory
            attentions=("sdpa",),
            any_base=False,
        ),
        Platform(
            name="cpu",
            label="CPU only",
            device="cpu",
            optimizers=("adamw_torch",),
            attentions=("sdpa",),
            any_base=True,
        ),
    )
}


@dataclass(frozen=True)
class Machine:
    """What was read off this machine: OS and architecture as `uname` has them, GPU names, memory in GiB."""

    system: str
    architecture: str
    gpus: tuple[str, ...]
    gpu_free_gib: float | None
    memory_gib: float
    memory_free_gib: float


def read_machine() -> Machine:
    """Read this machine; an NVIDIA GPU is looked up through its driver's own tool."""
    gpus, gpu_free_gib = _nvidia_gpus()
    memory = psutil.virtual_memory()
    return Machine(
        host.system(),
        host.machine(),
        gpus,
        gpu_free_gib,
        memory.total / GIB,
        min(memory.available, _cgroup_limit()) / GIB,
    )


def _nvidia_gpus() -> tuple[tuple[str, ...], float | None]:
    """Names of all GPUs and the first one's free memory in GiB; nothing where the driver does not answer."""
    if shutil.which("nvidia-smi") is None:
        return (), None
    query = ["nvidia-smi", "--query-gpu=name,memory.free", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, errors="replace", timeout=20, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return (), None
    rows = re.findall(r"^(.+), *([0-9]+|\[.+\])$", answer, re.MULTILINE)  # free memory may be [N/A]
    if not rows:
        return (), None
    free_mib = rows[0][1]
    return tuple(name for name, _ in rows), float(free_mib) / 1024 if free_mib.isdigit() else None


def _cgroup_limit() -> float:
    """Memory limit of this container in bytes, infinite where there is none."""
    path = Path("/sys/fs/cgroup/memory.max")
    text = path.read_text().strip() if path.is_file() else "max"
    return float("inf") if text == "max" else float(text)


def choose(machine: Machine) -> tuple[Platform, str]:
    """The platform that fits `machine`, and why, in words for the terminal."""
    if machine.gpus:
        return PLATFORMS["h100"], f"found {machine.gpus[0]}"
    if machine.system == "Darwin" and machine.architecture == "arm64":
        return PLATFORMS["m4"], f"found Apple silicon with {machine.memory_gib:.0f} GiB of unified memory"
    return PLATFORMS["cpu"], f"found no NVIDIA driver and no Apple silicon ({machine.system} {machine.architecture})"


def memory_available_gib(platform: Platform, machine: Machine) -> float | None:
    """Free memory in GiB where the model would live; None where `machine` is not of that platform."""
    if platform.name == "h100":
        return machine.gpu_free_gib
    if platform.name == "m4" and choose(machine)[0].name != "m4":
        return None
    return machine.memory_free_gib


def prepare_device(platform: Platform) -> None:
    """See that torch has the device, and tell it what it must know before the first kernel runs.

    Raises CheckFailed where the config is for a device that is not here.
    """
    import torch

    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not present[platform.device]:
        found = f"this config is for {platform.label} ({platform.name}), and torch {torch.__version__} sees none"
        raise CheckFailed(f"device: {found}; try --config cpu, or --dry-run, which needs no device")
    if platform.name == "h100":
        # From torch 2.11 on, cuDNN's attention is reported to give NaN on an H100 (pytorch#196678).
        torch.backends.cuda.enable_cudnn_sdp(False)


@contextmanager
def memory_errors_explained() -> Iterator[None]:
    """Turn what CUDA, MPS and the CPU raise when memory is short into OutOfResource with what to lower."""
    try:
        yield
    except RuntimeError as error:
        if not re.search("out of memory|can't allocate memory|not enough memory", str(error), re.IGNORECASE):
            raise
        advice = "lower training.per_device_train_batch_size and raise training.gradient_accumulation_steps as much"
        raise OutOfResource(f"out of memory: {str(error).splitlines()[0]}\n{advice}") from None


def peak_memory_gib(platform: Platform) -> float:
    """Most memory this process has held where the model lives, in GiB: allocated on a GPU, resident elsewhere."""
    import resource
    import sys

    if platform.name == "h100":
        import torch

        return float(torch.cuda.max_memory_allocated() / GIB)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / GIB  # macOS counts bytes, Linux KiB


def hardware(platform: Platform, machine: Machine) -> dict[str, Any]:
    """What the manifest says of the machine."""
    device = machine.gpus[0] if platform.name == "h100" and machine.gpus else host.processor() or machine.architecture
    return {
        "platform": platform.name,
        "device": device,
        "system": f"{machine.system} {host.release()}",
        "memory_gib": round(machine.memory_gib, 1),
    }
