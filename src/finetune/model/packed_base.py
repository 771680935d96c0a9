"""The base in NF4 on disk, for a machine whose CPU takes minutes to make it: sealed, and made again where damaged."""

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
    """Below `cache`, named by whatever decides a packed value: weights and shape of the base, how it is quantised, and
    the libraries' versions. While the weights are not here the name is that of none.
    """
    source = resolve(model.name) if is_local(model.name) else cached_folder(model.name, model.revision)
    here = source is not None and (source / "config.json").is_file()
    weights = [weights_digest(source), sha256(source / "config.json")] if source and here else []
    settings = [quantization.bnb_4bit_quant_type, quantization.bnb_4bit_use_double_quant]
    parts = [weights, settings, model.dtype, quantization.bnb_4bit_compute_dtype, list(map(version, LIBRARIES))]
    return cache / f"packed-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]}"


def whole(folder: Path, report: Report) -> bool:
    """Whether the sealed `folder` is there. A damaged one is deleted, and the report says so."""
    if not folder.is_dir():
        return False
    try:
        read_seal(folder)
    except (ValueError, OSError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        report.warn(f"{shown(folder)} is damaged ({error}): deleted, and the base is quantised again")
        return False
    return True


def _write(base: PreTrainedModel, folder: Path, facts: dict[str, Any]) -> float:
    """Write packed `base` to `folder`, whole or not at all, with `facts` in its seal; returns its size in GiB.

    Raises OSError or SafetensorError where the disk does not take it.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(partial, ignore_errors=True)  # only a killed process can have left it: the lock is ours
        try:
            base.save_pretrained(partial)
            seal(partial, facts | {name: version(name) for name in LIBRARIES})
            if not folder.is_dir():  # else another process made the same meanwhile
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return sum(path.stat().st_size for path in folder.iterdir()) / GIB


def keep(base: PreTrainedModel, folder: Path, facts: dict[str, Any], report: Report, took: str) -> None:
    """Keep `base`, which `took` that time to quantise, for later starts; a disk that does not take it is a warning."""
    from safetensors import SafetensorError

    quantised = f"quantised on the CPU in {took}"
    try:
        size = _write(base, folder, facts)
    except (OSError, SafetensorError) as error:
        report.warn(f"the packed base cannot be kept in {shown(folder)} ({first_line(error)}): each start quantises it")
        report.decision("packed base", quantised)
        return
    report.decision("packed base", f"{quantised}; kept in {shown(folder)}, {size:.1f} GiB, for later starts")
