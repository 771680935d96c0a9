"""Verifies that the loaded base is what the config asks for: every parameter and linear layer."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import bitsandbytes
import torch
from transformers import (
    PreTrainedModel,
)

from finetune.config.schema import ModelConfig, QuantizationConfig
from finetune.errors import CheckFailed
from finetune.wording import first_line, lines


def verify_base(
    base: PreTrainedModel, model: ModelConfig, quantization: QuantizationConfig, device: str, storage: str
) -> None:
    """Compare every parameter and linear layer with the config. Raises CheckFailed listing all differences.

    `storage` is the expected state of the layers: packed, as after loading, or expanded.
    """
    problems = [
        f"{name} is on {parameter.device.type}, expected {device}"
        for name, parameter in base.named_parameters()
        if parameter.device.type != device
    ]
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear):
            packed = storage == "packed" and name != "lm_head"  # the output layer is never quantized
            expected_class = bitsandbytes.nn.Linear4bit if packed else torch.nn.Linear
            if type(module) is not expected_class:
                problems.append(f"{name} is {type(module).__name__}, expected {expected_class.__name__}")
            elif packed:
                problems += _packed_problems(name, module, quantization)
    problems += [
        f"{name} has dtype {str(parameter.dtype).removeprefix('torch.')}, expected {model.dtype}"
        for name, parameter in base.named_parameters()
        if not isinstance(parameter, bitsandbytes.nn.Params4bit) and parameter.dtype != getattr(torch, model.dtype)
    ]
    attention = base.config._attn_implementation
    if attention != model.attn_implementation:
        problems.append(f"attention is {attention}, expected {model.attn_implementation}")
    if problems:
        raise CheckFailed(f"model: not loaded as the config asks\n{lines(problems, 10)}")


def _packed_problems(name: str, module: Any, expected: QuantizationConfig) -> list[str]:
    state = module.weight.quant_state
    if state is None:
        return [f"{name} is not quantized, expected {expected.bnb_4bit_quant_type}"]
    found = {
        "bnb_4bit_quant_type": state.quant_type,
        "bnb_4bit_use_double_quant": state.nested,
        "bnb_4bit_compute_dtype": str(module.compute_dtype).removeprefix("torch."),
    }
    return [
        f"{name} has {key} {value}, expected {getattr(expected, key)}"
        for key, value in found.items()
        if value != getattr(expected, key)
    ]


def why_not_compiled(device: str) -> str | None:
    """Return why `device` unpacks NF4 without torch.compile; None if it compiles. bitsandbytes does not say so itself.

    For a device without its own kernels, bitsandbytes (0.50, `_try_torch_compile` in backends/default) wraps the
    computation in torch.compile and, after any error, calls it uncompiled. This unpacks one block of 64 values through
    the same wrapper and records whether it ran as plain Python, and after which error.
    """
    from bitsandbytes.backends.default import ops

    plain, errors = inspect.unwrap(ops._dequantize_4bit_compute), []

    def unpack(*arguments: Any) -> Any:
        if not torch.compiler.is_compiling():
            errors.append(sys.exc_info()[1])
        return plain(*arguments)

    packed, scale, code = torch.zeros(32, dtype=torch.uint8), torch.ones(1), torch.zeros(16)
    tried = ops._try_torch_compile(unpack, dynamic=False)
    tried(packed.to(device), scale.to(device), code.to(device), 64, (1, 64), torch.float32)
    return None if not errors else first_line(errors[0]) if errors[0] else "it is switched off"
