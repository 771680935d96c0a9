"""The machines this program runs on, as rows of facts; with device.py the only file that knows device names.

Nothing here imports torch: what a machine is must still be known when torch is the thing that is broken.
"""

from __future__ import annotations

import platform as host
from dataclasses import dataclass
from typing import Any

from finetune.machine.inspect import Machine


@dataclass(frozen=True)
class Expectation:
    """How fast Mistral-7B trains by arithmetic that nobody has measured, and how long a run is sensible there."""

    tokens_per_second: float
    hours: float


@dataclass(frozen=True)
class Platform:
    """What a config may ask for on one kind of machine.

    `optimizers` and `attentions` are the values that work there; `any_base` lets the base model be something other than
    Mistral-7B (the demo and the tests); `compiles` says whether torch.compile may make kernels, which nobody has tried
    on MPS; `expectation` is there where a data set is easily too large for the machine. `memory_gib` is what to plan
    with where no such machine is at hand, and `specified_memory_gb` the peak that the specification expects, least and
    most, where the plan sets it against what the GPU may use.
    """

    name: str
    label: str
    device: str
    optimizers: tuple[str, ...]
    attentions: tuple[str, ...]
    any_base: bool
    compiles: bool
    memory_gib: float = 0.0  # a CPU is always at hand
    specified_memory_gb: tuple[int, int] | None = None
    expectation: Expectation | None = None

    @property
    def peak_begins_anew(self) -> bool:
        """Whether `forget_memory` lets a peak be measured again; the resident peak of a process never falls."""
        return self.device != "cpu"

    @property
    def pin_memory(self) -> bool:
        """Whether batches go through page-locked memory, which only an NVIDIA GPU copies from."""
        return self.device == "cuda"

    @property
    def random_state_apart(self) -> bool:
        """Whether transformers' rng_state.pth leaves the device's random numbers out; it holds the CPU's and CUDA's."""
        return self.device == "mps"


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
            memory_gib=80.0,
            compiles=True,
        ),
        Platform(
            name="m4",
            label="Apple silicon",
            device="mps",
            optimizers=("adamw_torch",),  # paged and 8-bit optimizers live in CUDA memory
            attentions=("sdpa",),
            any_base=False,
            memory_gib=21.3,  # the GPU's working set on a Mac of 32 GB: 22.9 GB, as reported
            specified_memory_gb=(24, 28),
            # Matrix products are 6 x 7.2e9 FLOP a token (forward, checkpointing's forward, backward): 65 tokens/s at
            # the 2.7-2.9 TFLOP/s that others measured on an M4; 35 leaves half to all the rest. 12 h is a long night.
            expectation=Expectation(tokens_per_second=35, hours=12),
            compiles=False,
        ),
        Platform(
            name="cpu",
            label="CPU only",
            device="cpu",
            optimizers=("adamw_torch",),
            attentions=("sdpa",),
            any_base=True,
            compiles=True,
        ),
    )
}


# Of the capacity, what `training.checkpointed_layers: auto` may fill: 72 of 80 GiB. The rest is for the CUDA context,
# for paged optimizer state, and for what batches of other lengths leave unused between torch's blocks.
AUTO_SHARE = 0.9

# Of a Mac's unified memory, what its GPU may use before macOS swaps, where torch cannot be asked: 21.3 of 32 GiB, as
# reported. Larger Macs and later systems are reported to give more.
WORKING_SET_SHARE = 2 / 3


def quantised_on(device: str, storage: str) -> str:
    """Where NF4 is made, and expanded, for a base on `device`: there, but for MPS and `expanded` on the CPU.

    An expanded base on MPS so needs no 4-bit kernel there.
    """
    return "cpu" if storage == "expanded" and device not in ("cuda", "cpu") else device


def choose(machine: Machine) -> tuple[Platform, str]:
    """The platform that fits `machine`, and why, in words for the terminal."""
    if machine.gpus:
        return PLATFORMS["h100"], f"found {machine.gpus[0]}"
    if machine.system == "Darwin" and machine.architecture == "arm64":
        return PLATFORMS["m4"], f"found Apple silicon with {machine.memory_gib:.0f} GiB of unified memory"
    if machine.translated:
        return PLATFORMS["cpu"], "found Apple silicon, but this Python is an Intel build under Rosetta"
    return PLATFORMS["cpu"], f"found no NVIDIA driver and no Apple silicon ({machine.system} {machine.architecture})"


def accelerator(machine: Machine) -> str:
    """What `machine` computes on, in words: an H100, another NVIDIA GPU, a Mac's chip, or its CPU only."""
    if machine.gpus:
        more = f" (the first of {len(machine.gpus)})" if len(machine.gpus) > 1 else ""
        what = "" if "H100" in machine.gpus[0] else ", an NVIDIA GPU, but no H100: hours and memory differ"
        return f"{machine.gpus[0]}{more}{what}"
    if machine.system == "Darwin" and machine.architecture == "arm64":
        what = "" if machine.chip.startswith("Apple M4") else ", Apple silicon, but no M4: hours and memory differ"
        return f"{machine.chip or 'unknown chip'}{what}"
    return "none: CPU only"


def memory_available_gib(platform: Platform, machine: Machine) -> float | None:
    """Free memory in GiB where the model would live; None where `machine` is not of that platform."""
    if platform.name == "h100":
        return machine.gpu_free_gib
    if platform.name == "m4" and choose(machine)[0].name != "m4":
        return None
    return machine.memory_free_gib


def hardware(platform: Platform, machine: Machine) -> dict[str, Any]:
    """What the manifest says of the machine."""
    device = machine.gpus[0] if platform.name == "h100" and machine.gpus else host.processor() or machine.architecture
    return {
        "platform": platform.name,
        "device": device,
        "system": f"{machine.system} {host.release()}",
        "memory_gib": round(machine.memory_gib, 1),
    }
