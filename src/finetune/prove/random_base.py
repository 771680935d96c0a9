"""Creates a Mistral with random weights on the device, without files or downloads, quantizing layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from finetune.config.schema import Config
from finetune.machine.platforms import Platform
from finetune.model import attention
from finetune.model.load import expand, nf4_config
from finetune.model.verify import verify_base
from finetune.plan.model_shape import Geometry

SEED = 0  # of the weights


def make_base(config: Config, geometry: Geometry, platform: Platform) -> PreTrainedModel:
    """Return a frozen base like model/load.py's load_base, with random weights that are the same on every call."""
    attention.register()
    dtype = getattr(torch, config.model.dtype)
    quantizer = AutoHfQuantizer.from_config(nf4_config(config.quantization))
    shape = _shape(geometry, attn_implementation=config.model.attn_implementation)
    with torch.device("meta"):
        base = MistralForCausalLM(shape).to(dtype)
    quantizer.preprocess_model(model=base, device_map={"": platform.device})
    for number, (name, parameter) in enumerate(list(base.named_parameters())):
        owner, _, attribute = name.rpartition(".")
        setattr(base.get_submodule(owner), attribute, _random(parameter, number, dtype, platform.device))
    base.tie_weights()
    base.model.rotary_emb = type(base.model.rotary_emb)(shape).to(platform.device)  # its table is no parameter
    base.hf_quantizer = quantizer
    quantizer.postprocess_model(base)
    for module in base.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # as load_base
    if config.quantization.storage == "expanded":
        expand(base, dtype, platform.device)
    verify_base(base, config.model, config.quantization, platform.device, config.quantization.storage)
    return base


def save_base(folder: Path, geometry: Geometry) -> None:
    """Save a base with random weights in `folder`; without a tokenizer, so Mistral's is used."""
    torch.manual_seed(SEED)
    MistralForCausalLM(_shape(geometry)).to(torch.bfloat16).save_pretrained(folder)


def _shape(geometry: Geometry, **more: Any) -> MistralConfig:
    return MistralConfig(**vars(geometry), max_position_embeddings=32768, sliding_window=None, **more)


def _random(parameter: Any, number: int, dtype: torch.dtype, device: str) -> torch.nn.Parameter:
    """Return weights to replace `parameter`: quantized if it is bitsandbytes', ones if it is a norm's."""
    if parameter.dim() == 1:
        return torch.nn.Parameter(torch.ones(parameter.shape, dtype=dtype, device=device), requires_grad=False)
    generator = torch.Generator(device).manual_seed(SEED + number)
    # bf16 first, so that the values do not depend on the platform's dtype
    value = torch.randn(parameter.shape, dtype=torch.bfloat16, device=device, generator=generator).mul_(0.02).to(dtype)
    if isinstance(parameter, bitsandbytes.nn.Params4bit):
        unpacked = bitsandbytes.nn.Params4bit(value, requires_grad=False, **parameter.__dict__)
        packed: torch.nn.Parameter = unpacked.to(device)  # this quantizes it
        return packed
    return torch.nn.Parameter(value, requires_grad=False)
