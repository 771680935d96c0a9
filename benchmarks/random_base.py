"""A base model of random weights, made on the device one linear layer at a time: nothing is downloaded or written."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedModel

from finetune.config import Config
from finetune.geometry import Geometry
from finetune.model import verify_base

SPREAD = 0.02  # standard deviation of the weights, as transformers initialises Mistral's


def random_base(geometry: Geometry, config: Config, device: str) -> PreTrainedModel:
    """What `finetune.model.load_base` gives, with random weights. At most one layer is there unpacked.

    `storage: expanded` skips the way through NF4: the same sizes, other values.
    """
    torch.manual_seed(0)
    dtype = getattr(torch, config.model.dtype)
    shape = MistralConfig(**vars(geometry), max_position_embeddings=32768, sliding_window=None)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(
            shape, dtype=dtype, attn_implementation=config.model.attn_implementation
        )
    packed = config.quantization.storage == "packed"
    for name, module in list(base.named_modules()):
        if isinstance(module, torch.nn.Linear):
            weight = torch.empty(module.weight.shape, dtype=dtype, device=device).normal_(std=SPREAD)
            base.set_submodule(name, _nf4(weight, config) if packed and name != "lm_head" else _plain(weight))
    for name, parameter in list(base.named_parameters()):
        if parameter.is_meta:  # embeddings, and the scales of the norms
            value = torch.ones(parameter.shape, dtype=dtype, device=device)
            module, _, key = name.rpartition(".")
            filled = torch.nn.Parameter(value if value.dim() == 1 else value.normal_(std=SPREAD), requires_grad=False)
            setattr(base.get_submodule(module), key, filled)
    base.tie_weights()
    base.model.rotary_emb = type(base.model.rotary_emb)(shape).to(device)
    base.is_loaded_in_4bit = packed  # PEFT and TRL ask for it
    verify_base(base, config.model, config.quantization, device, config.quantization.storage)
    return base.requires_grad_(False)


def _plain(weight: torch.Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return linear


def _nf4(weight: torch.Tensor, config: Config) -> Any:
    quantization = config.quantization
    linear = Linear4bit(
        weight.shape[1],
        weight.shape[0],
        bias=False,
        compute_dtype=getattr(torch, quantization.bnb_4bit_compute_dtype),
        device="meta",
    )
    linear.weight = Params4bit(
        weight,
        requires_grad=False,
        compress_statistics=quantization.bnb_4bit_use_double_quant,
        quant_type=quantization.bnb_4bit_quant_type,
        module=linear,
    ).to(weight.device)  # which packs it
    linear.support_avx512bf16_for_cpu = False  # as load_base
    return linear
