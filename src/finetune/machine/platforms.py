"""The platforms, as rows of facts; besides device.py the only file that knows device names.

Nothing here imports torch, so that the machine can be identified even if torch is broken.
"""

from __future__ import annotations

import os
import platform as host
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune.cli import PYTHON, advice
from finetune.machine.inspect import Machine


@dataclass(frozen=True)
class Expectation:
    """The expected speed of training Mistral-7B, computed but not measured, and the longest sensible run.

    `tokens_per_second` is a range. With `gpu_cores` it is for that number of cores, and scales with the machine's.
    """

    tokens_per_second: tuple[float, float]
    hours: float
    gpu_cores: int | None = None


@dataclass(frozen=True)
class Platform:
    """What works on one kind of machine, and everything that differs by platform.

    `optimizers` and `attentions` are the values that work, the attention that `auto` prefers first. `any_base` allows
    base models other than Mistral-7B and the demo's (in tests). `compiles` is whether torch.compile may be used
    (untested on MPS). `expectation` is set if hours limit how much data makes sense.

    `nvidia` means an NVIDIA GPU on Linux, with CUDA's kernels and Triton; `unified_memory`, a Mac's GPU, which may use
    its working set of the machine's memory before macOS swaps. `keeps_attention_weights` is whether SDPA keeps them, in
    float32, for the backward pass. `backward_tokens` is the most tokens for which a backward pass is correct.

    `variables` are environment variables of its libraries; the user's own values win.

    `memory_gib` is the memory to plan with on a different machine (with unified memory, the working set).
    `specified_memory_gb` is an early estimate of the peak (least, most). `program_gib` is what interpreter and
    libraries use of the model's memory. `loading_gib` is the machine's memory needed to load the base; 0 if training
    needs more.

    `install` updates the environment to the lock; `repair` reinstalls everything. `demo` is the config of its demo,
    relative to the project's root; "" if it has none, or is itself the demo. `mac_lock` is the lock that this platform
    uses on macOS, if not its own.
    """

    name: str
    label: str
    device: str
    optimizers: tuple[str, ...]
    attentions: tuple[str, ...]
    any_base: bool
    compiles: bool
    nvidia: bool = False
    unified_memory: bool = False
    keeps_attention_weights: bool = False
    backward_tokens: int | None = None
    variables: tuple[tuple[str, str], ...] = ()
    memory_gib: float = 0.0  # 0 for the CPU, which every machine has
    specified_memory_gb: tuple[int, int] | None = None
    # Before training, on Linux: the smallest program_gib that benchmarks/memory.py measured.
    program_gib: float = 0.56
    loading_gib: float = 0.0
    expectation: Expectation | None = None
    install: str = advice("rm .venv/installed; scripts/make_venv.sh", "docker compose build")
    repair: str = advice("rm -r .venv; scripts/make_venv.sh", "docker compose build --no-cache")
    demo: str = ""
    mac_lock: str = ""

    @property
    def accelerated(self) -> bool:
        """Whether it computes on a GPU."""
        return self.device != "cpu"

    @property
    def environment(self) -> dict[str, str]:
        """Its `variables` with the values in effect: the user's, else the row's."""
        return {name: os.environ.get(name, value) for name, value in self.variables}

    @property
    def peak_begins_anew(self) -> bool:
        """Whether `forget_memory` resets the peak; the resident peak of a process never falls."""
        return self.accelerated

    @property
    def pin_memory(self) -> bool:
        """Whether batches go through page-locked memory, which only NVIDIA GPUs use."""
        return self.device == "cuda"

    @property
    def random_state_apart(self) -> bool:
        """Whether the device has its own random state, which the libraries do not save.

        transformers' rng_state.pth has the CPU's and CUDA's. torch's checkpoint (2.14.1) restores it for a
        recomputed layer only if the device's module has `_initialized`, which torch.mps lacks (pytorch#127676, open).
        """
        return self.device == "mps"


PLATFORMS = {
    row.name: row
    for row in (
        Platform(
            name="h100",
            label="NVIDIA GPU",
            device="cuda",
            optimizers=("paged_adamw_32bit", "paged_adamw_8bit", "adamw_torch_fused", "adamw_torch"),
            attentions=("flash_attention_2", "torch_varlen", "sdpa"),
            any_base=False,
            compiles=True,
            nvidia=True,
            # transformers passes it to flash-attn. Without it, flash-attn's backward sums the queries' gradient in the
            # order in which blocks finish (flash-attn 2.8.3, flash_bwd_kernel.h).
            variables=(("FLASH_ATTENTION_DETERMINISTIC", "1"),),
            memory_gib=80.0,
            program_gib=0.0,  # in the machine's memory, not the GPU's
            # Expected: three shards of up to 5 GB are read on the way to the GPU while data is prepared.
            loading_gib=16.0,
            # A roofline of 700 TFLOP/s and 2.6 TB/s gives 7,950 tokens/s with all layers checkpointed and nothing
            # fused, 14,000 with few layers and all fused; 70 and 80 % of them. A day is a long time to rent.
            expectation=Expectation(tokens_per_second=(5_500, 11_000), hours=24),
            install=advice(
                f"{PYTHON} -m pip install --require-hashes -r requirements/h100.lock", "docker compose build"
            ),
            repair=advice(
                f"{PYTHON} -m pip install --force-reinstall --require-hashes -r requirements/h100.lock",
                "docker compose build --no-cache",
            ),
        ),
        Platform(
            name="m4",
            label="Apple silicon",
            device="mps",
            optimizers=("adamw_torch",),  # paged and 8-bit optimizers need CUDA memory
            attentions=("sdpa",),
            any_base=False,
            compiles=False,
            unified_memory=True,
            keeps_attention_weights=True,
            backward_tokens=32_768,  # above it, gradients are reported to be wrong (pytorch#177116, open)
            memory_gib=21.3,  # the GPU's working set on a Mac of 32 GB: 22.9 GB, as reported
            specified_memory_gb=(24, 28),
            # Matrix products are 6 x 7.2e9 FLOP a token (forward, checkpointing's forward, backward): 65 tokens/s at
            # the 2.7-2.9 TFLOP/s that others measured on an M4 with 10 GPU cores; all the rest leaves 25 to 50 of them.
            # 12 h is a long night.
            expectation=Expectation(tokens_per_second=(25, 50), hours=12, gpu_cores=10),
            demo="configs/training_config_m4_demo.yaml",
        ),
        Platform(
            name="cpu",
            label="CPU only",
            device="cpu",
            optimizers=("adamw_torch",),
            attentions=("sdpa",),
            any_base=True,
            compiles=True,
            # The demo's resident peak, 3.43 to 3.74 GiB (resident and quickstart in benchmarks/results), minus 1.81 of
            # tensors. 0.7 of it are pages of libraries, which the system can drop; the rest is anonymous.
            program_gib=1.7,
            mac_lock="m4",
        ),
    )
}


# What a run computes depends on these: the manifest has their versions; older ones than the lock's are untested.
LIBRARIES = (
    *("torch", "transformers", "peft", "trl", "accelerate"),
    *("datasets", "bitsandbytes", "tokenizers", "mistral-common"),
)


def lays_flat(attention: str) -> bool:
    """Return whether packed sequences form one long row; with sdpa each is a row, to avoid a mask of all tokens."""
    return attention != "sdpa"


def names(having: Callable[[Platform], bool]) -> tuple[str, ...]:
    """Return the names of the platforms with the property `having`."""
    return tuple(name for name, row in PLATFORMS.items() if having(row))


# Share of the capacity that `training.checkpointed_layers: auto` may fill: 72 of 80 GiB. The rest is for the CUDA
# context, for optimizer state that earlier trials cannot release, and for fragmentation by batches of other lengths.
AUTO_SHARE = 0.9

# Share of a Mac's unified memory that its GPU may use before macOS swaps, if torch is not asked: 21.3 of 32 GiB, as
# reported. Larger Macs and later systems are reported to allow more.
WORKING_SET_SHARE = 2 / 3


def quantized_on(device: str) -> str:
    """Return the device on which the base is quantized: `device` itself, but the CPU for MPS.

    On MPS bitsandbytes (0.50) has no kernels of its own: it uses torch.compile, and plain torch where that fails.
    """
    return device if device in ("cuda", "cpu") else "cpu"


def choose(machine: Machine) -> tuple[Platform, str]:
    """Return the platform for `machine`, and the reason in words."""
    if machine.gpus:
        return PLATFORMS["h100"], f"found {machine.gpus[0]}"
    if machine.apple_silicon:
        return PLATFORMS["m4"], f"found Apple silicon with {machine.memory_gib:.0f} GiB of unified memory"
    if machine.translated:
        return PLATFORMS["cpu"], "found Apple silicon, but this Python is an Intel build under Rosetta"
    return PLATFORMS["cpu"], f"found no NVIDIA driver and no Apple silicon ({machine.system} {machine.architecture})"


def accelerator(machine: Machine) -> str:
    """Describe what `machine` computes on: its NVIDIA GPU, a Mac's chip, or only a CPU."""
    if machine.gpus:
        more = f" (the first of {len(machine.gpus)})" if len(machine.gpus) > 1 else ""
        what = "" if "H100" in machine.gpus[0] else ", an NVIDIA GPU but not an H100: hours and memory differ"
        return f"{machine.gpus[0]}{more}{what}"
    if machine.apple_silicon:
        what = "" if chip_generation(machine) == 4 else ", Apple silicon but not an M4: hours and memory differ"
        return f"{machine.chip or 'unknown chip'}{what}"
    return "none: CPU only"


def chip_generation(machine: Machine) -> int | None:
    """Return 4 for an Apple M4, M4 Pro or M4 Max; None if the chip is unknown."""
    found = re.match(r"Apple M(\d+)\b", machine.chip)
    return int(found[1]) if found else None


def memory_available_gib(platform: Platform, machine: Machine) -> float | None:
    """Return the free memory for the model, GiB; None if `machine` is of another platform."""
    if platform.nvidia:
        return machine.gpu_free_gib
    return None if platform.unified_memory and not machine.apple_silicon else machine.memory_free_gib


def memory_limits(platform: Platform, machine: Machine, working_set_gib: float | None) -> dict[str, float]:
    """Return the limits of the model's memory in GiB, by kind; empty if free memory is unknown."""
    free_gib = memory_available_gib(platform, machine)
    if free_gib is None:
        return {}
    total_gib = machine.gpu_memory_gib if platform.nvidia else None
    limits = {f"free of {total_gib:.1f}" if total_gib else "free": free_gib}
    if working_set_gib is not None:
        limits["in the GPU's working set, beyond which macOS swaps"] = working_set_gib
    return limits


def hardware(platform: Platform, machine: Machine) -> dict[str, Any]:
    """Return the machine's facts for the manifest."""
    gpu = machine.gpus[0] if platform.nvidia and machine.gpus else ""
    device = gpu or machine.chip or host.processor() or machine.architecture
    return {
        "platform": platform.name,
        "device": device,
        "system": f"{machine.system} {host.release()}",
        "memory_gib": round(machine.memory_gib, 1),
    }
