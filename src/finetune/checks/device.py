"""Checks of what the device computes: NF4 and LoRA, optimizer, recomputed layers, loss, attention, repeatability."""

from __future__ import annotations

import importlib.util
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from finetune.checks.preflight import Preflight
from finetune.checks.runner import Check, Finding, Result, failed, passed, skipped, warned
from finetune.cli import PYTHON, advice
from finetune.machine.platforms import names, quantized_on
from finetune.wording import first_line, listed

# Largest distance from fp32 that counts as rounding: several times what benchmarks/trials.py measured on a CPU
# (benchmarks/results), and far below 1, the distance of a kernel that computes something else.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.03}
OPTIMIZER_TOLERANCE = {"paged_adamw_8bit": 0.05}  # 8-bit state is coarse by design; an expectation
BUILD_FLASH_ATTENTION = advice(
    f"{PYTHON} -m pip install --require-hashes -r requirements/flash-attn.lock && "
    f'{PYTHON} -m pip install --no-deps "$(PATH={Path(PYTHON).parent}:$PATH docker/flash_attn.sh docker/wheels)"',
    "docker compose build --build-arg FLASH_ATTN=build",
)

# By model.attn_implementation: the library, its repair (None: the platform's), the value to set instead.
PACKED_ATTENTION = {
    "flash_attention_2": ("flash-attn", BUILD_FLASH_ATTENTION, "torch_varlen"),
    "torch_varlen": ("torch's varlen_attn", None, "sdpa"),
}
TRITON = advice(
    f"sudo apt install build-essential python{sysconfig.get_python_version()}-dev (compiler and headers), "
    "sudo ldconfig (libcuda.so.1), or export TRITON_CACHE_DIR=FOLDER (a disk that is not full, read-only or noexec)",
    "docker compose build --no-cache (compiler and headers), docker compose run --rm validate (libcuda.so.1 comes with "
    "the GPU), or run it with -e TRITON_CACHE_DIR=FOLDER (a disk that is not full, read-only or noexec)",
)


def _qlora(preflight: Preflight) -> Finding:
    import torch

    from finetune.checks.numerics import linear

    device, dtype = preflight.platform.device, preflight.config.model.dtype
    storage = preflight.config.quantization.storage
    lost, (least, most) = linear.nf4_loss(quantized_on(device)), linear.NF4_LOSS
    if not least <= lost <= most:
        text = f"NF4 loses {lost:.1%} of normal weights, expected {least:.0%} to {most:.0%}"
        return failed(text, preflight.platform.repair)
    distance = linear.qlora_step(device, getattr(torch, dtype), storage)
    text = f"a QLoRA step in {dtype}, {storage}, is {distance:.1e} from fp32"
    judged = _judged(text, distance, TOLERANCE[dtype], preflight.platform.repair)
    kept = f"NF4 keeps {1 - lost:.1%} of normal weights; {text}"
    return passed(kept) if judged.status == "pass" else judged


def _judged(text: str, distance: float, most: float, fix: str) -> Finding:
    """Pass if `distance`, which may be NaN, is at most `most`."""
    return passed(text) if distance <= most else failed(f"{text}, expected at most {most:g}", fix)


def _bfloat16(preflight: Preflight) -> Finding:
    from finetune.checks.numerics import linear

    if preflight.config.model.dtype != "bfloat16":
        return skipped(f"model.dtype is {preflight.config.model.dtype}")
    distance = linear.bfloat16_product(preflight.platform.device)
    text = f"a bfloat16 product is {distance:.1e} from fp32"
    return _judged(text, distance, TOLERANCE["bfloat16"], preflight.platform.repair)


def _optimizer(preflight: Preflight) -> Finding:
    from finetune.checks.numerics.optimizer import optimizer_step

    name = preflight.config.training.optim
    distance = optimizer_step(name, preflight.platform.device)
    text = f"three steps of {name} are {distance:.1e} from PyTorch's AdamW"
    most = OPTIMIZER_TOLERANCE.get(name, TOLERANCE["float32"])
    return _judged(text, distance, most, preflight.platform.repair)


def _triton(preflight: Preflight) -> Finding:
    try:
        return _chunked_loss(preflight, "float32")
    except Exception as error:  # noqa: BLE001  Triton's errors, and those of compiler, headers, driver and disk
        return failed(f"Triton's kernels cannot be compiled: {first_line(error)}", TRITON)


def _loss(preflight: Preflight) -> Finding:
    return _chunked_loss(preflight, preflight.config.model.dtype)


def _chunked_loss(preflight: Preflight, dtype: str) -> Finding:
    import torch

    from finetune.checks.numerics.loss import chunked_loss

    distance = chunked_loss(preflight.platform.device, getattr(torch, dtype))
    text = f"TRL's loss in {dtype} is {distance:.1e} from plain cross entropy"
    return _judged(text, distance, TOLERANCE[dtype], preflight.platform.repair)


def _attention(preflight: Preflight) -> Finding:
    import torch

    model = preflight.config.model
    if model.attn_implementation == "flash_attention_2":  # torch_varlen leaves padded rows to it
        return skipped(f"model.attn_implementation is {model.attn_implementation}")
    from finetune.checks.numerics.attention import sdpa

    distance = sdpa(preflight.platform.device, getattr(torch, model.dtype))
    text = f"torch's attention in {model.dtype} is {distance:.1e} from fp32"
    return _judged(text, distance, TOLERANCE[model.dtype], preflight.platform.repair)


def _flash_attention(preflight: Preflight) -> Finding:
    name = preflight.config.model.attn_implementation
    if name == "sdpa":
        return skipped("model.attn_implementation is sdpa")
    kind, repair, other = PACKED_ATTENTION[name]
    fix = f"{repair or preflight.platform.repair}  or without it: --set model.attn_implementation={other}"
    if name == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        return failed("flash-attn is not installed", fix)
    from finetune.checks.numerics.attention import packed_attention

    try:
        distance = packed_attention(name, preflight.platform.device)
    except (ImportError, OSError, RuntimeError) as error:  # built for another torch or GPU
        return failed(f"{kind} is installed but does not work: {first_line(error)}", fix)
    text = f"{kind} over two packed documents is {distance:.1e} from attention over each alone"
    return _judged(text, distance, TOLERANCE["bfloat16"], fix)


def _recompute(preflight: Preflight) -> Finding:
    if not preflight.config.training.gradient_checkpointing:
        return skipped("training.gradient_checkpointing is false")
    from finetune.checks.numerics.recompute import recomputed_gradient

    distance = recomputed_gradient(preflight.platform, preflight.config.lora)
    text = f"the gradient through recomputed layers is {distance:.1e} from that without recomputing"
    fix = f"{preflight.platform.repair}  or train without dropout: --set lora.lora_dropout=0"
    return _judged(text, distance, TOLERANCE["float32"], fix)


def _deterministic(preflight: Preflight) -> Finding:
    if _flash_attention(preflight).status == "fail":
        return skipped("needs device.flash_attention")
    from finetune.checks.numerics.repeat import differing
    from finetune.machine.device import compute_repeatably, forget_memory

    compute_repeatably(preflight.platform)
    differ = differing(preflight.config, preflight.platform.device)
    forget_memory(preflight.platform)
    what = f"{preflight.config.model.attn_implementation} over packed documents"
    if differ:
        return warned(f"{what}: different bits each time in {listed(differ, 3)}", REPEATABLE)
    return passed(f"{what}: the same bits each time, also of a decoder layer")


def same_bits(results: Iterable[Result]) -> str | None:
    """Return the finding of device.deterministic for the manifest; None if it did not run."""
    looked = (it for it in results if it.id == "device.deterministic" and it.status in ("pass", "warn"))
    return next((it.detail for it in looked), None)


ACCELERATED, FLASH = names(lambda row: row.accelerated), names(lambda row: "flash_attention_2" in row.attentions)
DEVICE = ("libraries.imports", "gpu.torch", "mac.torch")
NVIDIA = names(lambda row: row.nvidia)
QLORA = "NF4's rounding, and a QLoRA step with few and with many rows in the config's storage, against fp32"
OPTIMIZER = "the config's optimizer against PyTorch's AdamW on the CPU"
KERNELS = "TRL's loss in fp32 with its Triton kernels, compiled here, against plain cross entropy"
LOSS = "TRL's loss and its gradient in the config's dtype, as the trainer calls it, against plain cross entropy"
SDPA = "torch's attention, if the config uses it: causal and block mask, with and without a gradient"
RECOMPUTE = "gradients with and without recomputed layers are equal: both draw the same dropout masks"
ATTENTION = "flash-attn or torch_varlen, whichever the config uses: forward and backward over packed documents"
REPEATABLE = (
    "nothing, if a resumed run may end with different bits; else unset FLASH_ATTENTION_DETERMINISTIC and "
    "--set model.attn_implementation=flash_attention_2"
)
DETERMINISTIC = "attention and a decoder layer, several times over packed documents: same bits, or what differs"
CHECKS = (
    Check("device.qlora", QLORA, _qlora, needs=DEVICE),
    Check("device.bfloat16", "a bfloat16 product against fp32", _bfloat16, ACCELERATED, DEVICE),
    Check("device.optimizer", OPTIMIZER, _optimizer, ACCELERATED, DEVICE),
    Check("device.recompute", RECOMPUTE, _recompute, needs=DEVICE),
    Check("device.triton", KERNELS, _triton, NVIDIA, (*DEVICE, "gpu.compiler")),
    Check("device.loss", LOSS, _loss, ACCELERATED, (*DEVICE, "device.triton")),
    Check("device.attention", SDPA, _attention, ACCELERATED, DEVICE),
    Check("device.flash_attention", ATTENTION, _flash_attention, FLASH, DEVICE),
    Check("device.deterministic", DETERMINISTIC, _deterministic, NVIDIA, DEVICE, level="warn"),
)
