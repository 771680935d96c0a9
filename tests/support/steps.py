"""Losses and gradients of a tiny model's steps, compared between two ways to compute them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.model import fused_lora
from finetune.model.load import load_base
from finetune.model.lora import add_lora

Tensors = dict[str, torch.Tensor]


def settings(tiny_mistral: Path, *more: str) -> Config:
    return load_config("cpu", [f"model.name={tiny_mistral}", *more])[0]


def in_training(config: Config, fused: bool) -> PeftModel:
    """LoRA on the base, moved off its start, where B is zero and so are A's gradients."""
    model = add_lora(load_base(config.model, config.quantization, "cpu"), config.lora, 1)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    if config.training.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if fused:
        fused_lora.install(model)
    return model.train()


def autocast(config: Config) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=config.training.bf16)


def loss_and_gradients(model: PeftModel, config: Config, rows_seed: int = 3) -> Tensors:
    """Two rows of 24 tokens, and noise from seed 4."""
    model.zero_grad()
    ids = torch.randint(3, 32000, (2, 24), generator=torch.Generator().manual_seed(rows_seed))
    torch.manual_seed(4)
    with autocast(config):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    found = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    return {"loss": loss.detach(), **found}


def distance(found: Tensors, wanted: Tensors) -> float:
    """The largest difference of any tensor, relative to that tensor's norm."""
    assert found.keys() == wanted.keys()
    assert all(value.norm() > 0 and value.dtype == torch.float32 for value in wanted.values())
    assert all(value.dtype == torch.float32 for value in found.values())
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


checkpointings = pytest.mark.parametrize("checkpointing", ["true", "false"], ids=["checkpointed", "not checkpointed"])


BFLOAT16 = ("model.dtype=bfloat16", "quantization.bnb_4bit_compute_dtype=bfloat16", "training.bf16=true")
