"""How far a result is from another."""

from __future__ import annotations

from typing import Any

import torch


def distance(found: Any, wanted: Any) -> float:
    """Largest difference over largest value, of tensors of one shape; infinite where `found` is not finite."""
    found, wanted = found.detach().float().cpu(), wanted.detach().float().cpu()
    if not torch.isfinite(found).all():
        return float("inf")
    return float((found - wanted).abs().max() / wanted.abs().max())
