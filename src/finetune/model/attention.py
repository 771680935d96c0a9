"""torch's own variable-length attention: keeps packed rows apart without flash-attn and without a full mask.

Selected by `model.attn_implementation: torch_varlen`.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.nn.attention import varlen
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "torch_varlen"


def register() -> None:
    """Register the attention with transformers under the name torch_varlen."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int
) -> torch.Tensor:
    """Compute causal attention within each row of one flat sequence, scaled by 1 / sqrt(head_dim).

    Shapes: query and result [tokens, heads, head_dim]; key and value may have fewer heads; bounds [rows + 1], int32,
    where each row begins, and the end. `longest`: tokens of the longest row. CUDA only. The arguments depend on torch:
    2.10 has is_causal where later versions have window_size, and 2.10 and 2.11 need as many key heads as query heads.
    """
    known = _parameters(varlen.varlen_attn)
    named: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        named["enable_gqa"] = True
    else:
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    return cast(torch.Tensor, varlen.varlen_attn(query, key, value, bounds, bounds, longest, longest, **named))


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **named: Any,
) -> tuple[torch.Tensor, None]:
    """Use `attend` for a packed batch, whose row bounds TRL's collator passes, and SDPA for padded batches and replies.

    Shapes: query, key and value [1, heads, tokens, head_dim]; result [1, tokens, heads, head_dim].
    """
    bounds = named.get("cu_seq_lens_q")
    if bounds is None:
        padded: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **named)
        return padded
    factor = named["scaling"] * query.shape[-1] ** 0.5
    if not math.isclose(factor, 1):  # Mistral's is 1; torch 2.10 takes no scale of its own
        query = query * factor
    query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    return attend(query, key, value, bounds, named["max_length_q"]).unsqueeze(0), None


def _mask(*, attention_mask: torch.Tensor | None = None, **named: Any) -> torch.Tensor | None:
    """Return SDPA's mask for padded rows; None for packed ones, which have bounds instead."""
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **named)
