"""The tiny Mistral in NF4, and what of it is trained."""

from __future__ import annotations

import functools
from typing import Any

import torch

from finetune.config.schema import Config
from finetune.model.load import load_base

LAYER = "model.layers.0.self_attn.q_proj"


def base_model(config: Config, **quantization: Any) -> Any:
    return load_base(config.model, config.changed("quantization", **quantization).quantization, "cpu")


def trained_state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def same(these: dict[str, torch.Tensor], those: dict[str, torch.Tensor]) -> bool:
    return these.keys() == those.keys() and all(torch.equal(these[name], those[name]) for name in these)


@functools.cache
def layers() -> list[str]:
    """Names of the 14 linear layers of the tiny model's decoder, in order."""
    attention = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")]
    names = [*attention, *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]
    return [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in names]
