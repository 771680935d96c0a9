"""LoRA's dropout inside its products, in Triton: noise is made while x is read, and nothing of x's size is written.

`reduce` and `gradients` compute what those of `fused_lora` do. Whether an input is kept depends on the seed and its
position alone, so forward, recomputation and backward agree. By arithmetic, a pass over x costs 20 integer operations
an element, which on an H100 take about as long as reading it does; not measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# A tile of x, and the tokens whose share of A's gradient one program sums; these sums are added in a fixed order.
TOKENS, COLUMNS, CHUNK = 64, 128, 1024
LEAST_RANK = 16  # of tl.dot; a smaller r is filled up with zeros

jit = triton.jit(do_not_specialize=["seed", "dropped", "tokens"])  # they change from call to call


@triton.jit  # type: ignore[untyped-decorator]
def _noise(seed, rows, block, inputs, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Numbers below 2^16, one for each input of a tile: a call of Philox makes those of eight neighbors."""
    lanes = block * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
    a, b, c, d = tl.randint4x(seed, rows[:, None] * tl.cdiv(inputs, 8) + lanes[None, :])
    words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    return tl.interleave(words & 0xFFFF, (words >> 16) & 0xFFFF)


@jit  # type: ignore[untyped-decorator]
def _reduce(  # type: ignore[no-untyped-def]
    x, down, reduced, seed, dropped, tokens, inputs, rank,
    R: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """TOKENS rows of `reduced` [tokens, rank]; R is a rank that tl.dot takes."""
    rows, ranks = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, R)
    total = tl.zeros((TOKENS, R), tl.float32)
    for block in range(tl.cdiv(inputs, COLUMNS)):
        columns = block * COLUMNS + tl.arange(0, COLUMNS)
        inside = (rows[:, None] < tokens) & (columns[None, :] < inputs)
        seen = tl.load(x + rows[:, None].to(tl.int64) * inputs + columns[None, :], mask=inside, other=0.0)
        kept = _noise(seed, rows, block, inputs, COLUMNS) >= dropped
        known = (ranks[None, :] < rank) & (columns[:, None] < inputs)
        weights = tl.load(down + ranks[None, :] * inputs + columns[:, None], mask=known, other=0.0)
        total = tl.dot(tl.where(kept, seen, 0.0).to(weights.dtype), weights, total, input_precision="ieee")
    inside = (rows[:, None] < tokens) & (ranks[None, :] < rank)
    tl.store(reduced + rows[:, None] * rank + ranks[None, :], total, mask=inside)


@jit  # type: ignore[untyped-decorator]
def _gradients(  # type: ignore[no-untyped-def]
    x, of_reduced, down, of_x, of_a, seed, dropped, tokens, inputs, rank,
    R: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, OF_X: tl.constexpr,
):  # fmt: skip
    """COLUMNS of A's gradient by CHUNK tokens; those tokens' part of x's gradient is added to `of_x` if OF_X."""
    block, chunk, ranks = tl.program_id(0), tl.program_id(1), tl.arange(0, R)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    known = (ranks[:, None] < rank) & (columns[None, :] < inputs)
    weights = tl.load(down + ranks[:, None] * inputs + columns[None, :], mask=known, other=0.0)
    total = tl.zeros((R, COLUMNS), tl.float32)
    for first in range(chunk * CHUNK, tl.minimum(tokens, (chunk + 1) * CHUNK), TOKENS):
        rows = first + tl.arange(0, TOKENS)
        inside = (rows[:, None] < tokens) & (columns[None, :] < inputs)
        place = rows[:, None].to(tl.int64) * inputs + columns[None, :]
        kept = _noise(seed, rows, block, inputs, COLUMNS) >= dropped
        seen = tl.where(kept, tl.load(x + place, mask=inside, other=0.0), 0.0)
        small = (rows[:, None] < tokens) & (ranks[None, :] < rank)
        came = tl.load(of_reduced + rows[:, None] * rank + ranks[None, :], mask=small, other=0.0)
        total = tl.dot(tl.trans(came), seen.to(came.dtype), total, input_precision="ieee")
        if OF_X:
            more = tl.where(kept, tl.dot(came, weights, input_precision="ieee"), 0.0)
            tl.store(of_x + place, tl.load(of_x + place, mask=inside, other=0.0) + more, mask=inside)
    tl.store(of_a + (chunk * rank + ranks[:, None]) * inputs + columns[None, :], total, mask=known)


def _sizes(x: torch.Tensor, down: torch.Tensor, noise: tuple[float, int]) -> tuple[int, ...]:
    """What both kernels take last but for their own: seed, share to drop, tokens, inputs, r, and the tile's sizes."""
    (probability, seed), rank = noise, max(LEAST_RANK, triton.next_power_of_2(len(down)))
    return seed, round(probability * 2**16), *x.shape, len(down), rank, TOKENS, COLUMNS


def reduce(x: torch.Tensor, down: torch.Tensor, noise: tuple[float, int]) -> torch.Tensor:
    """As `fused_lora.reduce`."""
    x = x.contiguous()  # as it is, where it comes from a layer
    reduced = x.new_empty(len(x), len(down))
    _reduce[(triton.cdiv(len(x), TOKENS),)](x, down, reduced, *_sizes(x, down, noise))
    return reduced


def gradients(
    x: torch.Tensor, of_reduced: torch.Tensor, down: torch.Tensor, of_x: torch.Tensor | None, noise: tuple[float, int]
) -> torch.Tensor:
    """As `fused_lora.gradients`."""
    x = x.contiguous()
    chunks, wanted = triton.cdiv(len(x), CHUNK), of_x is not None
    of_a = torch.empty(chunks, *down.shape, dtype=torch.float32, device=x.device)
    tensors = x, of_reduced, down, of_x if wanted else x, of_a
    grid = triton.cdiv(x.shape[1], COLUMNS), chunks
    _gradients[grid](*tensors, *_sizes(x, down, noise), CHUNK, wanted, num_warps=8)
    return of_a.sum(0)
