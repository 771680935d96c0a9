"""Attention, forward and backward."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from finetune.checks.numerics.compare import distance


def flash_attention(device: str) -> float:
    """flash-attn over two packed documents, forward and backward, against torch's attention over each alone.

    Mistral's head dimension (128) and grouped heads (4 of queries to 1 of keys), in bfloat16; the worst of the output's
    and the three gradients' distances. Raises ImportError where flash-attn is not installed.
    """
    from flash_attn import flash_attn_varlen_func

    lengths = [48, 80]
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(lengths), 4, 128), (sum(lengths), 1, 128), (sum(lengths), 1, 128))
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    upstream = torch.randn(shapes[0], generator=generator)

    packed = [value.to(device, torch.bfloat16).requires_grad_() for value in values]
    bounds = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32, device=device)
    output = flash_attn_varlen_func(*packed, bounds, bounds, max(lengths), max(lengths), causal=True)
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
