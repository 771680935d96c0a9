"""torch's own attention over packed rows, for a GPU without flash-attn: no mask of tokens x tokens is ever made."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

NAME = "varlen"


def use(base: PreTrainedModel) -> None:
    """Let `base` attend by `packed_attention`. Every batch must be packed, with cu_seq_lens as TRL's collator gives."""
    AttentionInterface.register(NAME, packed_attention)
    base.set_attn_implementation(NAME)


def packed_attention(
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _attention_mask: Any,
    *,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    **_named: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row of one flat sequence.

    Shapes: query [1, heads, tokens, head_dim], key and value with fewer heads; cu_seq_lens_q [rows + 1], where each row
    begins, and the end; result [1, tokens, heads, head_dim]. Called as torch 2.11 and later have it.
    """
    queries, keys, values = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    causal = (-1, 0)  # all that came before, nothing that comes after
    begins, longest = cu_seq_lens_q, max_length_q
    found: Any = varlen_attn(
        queries, keys, values, begins, begins, longest, longest, scale=scaling, window_size=causal, enable_gqa=True
    )
    return found.unsqueeze(0), None
