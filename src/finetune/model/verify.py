"""Proof that what was asked for is what was loaded: every parameter and linear layer of the base against the config."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch
from transformers import (
    PreTrainedModel,
)

from finetune.config.schema import ModelConfig, QuantizationConfig
from finetune.errors import CheckFailed
from finetune.wording import lines


def verify_base(
    base: PreTrainedModel, model: ModelConfig, quantization: QuantizationConfig, device: str, storage: str
) -> None:
    """Compare every parameter and linear layer with the config; a silent downgrade raises CheckFailed naming it.

    `storage` is what the layers should be by now: packed, as they are loaded, or expanded.
    """
    problems = [
        f"{name} is on {parameter.device.type}, wanted {device}"
        for name, parameter in base.named_parameters()
        if parameter.device.type != device
    ]
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear):
            packed = storage == "packed" and name != "lm_head"  # the output layer is never quantised
            wanted_class = bitsandbytes.nn.Linear4bit if packed else torch.nn.Linear
            if type(module) is not wanted_class:
                problems.append(f"{name} is {type(module).__name__}, wanted {wanted_class.__name__}")
            elif packed:
                problems += _packed_problems(name, module, quantization)
    problems += [
        f"{name} has dtype {str(parameter.dtype).removeprefix('torch.')}, wanted {model.dtype}"
        for name, parameter in base.named_parameters()
        if not isinstance(parameter, bitsandbytes.nn.Params4bit) and parameter.dtype != getattr(torch, model.dtype)
    ]
    attention = base.config._attn_implementation
    if attention != model.attn_implementation:
        problems.append(f"attention is {attention}, wanted {model.attn_implementation}")
    if problems:
        raise CheckFailed(f"model: not loaded as the config asks\n{lines(problems, 10)}")


def _packed_problems(name: str, module: Any, wanted: QuantizationConfig) -> list[str]:
    state = module.weight.quant_state
    if state is None:
        return [f"{name} is not quantised, wanted {wanted.bnb_4bit_quant_type}"]
    found = {
        "bnb_4bit_quant_type": state.quant_type,
        "bnb_4bit_use_double_quant": state.nested,
        "bnb_4bit_compute_dtype": str(module.compute_dtype).removeprefix("torch."),
    }
    return [
        f"{name} has {key} {value}, wanted {getattr(wanted, key)}"
        for key, value in found.items()
        if value != getattr(wanted, key)
    ]
