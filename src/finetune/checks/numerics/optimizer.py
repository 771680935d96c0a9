"""Distances of the optimizers that a config may name."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch

from finetune.checks.numerics.compare import distance


def optimizer_step(name: str, device: str) -> float:
    """Compare the movement of three steps of optimizer `name` with that of torch's AdamW in fp32."""
    shape = (400, 256)  # bitsandbytes pages 100,000 values or more, and keeps fewer than 4,096 in 32 bits
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    gradient = signs * (0.5 + torch.rand(shape, generator=generator))  # none near 0, which 8 bits cannot represent

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
