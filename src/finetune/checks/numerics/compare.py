"""The distance between two results."""

from __future__ import annotations

from typing import Any

import torch


def distance(found: Any, expected: Any) -> float:
    """Return the largest difference of two tensors, divided by the largest value; infinite if `found` is not finite."""
    found, expected = found.detach().float().cpu(), expected.detach().float().cpu()
    if not torch.isfinite(found).all():
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max())
