"""Rows share sequences without loss or overflow, and a batch keeps them apart."""

from __future__ import annotations

import bisect
import functools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.packing import Collator, pack
from finetune.data.tokenizer import load_chat


def naive_best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """The filled length of each sequence, in order: every row into the fullest sequence that still takes it."""
    filled: list[int] = []
    for length in sorted(lengths, reverse=True):
        fullest = max((tokens for tokens in filled if tokens + length <= capacity), default=None)
        if fullest is not None:
            filled.remove(fullest)
        bisect.insort(filled, (fullest or 0) + length)
    return filled


@st.composite
def packings(draw: st.DrawFn) -> tuple[list[int], int]:
    capacity = draw(st.integers(1, 70))
    return draw(st.lists(st.integers(1, capacity), max_size=60)), capacity


@settings(max_examples=300, deadline=None)
@given(packings())
def test_rows_are_packed_once_in_file_order_as_full_as_best_fit_decreasing_packs_them(
    packing: tuple[list[int], int],
) -> None:
    lengths, capacity = packing
    sequences = pack(lengths, capacity)
    assert sorted(row for sequence in sequences for row in sequence) == list(range(len(lengths)))
    assert all(sequence == sorted(sequence) for sequence in sequences)
    filled = sorted(sum(lengths[row] for row in sequence) for sequence in sequences)
    assert all(0 < tokens <= capacity for tokens in filled)
    assert filled == naive_best_fit_decreasing(lengths, capacity)
    assert pack(lengths, capacity) == sequences


def test_these_rows_pack_so() -> None:
    assert pack([3, 7, 5, 2, 4, 1, 10], 10) == [[6], [0, 1], [2, 4, 5], [3]]
    assert pack([6, 4, 4, 6, 5], 10) == [[0, 2], [1, 3], [4]]
    assert pack([], 10) == []
    assert pack([10, 10], 10) == [[0], [1]]


# --- batches


@functools.cache
def tokenizer(padding_side: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=load_chat(None).tokenizer, pad_token="<unk>", padding_side=padding_side
    )


def example(*rows: tuple[int, list[int]], packed: bool) -> dict[str, Any]:
    """Rows as (line, ids) in one example of `Rows.dataset`; every label is supervised, the worst case."""
    ids = [token for _, row in rows for token in row]
    lengths = {"seq_lengths": [len(row) for _, row in rows]} if packed else {}
    return {"input_ids": ids, "labels": list(ids), "lines": [line for line, _ in rows], **lengths}


def packed_batch(flat: bool) -> dict[str, Any]:
    return Collator(tokenizer("right"), flat)(
        [example((1, [11, 12, 13]), (4, [21, 22]), packed=True), example((2, [31]), (3, [41, 42, 43, 44]), packed=True)]
    )


def test_flat_packed_rows_become_one_sequence_whose_positions_begin_again_at_each_row() -> None:
    batch = packed_batch(flat=True)
    assert batch["input_ids"].tolist() == [[11, 12, 13, 21, 22, 31, 41, 42, 43, 44]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 1, 2, 3]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 6, 10]


def test_packed_sequences_that_are_not_flat_stay_apart_and_padding_is_a_row_of_its_own() -> None:
    tokens = [example((1, [11, 12, 13]), (4, [21]), packed=True), example((2, [31, 32]), packed=True)]
    batch = Collator(tokenizer("right"), flat=False)(tokens)
    assert batch["input_ids"].tolist() == [[11, 12, 13, 21], [31, 32, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0], [0, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 12, 13, -100], [-100, 32, -100, -100]]
    assert batch["tokens"] == 6


@pytest.mark.parametrize("flat", [True, False])
def test_a_packed_batch_has_no_attention_mask(flat: bool) -> None:
    # transformers takes row ends from position ids only where there is none
    assert "attention_mask" not in packed_batch(flat)


def test_no_row_of_a_packed_batch_is_predicted_from_the_row_before() -> None:
    labels = [[-100, 12, 13, -100, 22, -100, -100, 42, 43, 44]]
    assert packed_batch(flat=True)["labels"].tolist() == labels
    assert packed_batch(flat=False)["labels"].tolist() == [labels[0][:5], labels[0][5:]]


@pytest.mark.parametrize(
    ("side", "input_ids", "labels", "mask"),
    [
        ("right", [21, 22, 0, 0], [21, 22, -100, -100], [1, 1, 0, 0]),
        ("left", [0, 0, 21, 22], [-100, -100, 21, 22], [0, 0, 1, 1]),
    ],
)
def test_unpacked_rows_are_padded_on_the_tokenizers_side_without_loss_or_attention_there(
    side: str, input_ids: list[int], labels: list[int], mask: list[int]
) -> None:
    rows = [example((1, [11, 12, 13, 14]), packed=False), example((2, [21, 22]), packed=False)]
    batch = Collator(tokenizer(side), flat=False)(rows)
    assert batch["input_ids"].tolist() == [[11, 12, 13, 14], input_ids]
    assert batch["labels"].tolist() == [[11, 12, 13, 14], labels]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], mask]
    assert "position_ids" not in batch


@pytest.mark.parametrize("packed", [True, False])
def test_a_batch_says_which_lines_its_rows_are_and_has_labels_a_loss_takes(packed: bool) -> None:
    import torch

    batch = Collator(tokenizer("right"), flat=True)(
        [example((7, [1, 2]), packed=packed), example((3, [1, 2]), packed=packed)]
    )
    assert batch["lines"] == [7, 3]
    assert batch["tokens"] == 4
    assert batch["labels"].dtype == torch.int64  # cross_entropy refuses int32
