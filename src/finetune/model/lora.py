"""Adds LoRA to the base in float32, loads saved adapters, and installs the fused paths."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    PreTrainedModel,
    set_seed,
)

from finetune.config.schema import LoraConfig, TrainingConfig
from finetune.errors import CheckFailed
from finetune.files import shown
from finetune.machine.device import is_memory_error
from finetune.wording import listed


def add_lora(base: PreTrainedModel, lora: LoraConfig, seed: int) -> PeftModel:
    """Add LoRA with fp32 weights to `base`; the same seed always gives the same weights."""
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
            raise CheckFailed(f"model: {name} has dtype {parameter.dtype}, expected float32 adapter weights")
    return model


def load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Load a saved adapter onto `base`. Raises CheckFailed if it is damaged or of another base.

    PEFT itself ignores a tensor without a layer, only warns about a layer without a tensor, and loads NaN.
    """
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # missing tensors are found below
            model = PeftModel.from_pretrained(base, folder, torch_device=base.device.type)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and is_memory_error(error):
            raise
        text = f"KeyError {error}" if isinstance(error, KeyError) else str(error)
        why = " ".join(line.strip() for line in text.splitlines()[:2])  # the second names a size mismatch
        raise CheckFailed(f"{shown(folder)}: PEFT cannot load this adapter: {why}") from None
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    if unmatched := sorted(tensors.keys() ^ loaded.keys()):
        raise CheckFailed(f"{shown(folder)}: not an adapter of this base: {listed(unmatched, 1)} in one of them only")
    _require_finite(tensors, folder)
    return model


def _require_finite(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    if wrong := sorted(name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()):
        raise CheckFailed(f"{shown(folder)}: damaged: {listed(wrong, 1)} not finite")


def begin_with(model: PeftModel, folder: Path) -> None:
    """Load the weights of the saved adapter in `folder`, in float32.

    Raises CheckFailed if one is not finite, or does not arrive in the model unchanged.
    """
    tensors = load_file(folder / "adapter_model.safetensors")
    _require_finite(tensors, folder)
    set_peft_model_state_dict(model, tensors)
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    equal = {name for name in tensors.keys() & loaded.keys() if torch.equal(tensors[name].float(), loaded[name].cpu())}
    if lost := sorted((tensors.keys() | loaded.keys()) - equal):
        raise CheckFailed(f"{shown(folder)}: PEFT has not loaded {listed(lost, 1)} as saved")


def install_fused(model: PeftModel, training: TrainingConfig) -> None:
    """Install the fused paths that `training` sets to true, used in training only; a rehearsal resolves `auto` first.

    Raises CheckFailed if they cannot be compiled.
    """
    if training.fused_lora is True:
        from finetune.model import fused_lora

        fused_lora.install(model)
    if training.fused_kernels is True:
        from finetune.model import fused_kernels

        fused_kernels.install(model, training.bf16)
