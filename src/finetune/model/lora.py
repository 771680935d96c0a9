"""LoRA on the base, in float32, the same for the same seed; and the faster ways to compute its steps."""

from __future__ import annotations

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from transformers import (
    PreTrainedModel,
    set_seed,
)

from finetune.config.schema import LoraConfig, TrainingConfig
from finetune.errors import CheckFailed


def add_lora(base: PreTrainedModel, lora: LoraConfig, seed: int) -> PeftModel:
    """LoRA on `base` with fp32 adapter weights, the same for the same seed whatever happened before."""
    set_seed(seed)
    peft_config = PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=list(lora.target_modules),
        bias=lora.bias,
        task_type=lora.task_type,
    )
    model = get_peft_model(base, peft_config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise CheckFailed(f"model: {name} has dtype {parameter.dtype}, wanted float32 adapter weights")
    return model


def install_fused(model: PeftModel, training: TrainingConfig) -> None:
    """Let `model` compute as `training` says, in training alone; `auto` is for a rehearsal to settle first.

    Raises CheckFailed where nothing can be compiled.
    """
    if training.fused_lora is True:
        from finetune.model import fused_lora

        fused_lora.install(model)
    if training.fused_kernels is True:
        from finetune.model import fused_kernels

        fused_kernels.install(model, training.bf16)
