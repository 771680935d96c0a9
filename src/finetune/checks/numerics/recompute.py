"""The distance of gradients through layers that are recomputed in the backward pass."""

from __future__ import annotations

import torch
from transformers import MistralConfig, MistralForCausalLM

from finetune.checks.numerics.compare import distance
from finetune.config.schema import LoraConfig
from finetune.machine.device import random_state, set_random_state
from finetune.machine.platforms import Platform
from finetune.model.lora import add_lora
from finetune.training.recompute import checkpoint_first

LAYERS = 2


def recomputed_gradient(platform: Platform, lora: LoraConfig) -> float:
    """Compare the gradients of `lora` on a small random Mistral with all layers recomputed and with none.

    Both in fp32 on the platform's device, from the same random state; 0 if dropout has the same masks.
    """
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128}
    shape = MistralConfig(**sizes, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    base = MistralForCausalLM(shape).to(platform.device)
    model = add_lora(base, lora, seed=0).train()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = torch.arange(48, device=platform.device).reshape(2, 24)
    start, gradients = random_state(platform), []
    for layers in (0, LAYERS):
        checkpoint_first(base.model.layers, layers, platform)
        set_random_state(platform, start)
        model.zero_grad()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        trained = [parameter.grad.flatten() for parameter in model.parameters() if parameter.requires_grad]
        gradients.append(torch.cat(trained))
    kept, again = gradients
    return distance(again, kept)
