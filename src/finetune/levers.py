"""What `training.fused_lora` and `training.fused_kernels` turn on: other ways to compute the same step."""

from __future__ import annotations

from peft import PeftModel

from finetune.config.schema import TrainingConfig


def install(model: PeftModel, training: TrainingConfig) -> None:
    """Let `model` compute as `training` says, in training alone. Raises CheckFailed where nothing can be compiled."""
    if training.fused_lora:
        from finetune import fused_lora

        fused_lora.install(model)
    if training.fused_kernels:
        from finetune import fused_kernels

        fused_kernels.install(model, training.bf16)
