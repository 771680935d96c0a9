"""Small computations that show whether the libraries compute what they should on a device.

Each returns how far the result is from the same arithmetic in fp32 on the CPU, as the largest difference divided by the
largest value: 0 is equal, 1 is noise.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch
from torch.nn.functional import scaled_dot_product_attention

from finetune.machine.platforms import quantised_on

# Rounding to NF4 in blocks of 64 loses about 9 % of a normal distribution's standard deviation (benchmarks/trials.py);
# a broken kernel loses either nothing or everything.
NF4_LOSS = (0.06, 0.13)


def distance(found: Any, wanted: Any) -> float:
    """Largest difference over largest value, of tensors of one shape; infinite where `found` is not finite."""
    found, wanted = found.detach().float().cpu(), wanted.detach().float().cpu()
    if not torch.isfinite(found).all():
        return float("inf")
    return float((found - wanted).abs().max() / wanted.abs().max())


def nf4_loss(device: str) -> float:
    """Root mean square of what NF4 with double quantisation loses of normal weights, as a share of their deviation."""
    weights = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    packed, state = bitsandbytes.functional.quantize_4bit(
        weights.to(device), quant_type="nf4", compress_statistics=True
    )
    back = bitsandbytes.functional.dequantize_4bit(packed, state).float().cpu()
    return float((back - weights).square().mean().sqrt() / weights.std())


def qlora_step(device: str, dtype: torch.dtype, storage: str) -> float:
    """Forward, backward and one AdamW step of a LoRA pair beside one NF4 layer, held as `storage` says.

    The worse distance of two: the stepped weights, and the gradient of the input, which goes through that layer.
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(64, 128, generator=generator) * 0.02
    inputs = torch.randn(16, 128, generator=generator)
    down, up = torch.randn(8, 128, generator=generator) * 0.1, torch.randn(64, 8, generator=generator) * 0.1
    layer = bitsandbytes.nn.Linear4bit(128, 64, bias=False, compute_dtype=dtype, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(weights.clone(), requires_grad=False, quant_type="nf4")
    layer = layer.to(quantised_on(device, storage))
    dequantised = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().cpu()

    def plain(device: str, dtype: torch.dtype) -> torch.nn.Module:
        linear = torch.nn.Linear(128, 64, bias=False, device="meta")
        linear.weight = torch.nn.Parameter(dequantised.to(device, dtype), requires_grad=False)
        return linear

    def step(base: torch.nn.Module, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        pair = [torch.nn.Parameter(values.clone().to(device)) for values in (down, up)]
        optimizer = torch.optim.AdamW(pair, lr=0.1, eps=1.0)  # a large eps: the step follows the gradient's size too
        x = inputs.to(device, dtype).requires_grad_()
        output = base(x) + (x @ pair[0].to(dtype).T) @ pair[1].to(dtype).T
        output.float().square().mean().backward()
        optimizer.step()
        moved = [(after.detach().cpu() - before).flatten() for after, before in zip(pair, (down, up), strict=True)]
        return torch.cat(moved), x.grad

    base = plain(device, dtype) if storage == "expanded" else layer
    found, wanted = step(base, device, dtype), step(plain("cpu", torch.float32), "cpu", torch.float32)
    return max(distance(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


def bfloat16_product(device: str) -> float:
    """A bfloat16 matrix product of [128, 512] and [512, 128]."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(128, 512, generator=generator), torch.randn(512, 128, generator=generator)
    return distance(left.to(device, torch.bfloat16) @ right.to(device, torch.bfloat16), left @ right)


def optimizer_step(name: str, device: str) -> float:
    """Three steps of the optimizer that the config names, against torch's AdamW in fp32: distance of the movement."""
    shape = (400, 256)  # bitsandbytes pages from 100,000 values on, and keeps less than 4,096 in 32 bits
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    gradient = signs * (0.5 + torch.rand(shape, generator=generator))  # none near 0, which 8 bits cannot hold

    def move(make: type[torch.optim.Optimizer], device: str, **options: Any) -> torch.Tensor:
        weights = torch.nn.Parameter(start.clone().to(device))
        optimizer = make([weights], lr=0.01, weight_decay=0.0, **options)  # type: ignore[call-arg]
        for step in range(3):
            weights.grad = (gradient * (step + 1)).to(device)
            optimizer.step()
        return weights.detach().cpu() - start

    made: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
        "paged_adamw_32bit": (bitsandbytes.optim.PagedAdamW32bit, {}),
        "paged_adamw_8bit": (bitsandbytes.optim.PagedAdamW8bit, {}),
        "adamw_torch_fused": (torch.optim.AdamW, {"fused": True}),
        "adamw_torch": (torch.optim.AdamW, {}),
    }
    make, options = made[name]
    return distance(move(make, device, **options), move(torch.optim.AdamW, "cpu"))


def flash_attention(device: str) -> float:
    """flash-attn over two packed documents, forward and backward, against torch's attention over each alone.

    Mistral's head dimension (128) and grouped heads (4 of queries to 1 of keys), in bfloat16; the worst of the output's
    and the three gradients' distances. Raises ImportError where flash-attn is not installed.
    """
    from flash_attn import flash_attn_varlen_func

    lengths = [48, 80]
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(lengths), 4, 128), (sum(lengths), 1, 128), (sum(lengths), 1, 128))
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    upstream = torch.randn(shapes[0], generator=generator)

    packed = [value.to(device, torch.bfloat16).requires_grad_() for value in values]
    bounds = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32, device=device)
    output = flash_attn_varlen_func(*packed, bounds, bounds, max(lengths), max(lengths), causal=True)
    output.backward(upstream.to(device, torch.bfloat16))

    plain = [value.clone().requires_grad_() for value in values]
    parts = []
    for document in zip(*(torch.split(value, lengths) for value in plain), strict=True):
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in document)  # [1, heads, tokens, 128]
        attended = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        parts.append(attended[0].transpose(0, 1))
    reference = torch.cat(parts)
    torch.autograd.backward(reference, upstream)
    gradients = [distance(ours.grad, theirs.grad) for ours, theirs in zip(packed, plain, strict=True)]
    return max(distance(output, reference), *gradients)
