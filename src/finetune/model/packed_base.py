"""Where the quantized base is kept, because a CPU takes minutes to make it."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.config.base_model import is_local
from finetune.data.cache import Cache
from finetune.files import resolve, sha256
from finetune.model.hub import cached_folder, weights_digest
from finetune.wording import SILENT, Report

if TYPE_CHECKING:
    from finetune.config.schema import ModelConfig, QuantizationConfig

LIBRARIES = ("bitsandbytes", "transformers")


def cache_in(folder: Path, report: Report = SILENT) -> Cache:
    """Return the cache of packed bases in `folder`; each is about 4 GB of a 7B."""
    return Cache(folder, report, kept=2, prefix="packed-", what="the packed base")


def key(model: ModelConfig, quantization: QuantizationConfig) -> str:
    """Hash everything that decides a packed value: weights, shape, quantization and the libraries' versions.

    Weights that are not downloaded yet are left out.
    """
    source = resolve(model.name) if is_local(model.name) else cached_folder(model.name, model.revision)
    weights = [weights_digest(source), sha256(source / "config.json")] if source else []
    settings = [quantization.bnb_4bit_quant_type, quantization.bnb_4bit_use_double_quant]
    parts = [weights, settings, model.dtype, quantization.bnb_4bit_compute_dtype, list(map(version, LIBRARIES))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]
