"""PEFT's LoRA layers in training, with less kept for the backward pass and less copied on the way.

PEFT keeps, for each adapted layer, its input after the cast and after dropout, and dropout's noise. Here the layer's
input is kept as it is, so that layers which read the same tensor share it, and noise is made again from a seed. Weights
and their names stay PEFT's: what is saved is a plain PEFT adapter. The numbers are PEFT's up to rounding, the noise has
the same distribution, but it is other noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch.autograd.function import once_differentiable

from finetune.plan.memory import NOISE_TOKENS


def install(model: PeftModel) -> None:
    """Let every LoRA layer of `model` compute so in training; PEFT's own way stays for everything else."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.forward = partial(_forward, module, module.forward)


def _forward(layer: Any, peft_forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    if not layer.training or layer.disable_adapters:
        return peft_forward(x)
    (name,) = layer.active_adapters
    weights = layer.lora_A[name].weight, layer.lora_B[name].weight
    probability = getattr(layer.lora_dropout[name], "p", 0.0)  # without dropout PEFT has an Identity there
    adapted: Callable[..., torch.Tensor] = _AdaptedLinear.apply
    return adapted(x, *weights, layer.base_layer, layer.scaling[name], probability)


class _AdaptedLinear(torch.autograd.Function):
    """y = base(x) + scaling * dropout(x) A' B', with A [r, inputs], B [outputs, r] in float32, x [..., inputs].

    The base is in here, too, because then its result and its gradient can be added to in place: neither pass makes a
    second tensor of their size. All products are in x's dtype. Dropout multiplies by 0 or 1; its 1 / (1 - p) is part of
    `scale`, which is applied inside the products or to something with r columns.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, base: Any, scaling: float, probability: float
    ) -> torch.Tensor:
        ctx.base, ctx.probability, ctx.scale = base, probability, scaling / (1 - probability)
        # The CPU's random numbers are in every checkpoint, and recomputation draws them again, on whatever device.
        ctx.seed = int(torch.randint(2**62, ())) if probability else 0
        y: torch.Tensor = base(x)
        flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        reduced = x.new_empty(len(flat_x), len(a))  # [tokens, r]
        down, up = a.to(x.dtype), b.to(x.dtype)
        for rows, mask in _masks(flat_x, probability, ctx.seed):
            seen = flat_x[rows] if mask is None else mask.mul_(flat_x[rows])
            torch.mm(seen, down.T, out=reduced[rows])
        flat_y.addmm_(reduced, up.T, alpha=ctx.scale)
        ctx.save_for_backward(x, reduced, a, b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, reduced, a, b = ctx.saved_tensors
        flat_x, gradient = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        down = a.to(x.dtype)
        of_b = (gradient.T @ reduced).to(b.dtype).mul_(ctx.scale)
        of_reduced = gradient @ b.to(x.dtype)  # [tokens, r], without `scale`
        of_a = torch.zeros_like(a)
        of_x = gradient @ _weight(ctx.base).to(x.dtype) if ctx.needs_input_grad[0] else None
        del gradient
        for rows, mask in _masks(flat_x, ctx.probability, ctx.seed):
            if of_x is not None:
                _add(of_x[rows], of_reduced[rows], down, mask, ctx.scale)
            seen = flat_x[rows] if mask is None else mask.mul_(flat_x[rows])
            of_a += of_reduced[rows].T @ seen
        of_a *= ctx.scale
        return None if of_x is None else of_x.view(x.shape), of_a, of_b, None, None, None


def _add(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, mask: torch.Tensor | None, scale: float) -> None:
    """total += scale * (left @ right), where the mask lets it through."""
    if mask is None:
        total.addmm_(left, right, alpha=scale)
    else:
        total.addcmul_(left @ right, mask, value=scale)


def _weight(base: Any) -> torch.Tensor:
    """[outputs, inputs], as the backward pass of a linear layer needs it."""
    weight: torch.Tensor = base.weight
    if isinstance(base, Linear4bit):
        weight = dequantize_4bit(weight.data, base.weight.quant_state)
    return weight


def _masks(x: torch.Tensor, probability: float, seed: int) -> Iterator[tuple[slice, torch.Tensor | None]]:
    """Parts of the tokens of x [tokens, inputs], and what dropout multiplies each by: 0 or 1, the same for a seed.

    One part and no mask where the probability is 0.
    """
    if probability == 0:
        yield slice(None), None
        return
    generator = torch.Generator(x.device).manual_seed(seed)
    for start in range(0, len(x), NOISE_TOKENS):
        rows = slice(start, start + NOISE_TOKENS)
        yield rows, torch.empty_like(x[rows]).bernoulli_(1 - probability, generator=generator)
