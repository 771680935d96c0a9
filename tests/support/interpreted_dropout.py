"""Prints what fused_dropout's kernels give, as JSON; TRITON_INTERPRET=1 has to be set before Triton is imported.

Relative distances from torch's own operations under the same noise, which is read off the kernel by an A of ones on its
diagonal; the share that it keeps, also of neighbors both; and whether layers computed again give the same bits.
"""

from __future__ import annotations

import json

import torch
from torch.utils.checkpoint import checkpoint

from finetune.model import fused_dropout, fused_lora

TOKENS, INPUTS, OUTPUTS, SCALING = 150, 136, 24, 2.0  # no multiple of a tile
CAME = torch.randn(TOKENS, OUTPUTS, generator=torch.Generator().manual_seed(2))
fused_dropout.CHUNK = 64  # three chunks


def noise(probability: float, seed: int) -> torch.Tensor:
    """1 where x is kept."""
    return fused_dropout.reduce(torch.ones(TOKENS, INPUTS), torch.eye(INPUTS), (probability, seed))


def outcome(base: torch.nn.Linear, leaves: list[torch.Tensor], probability: float, again: bool) -> list[torch.Tensor]:
    """y and the gradients of x, A and B."""
    torch.manual_seed(7)
    x, a, b = leaves
    arguments = x.view(2, -1, INPUTS), a, b, base, (SCALING, probability), fused_dropout
    adapted = fused_lora._AdaptedLinear.apply
    y = checkpoint(adapted, *arguments, use_reentrant=False) if again else adapted(*arguments)
    y = y.view(TOKENS, OUTPUTS)
    return [y, *torch.autograd.grad((y * CAME).sum(), leaves)]


def reference(base: torch.nn.Linear, leaves: list[torch.Tensor], probability: float) -> list[torch.Tensor]:
    torch.manual_seed(7)
    seed = int(torch.randint(2**62, ())) if probability else 0
    x, a, b = leaves
    dropped = x * noise(probability, seed) / (1 - probability)
    y = base(x) + SCALING * (dropped @ a.T @ b.T)
    return [y, *torch.autograd.grad((y * CAME).sum(), leaves)]


def found(rank: int, probability: float) -> dict[str, object]:
    torch.manual_seed(1)
    base = torch.nn.Linear(INPUTS, OUTPUTS).requires_grad_(False)
    leaves = [torch.randn(shape).requires_grad_() for shape in ((TOKENS, INPUTS), (rank, INPUTS), (OUTPUTS, rank))]
    once, again, wanted = (
        outcome(base, leaves, probability, False),
        outcome(base, leaves, probability, True),
        reference(base, leaves, probability),
    )
    first, other = noise(probability, 3), noise(probability, 2**40 + 3)
    return {
        "distance": max(float((a - b).norm() / b.norm()) for a, b in zip(once, wanted, strict=True)),
        "again": all(map(torch.equal, once, again)),
        "values": sorted(set(first.unique().tolist())),
        "kept": float(first.mean()),
        "both": [float((first[:, 1:] * first[:, :-1]).mean()), float((first[1:] * first[:-1]).mean())],
        "another seed": float((first * other).mean()),
    }


print(json.dumps([found(rank, probability) for rank, probability in ((16, 0.3), (8, 0.05), (16, 0.0))]))
