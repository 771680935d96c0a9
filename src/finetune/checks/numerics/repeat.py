"""Compares the bits of repeated computations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import MistralConfig, MistralForCausalLM

from finetune.config.schema import Config
from finetune.model.attention import register
from finetune.model.lora import add_lora

# A layer of Mistral-7B over two packed documents: large enough that a GPU divides its sums among blocks.
SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
DOCUMENTS = (1500, 2596)
PASSES = 4

Compute = Callable[[torch.Tensor], torch.Tensor]


def differing(config: Config, device: str) -> list[str]:
    """Return the names of results that differ among PASSES equal forward and backward passes.

    Results are the output and the gradients of input and LoRA weights, of attention with its projections and of a
    decoder layer, with the config's attention, dtype and LoRA on random unquantized weights. Raises ImportError if that
    attention is not installed.
    """
    register()
    shape = MistralConfig(
        **SHAPE, vocab_size=8, num_hidden_layers=1, attn_implementation=config.model.attn_implementation
    )
    with torch.device(device):
        base = MistralForCausalLM(shape).to(getattr(torch, config.model.dtype))
        inputs = torch.randn(1, sum(DOCUMENTS), shape.hidden_size, dtype=base.dtype)
        positions = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
        bounds = torch.tensor([0, DOCUMENTS[0], sum(DOCUMENTS)], dtype=torch.int32)
    ends = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": max(DOCUMENTS)}
    packed = ends | {"max_length_k": max(DOCUMENTS), "position_ids": positions, "use_cache": False}
    add_lora(base, config.lora, seed=0).train()
    for name, parameter in base.named_parameters():
        if "lora_B" in name:  # 0 at first, which passes no gradient on
            torch.nn.init.normal_(parameter, std=0.02)

    attention, asked = base.model.layers[0].self_attn, {}
    attention.register_forward_pre_hook(lambda *call: asked.update(call[2]), with_kwargs=True)

    def layer(x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = base.model(inputs_embeds=x, **packed).last_hidden_state
        return found

    def attention_alone(x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = attention(**{**asked, "hidden_states": x})[0]
        return found

    with torch.autocast(device, torch.bfloat16, enabled=config.training.bf16):
        of_the_layer = _unequal(base, layer, inputs)
        of_attention = _unequal(base, attention_alone, inputs)
    return [*(f"attention's {name}" for name in of_attention), *(f"the layer's {name}" for name in of_the_layer)]


def _unequal(base: torch.nn.Module, compute: Compute, inputs: torch.Tensor) -> list[str]:
    """Return the names of the results of `compute` that differ among PASSES passes."""
    first, *others = (_results(base, compute, inputs) for _ in range(PASSES))
    return [name for name in first if not all(torch.equal(first[name], other[name]) for other in others)]


def _results(base: torch.nn.Module, compute: Compute, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return output and gradients of one pass, by name; dropout's masks are the same in each."""
    torch.manual_seed(0)
    base.zero_grad()
    x = inputs.clone().requires_grad_()
    output = compute(x)
    torch.autograd.backward(output, inputs.to(output.dtype))
    named = [(".".join(name.split(".")[-4:-2]), parameter.grad) for name, parameter in base.named_parameters()]
    gradients = {f"gradient of {name}": gradient for name, gradient in [("the input", x.grad), *named]}
    found = {"output": output.detach(), **gradients}
    return {name: tensor for name, tensor in found.items() if tensor is not None}
