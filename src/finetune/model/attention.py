"""torch's own variable-length attention: packed rows apart, without flash-attn and without a mask of all their tokens.

It is `model.attn_implementation: torch_varlen`.
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
    """Let transformers load a model with `attn_implementation` torch_varlen."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int
) -> torch.Tensor:
    """Causal attention within each row of one flat sequence, its scores divided by the square root of head_dim.

    Shapes: query and result [tokens, heads, head_dim]; key and value may have fewer heads; bounds [rows + 1], int32,
    where each row begins, and the end. `longest` row in tokens. CUDA only. The arguments are those that the installed
    torch has: 2.10 says is_causal where later ones have window_size, and it and 2.11 do not take fewer heads of keys.
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
    """`attend` for a batch that says where its rows begin, as TRL's collator does; SDPA for padded ones and replies.

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
    """SDPA's mask for padded rows; none for packed ones, whose bounds say the same."""
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **named)
