"""Distances of linear layers: NF4's rounding, a QLoRA step, a bfloat16 product."""

from __future__ import annotations

import bitsandbytes
import torch

from finetune.checks.numerics.compare import distance
from finetune.machine.platforms import quantized_on

# Rounding to NF4 in blocks of 64 loses about 9 % of a normal distribution's standard deviation (benchmarks/trials.py);
# a broken kernel loses either nothing or everything.
NF4_LOSS = (0.06, 0.13)

# Rows of a step. On an H100 bitsandbytes (0.50) multiplies up to 1,536 rows with a kernel that unpacks as it goes; for
# more it unpacks the weight first (`gemm_4bit` in its CUDA backend), as for a micro-batch.
ROWS = (16, 2048)


def nf4_loss(device: str) -> float:
    """Return the RMS error of normal weights in NF4 with double quantization, as a share of their deviation."""
    weights = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    packed, state = bitsandbytes.functional.quantize_4bit(
        weights.to(device), quant_type="nf4", compress_statistics=True
    )
    back = bitsandbytes.functional.dequantize_4bit(packed, state).float().cpu()
    return float((back - weights).square().mean().sqrt() / weights.std())


def qlora_step(device: str, dtype: torch.dtype, storage: str) -> float:
    """Compare forward, backward and one AdamW step of a LoRA pair on an NF4 layer in `storage` with fp32.

    Returns the worst distance of the new weights and of the input's gradient, over ROWS.
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(64, 128, generator=generator) * 0.02
    down, up = torch.randn(8, 128, generator=generator) * 0.1, torch.randn(64, 8, generator=generator) * 0.1
    inputs = torch.randn(max(ROWS), 128, generator=generator)
    layer = bitsandbytes.nn.Linear4bit(128, 64, bias=False, compute_dtype=dtype, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(weights.clone(), requires_grad=False, quant_type="nf4")
    layer = layer.to(quantized_on(device))
    dequantized = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().cpu()

    def plain(device: str, dtype: torch.dtype) -> torch.nn.Module:
        linear = torch.nn.Linear(128, 64, bias=False, device="meta")
        linear.weight = torch.nn.Parameter(dequantized.to(device, dtype), requires_grad=False)
        return linear

    def step(
        rows: int, base: torch.nn.Module, device: str, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        pair = [torch.nn.Parameter(values.clone().to(device)) for values in (down, up)]
        optimizer = torch.optim.AdamW(pair, lr=0.1, eps=1.0)  # a large eps: the gradient's size matters, too
        x = inputs[:rows].to(device, dtype).requires_grad_()
        output = base(x) + (x @ pair[0].to(dtype).T) @ pair[1].to(dtype).T
        output.float().square().mean().backward()
        optimizer.step()
        moved = [(after.detach().cpu() - before).flatten() for after, before in zip(pair, (down, up), strict=True)]
        return torch.cat(moved), x.grad

    base = plain(device, dtype) if storage == "expanded" else layer.to(device)
    reference = plain("cpu", torch.float32)
    distances = []
    for rows in ROWS:
        found, expected = step(rows, base, device, dtype), step(rows, reference, "cpu", torch.float32)
        distances += [distance(ours, theirs) for ours, theirs in zip(found, expected, strict=True)]
    return max(distances)


def bfloat16_product(device: str) -> float:
    """Compare a bfloat16 matrix product of [128, 512] and [512, 128] with fp32."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(128, 512, generator=generator), torch.randn(512, 128, generator=generator)
    return distance(left.to(device, torch.bfloat16) @ right.to(device, torch.bfloat16), left @ right)
