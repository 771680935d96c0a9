"""Distances of attention, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from finetune.checks.numerics.compare import distance


def sdpa(device: str, dtype: torch.dtype) -> float:
    """Compare torch's attention, as transformers calls it, with softmax(q k / sqrt(d)) v in fp32, over one sequence.

    Causal and with a block mask of two documents, with and without a gradient, as torch may use different kernels;
    Mistral's head dimension (128) and grouped heads (4 of queries per head of keys). Returns the worst distance.
    """
    tokens, split, layer = 200, 72, SimpleNamespace(num_key_value_groups=4)
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(1, heads, tokens, 128, generator=generator) for heads in (4, 1, 1)]
    upstream = torch.randn(1, tokens, 4, 128, generator=generator)
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    blocks = causal.clone()
    blocks[split:, :split] = False

    worst = 0.0
    for seen, mask in ((causal, None), (blocks, blocks[None, None].to(device))):
        plain = [value.clone().requires_grad_() for value in values]
        scores = plain[0] @ plain[1].transpose(-1, -2) / 128**0.5
        reference = (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ plain[2]).transpose(1, 2)
        torch.autograd.backward(reference, upstream)
        ours = [value.to(device, dtype, copy=True).requires_grad_() for value in values]
        with torch.no_grad():
            unwatched, _ = sdpa_attention_forward(layer, *ours, mask)
        output, _ = sdpa_attention_forward(layer, *ours, mask)
        output.backward(upstream.to(device, dtype))
        gradients = [distance(one.grad, other.grad) for one, other in zip(ours, plain, strict=True)]
        worst = max(worst, distance(unwatched, reference), distance(output, reference), *gradients)
    return worst


def packed_attention(name: str, device: str) -> float:
    """Compare `name` (flash_attention_2, torch_varlen) over two packed documents with torch's attention over each.

    Forward and backward in bfloat16, with Mistral's head dimension (128) and grouped heads (4 of queries per head of
    keys). Returns the worst distance of output and gradients. Raises ImportError if the library is not installed.
    """
    attend = _function(name)
    lengths = [48, 80]
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(lengths), 4, 128), (sum(lengths), 1, 128), (sum(lengths), 1, 128))
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    upstream = torch.randn(shapes[0], generator=generator)

    packed = [value.to(device, torch.bfloat16).requires_grad_() for value in values]
    bounds = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32, device=device)
    output = attend(*packed, bounds, max(lengths))
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


def _function(name: str) -> Callable[..., Any]:
    """Return a function of q, k, v, the bounds of the documents and the longest one's length."""
    if name == "torch_varlen":
        from finetune.model.attention import attend

        return attend
    from flash_attn import flash_attn_varlen_func

    def flash_attn(q: Any, k: Any, v: Any, bounds: Any, longest: int) -> Any:
        return flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest, causal=True)

    return flash_attn
