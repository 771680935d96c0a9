"""What flash_attn_varlen_func computes, by torch's own attention on a CPU: right, and wrong in known ways."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention


def attention(q: Any, k: Any, v: Any, causal: bool = True) -> Any:
    """Over one sequence, [tokens, heads, dimension], in fp32."""
    q, k, v = (value.float().transpose(0, 1)[None] for value in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)[0].transpose(0, 1)


def by_document(q: Any, k: Any, v: Any, bounds: Any, *_: Any, causal: bool) -> Any:
    """Each document sees itself alone, as it should be."""
    lengths = torch.diff(bounds).tolist()
    documents = zip(*(torch.split(value, lengths) for value in (q, k, v)), strict=True)
    return torch.cat([attention(*document, causal=causal) for document in documents]).to(q.dtype)


def across_documents(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> Any:
    """Documents see those before them, as with a build that ignores the bounds."""
    return attention(q, k, v).to(q.dtype)


def install_flash_attn(patch: pytest.MonkeyPatch, function: Callable[..., Any] | None) -> None:
    """A module flash_attn with this function; None: it is not installed."""
    module: Any = None
    if function is not None:
        module = ModuleType("flash_attn")
        module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
        module.flash_attn_varlen_func = function
    patch.setitem(sys.modules, "flash_attn", module)


class Deaf(torch.autograd.Function):
    """Its input forward, and no gradient backward."""

    @staticmethod
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(gradient)
