"""PEFT's LoRA layers in training, with less kept for the backward pass and less copied on the way.

For each adapted layer, PEFT keeps the input after the cast and after dropout, and dropout's noise. This path keeps the
layer's input unchanged, which layers that read the same tensor share, and generates the noise again from a seed.
Weights and their names are PEFT's, so a saved adapter is a plain PEFT adapter. Results equal PEFT's up to rounding. The
noise has the same distribution but other values, and others again on an NVIDIA GPU (`fused_dropout`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch.autograd.function import once_differentiable

from finetune.errors import CheckFailed
from finetune.machine.platforms import PLATFORMS
from finetune.plan.memory import NOISE_TOKENS
from finetune.wording import first_line

TURN_OFF = "to train without it: --set training.fused_lora=false"


def install(model: PeftModel) -> None:
    """Make every LoRA layer of `model` use the fused path in training; otherwise it computes as PEFT does.

    Compiles Triton's kernels now rather than in the first step. Raises CheckFailed if that fails.
    """
    products = _products(model)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.forward = partial(_forward, module, module.forward, products)


def _products(model: PeftModel) -> Any:
    """Return the module with `reduce` and `gradients` for the device of `model`."""
    if not any(row.nvidia for row in PLATFORMS.values() if row.device == model.device.type):
        return sys.modules[__name__]
    try:
        from finetune.model import fused_dropout

        x, noise = torch.zeros(16, 16, dtype=model.dtype, device=model.device), (0.5, 2**61)  # compiled as for a layer
        fused_dropout.gradients(x, fused_dropout.reduce(x, x, noise), x, x, noise)
    except Exception as error:  # noqa: BLE001  # of Triton, compiler, headers, driver or disk
        found = f"fused LoRA: Triton's kernels cannot be compiled: {first_line(error)}"
        raise CheckFailed(found, TURN_OFF, between="\n") from None
    return fused_dropout


def _forward(
    layer: Any, peft_forward: Callable[[torch.Tensor], torch.Tensor], products: Any, x: torch.Tensor
) -> torch.Tensor:
    if not layer.training or layer.disable_adapters:
        return peft_forward(x)
    (name,) = layer.active_adapters
    weights = layer.lora_A[name].weight, layer.lora_B[name].weight
    probability = getattr(layer.lora_dropout[name], "p", 0.0)  # without dropout PEFT has an Identity there
    adapted: Callable[..., torch.Tensor] = _AdaptedLinear.apply
    return adapted(x, *weights, layer.base_layer, (layer.scaling[name], probability), products)


class _AdaptedLinear(torch.autograd.Function):
    """y = base(x) + scaling * dropout(x) A' B', with A [r, inputs], B [outputs, r] in float32, x [..., inputs].

    The base is part of the function, so its result and gradient are added to in place: neither pass allocates a second
    tensor of that size. All products are in x's dtype. Dropout multiplies by 0 or 1; its 1 / (1 - p) is part of
    `scale`, which is applied inside the products with B, or to B. `factors`: scaling and p; `products`: a module with
    `reduce` and `gradients`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        base: Any,
        factors: tuple[float, float],
        products: Any,
    ) -> torch.Tensor:
        scaling, probability = factors
        ctx.base, ctx.products, ctx.scale = base, products, scaling / (1 - probability)
        # The CPU's random numbers are in every checkpoint, and recomputation draws them again, on whatever device.
        ctx.noise = probability, int(torch.randint(2**62, ())) if probability else 0
        y: torch.Tensor = base(x)
        reduced = products.reduce(x.reshape(-1, x.shape[-1]), a.to(x.dtype), ctx.noise)
        y.view(-1, y.shape[-1]).addmm_(reduced, b.to(x.dtype).T, alpha=ctx.scale)
        ctx.save_for_backward(x, reduced, a, b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, reduced, a, b = ctx.saved_tensors
        flat_x, gradient = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        of_b = (gradient.T @ reduced).to(b.dtype).mul_(ctx.scale)
        of_reduced = gradient @ (b * ctx.scale).to(x.dtype)
        of_x = gradient @ _weight(ctx.base).to(x.dtype) if ctx.needs_input_grad[0] else None
        del gradient
        of_a = ctx.products.gradients(flat_x, of_reduced, a.to(x.dtype), of_x, ctx.noise)
        return None if of_x is None else of_x.view(x.shape), of_a, of_b, None, None, None


def reduce(x: torch.Tensor, down: torch.Tensor, noise: tuple[float, int]) -> torch.Tensor:
    """Return dropout(x) A' without the factor 1 / (1 - p), [tokens, r].

    x [tokens, inputs]; `down` is A [r, inputs]; `noise` is (p, seed).
    """
    reduced = x.new_empty(len(x), len(down))
    for rows, mask in _masks(x, *noise):
        seen = x[rows] if mask is None else mask.mul_(x[rows])
        torch.mm(seen, down.T, out=reduced[rows])
    return reduced


def gradients(
    x: torch.Tensor, of_reduced: torch.Tensor, down: torch.Tensor, of_x: torch.Tensor | None, noise: tuple[float, int]
) -> torch.Tensor:
    """Return A's gradient [r, inputs] in float32 from the gradient of the result of `reduce`.

    Adds x's gradient to `of_x`, unless that is None.
    """
    of_a = torch.zeros_like(down, dtype=torch.float32)
    for rows, mask in _masks(x, *noise):
        if of_x is not None:
            _add(of_x[rows], of_reduced[rows], down, mask)
        seen = x[rows] if mask is None else mask.mul_(x[rows])
        of_a += of_reduced[rows].T @ seen
    return of_a


def _add(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Add left @ right to `total` where the mask is 1."""
    if mask is None:
        total.addmm_(left, right)
    else:
        total.addcmul_(left @ right, mask)


def _weight(base: Any) -> torch.Tensor:
    """Return the layer's weight, unpacked, [outputs, inputs]."""
    weight: torch.Tensor = base.weight
    if isinstance(base, Linear4bit):
        weight = dequantize_4bit(weight.data, base.weight.quant_state)
    return weight


def _masks(x: torch.Tensor, probability: float, seed: int) -> Iterator[tuple[slice, torch.Tensor | None]]:
    """Yield slices of the tokens of x [tokens, inputs], each with dropout's mask of 0 and 1, fixed by the seed.

    If the probability is 0: one slice of all tokens, without a mask.
    """
    if probability == 0:
        yield slice(None), None
        return
    generator = torch.Generator(x.device).manual_seed(seed)
    for start in range(0, len(x), NOISE_TOKENS):
        rows = slice(start, start + NOISE_TOKENS)
        yield rows, torch.empty_like(x[rows]).bernoulli_(1 - probability, generator=generator)
