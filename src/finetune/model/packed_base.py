"""Keeps the quantized base on disk, because a CPU takes minutes to make it: sealed, and replaced if damaged."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.config.base_model import is_local
from finetune.files import GIB, read_seal, resolve, seal, sha256, shown
from finetune.model.hub import cached_folder, weights_digest
from finetune.wording import Report, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetune.config.schema import ModelConfig, QuantizationConfig

LIBRARIES = ("bitsandbytes", "transformers")


def folder_of(cache: Path, model: ModelConfig, quantization: QuantizationConfig) -> Path:
    """Return a folder in `cache` named by everything that decides a packed value.

    That is the base's weights and shape, the quantization, and the libraries' versions. Before the weights are
    downloaded, the name is computed without them.
    """
    source = resolve(model.name) if is_local(model.name) else cached_folder(model.name, model.revision)
    here = source is not None and (source / "config.json").is_file()
    weights = [weights_digest(source), sha256(source / "config.json")] if source and here else []
    settings = [quantization.bnb_4bit_quant_type, quantization.bnb_4bit_use_double_quant]
    parts = [weights, settings, model.dtype, quantization.bnb_4bit_compute_dtype, list(map(version, LIBRARIES))]
    return cache / f"packed-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]}"


def whole(folder: Path, report: Report) -> bool:
    """Whether `folder` exists and its seal holds. A damaged one is deleted with a warning."""
    if not folder.is_dir():
        return False
    try:
        read_seal(folder)
    except (ValueError, OSError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        report.warn(f"{shown(folder)} is damaged ({error}): deleted, the base will be quantized again")
        return False
    return True


def _write(base: PreTrainedModel, folder: Path, facts: dict[str, Any]) -> float:
    """Write packed `base` to `folder` atomically, with `facts` in its seal; return its size in GiB.

    Raises OSError or SafetensorError if the disk is full or not writable.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(partial, ignore_errors=True)  # we hold the lock, so only a killed process can have left it
        try:
            base.save_pretrained(partial)
            seal(partial, facts | {name: version(name) for name in LIBRARIES})
            if not folder.is_dir():  # else another process made the same one meanwhile
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return sum(path.stat().st_size for path in folder.iterdir()) / GIB


def keep(base: PreTrainedModel, folder: Path, facts: dict[str, Any], report: Report, took: str) -> None:
    """Keep `base` for later starts; a disk error is a warning. `took`: how long quantizing took."""
    from safetensors import SafetensorError

    quantized = f"quantized on the CPU in {took}"
    try:
        size = _write(base, folder, facts)
    except (OSError, SafetensorError) as error:
        report.warn(
            f"the packed base cannot be kept in {shown(folder)} ({first_line(error)}): each start will quantize it"
        )
        report.decision("packed base", quantized)
        return
    report.decision("packed base", f"{quantized}; kept in {shown(folder)}, {size:.1f} GiB, for later starts")
