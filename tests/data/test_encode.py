"""Rows become token ids and labels: cut at turns, certified, led by the system prompt, alike with any workers."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data import encode
from finetune.data.encode import truncate, with_system_prompt
from finetune.data.split import Statistics
from finetune.data.template import Encoded, Messages
from finetune.errors import DataError
from support.conversations import conversation, weighted
from support.prepared import (
    NO_TURN_FITS,
    RECIPE,
    SHORT,
    SYSTEM_PROMPT,
    TWO_TURNS,
    Case,
    contents,
    lines,
    the_chat,
    write,
)


def length(messages: Messages) -> int:
    return len(the_chat(None).encode([messages])[0].input_ids)


def test_what_became_of_the_rows_is_counted(case: Case) -> None:
    write(case.train, SHORT, "", TWO_TURNS, "not JSON", NO_TURN_FITS, SHORT, conversation("Hi", "Yes"), "[]")
    write(case.validation, conversation("Hi", "No"))
    assert [length(row) for row in (SHORT, TWO_TURNS, NO_TURN_FITS)] == [11, 21, 31]
    recipe = replace(RECIPE, max_seq_length=16, certificate=True)
    prepared = case.prepare(recipe, on_bad_row="drop")
    assert asdict(prepared.statistics["train"]) == {
        "rows": 4,
        "tokens": 44,
        "supervised_tokens": 8,
        "longest": 21,
        "p50": 11,
        "p95": 21,
        "truncated": 1,
        "dropped_long": 1,
        "dropped_without_loss": 0,
        "dropped_bad": 2,
        "duplicates": 1,
        "dropped_duplicates": 0,
        "repeated": 0,
        "left_out": 0,
        "encoded": 5,
        "certified": 5,
        "control_tokens": 0,
        "first_control_token": None,
        "normalized_leaks": 0,
        "first_leak": None,
        "opening_leaks": 0,
        "first_opening": None,
        "first_copy": case.in_train(6),
        "histogram": {"edges": list(range(11, 23)), "counts": [3, *[0] * 9, 1]},
        "bad": [
            (case.in_train(4), "not JSON: Expecting value at column 1"),
            (case.in_train(8), 'found an empty list, expected an object {"messages": [...]}'),
        ],
        "other_keys": {},
    }
    assert prepared.statistics["validation"] == Statistics(
        *(1, 11, 2, 11, 11, 11),
        encoded=1,
        certified=1,
        opening_leaks=1,
        first_opening=(case.in_train(1), case.in_validation(1)),
        histogram={"edges": [11, 12], "counts": [1]},
    )
    assert {name: entry["rows"] for name, entry in prepared.files.items()} == {"train": 4, "validation": 1}
    assert lines(prepared.train) == [1, 3, 6, 7]


def test_a_row_that_was_cut_ends_with_its_last_whole_turn(case: Case) -> None:
    write(case.train, TWO_TURNS)
    write(case.validation, conversation("Hi", "No"))
    prepared = case.prepare(replace(RECIPE, max_seq_length=20))
    whole = the_chat(None).encode([conversation("Hi", "Hello")])[0]
    assert contents(prepared.train) == [(1, whole.input_ids, whole.labels)]


THREE = conversation("Hi", "Hello", "Hi", "Yes", "Hi", "No")  # 31 tokens, its turns end at 11, 21 and 31


@pytest.mark.parametrize(
    ("weights", "limit", "kept"),
    [
        ((1, 1, 0), 31, 31), ((0, 0, 1), 31, 31), ((1, 0, 1), 30, 11), ((0, 1, 1), 30, 21), ((1, 1, 0), 20, 11),
        ((0, 1, 1), 20, None), ((0, 0, 1), 30, None), ((1, 1, 1), 21, 21), ((1, 1, 1), 11, 11),
    ],
)  # fmt: skip
def test_a_row_is_cut_after_the_last_turn_with_loss_that_fits(
    case: Case, weights: tuple[int, ...], limit: int, kept: int | None
) -> None:
    write(case.train, SHORT, weighted(THREE, *weights))
    write(case.validation, conversation("Hi", "No"))
    prepared = case.prepare(replace(RECIPE, max_seq_length=limit))
    assert prepared.train.lengths.tolist()[1:] == ([] if kept is None else [kept])
    counts = prepared.statistics["train"]
    assert (counts.truncated, counts.dropped_long) == (kept not in (None, 31), kept is None)
    assert counts.dropped_without_loss == 0


@pytest.mark.parametrize("truncation", [True, False])
def test_a_row_in_which_no_turn_carries_loss_is_dropped_and_counted_by_itself(case: Case, truncation: bool) -> None:
    write(case.train, weighted(SHORT, 0), SHORT, weighted(NO_TURN_FITS, 0), weighted(THREE, 0, 0, 0))
    write(case.validation, conversation("Hi", "No"), weighted(conversation("Hi", "Yes"), 0))
    prepared = case.prepare(replace(RECIPE, max_seq_length=16, truncation=truncation))
    train, validation = (prepared.statistics[name] for name in ("train", "validation"))
    assert (train.rows, train.dropped_without_loss, train.dropped_long, train.bad) == (1, 3, 0, [])
    assert (validation.rows, validation.dropped_without_loss) == (1, 1)
    assert (train.encoded, lines(prepared.train), prepared.whole["train"]["rows"]) == (4, [2], 1)


def test_with_train_on_last_only_the_last_answer_carries_loss(case: Case) -> None:
    write(case.train, THREE, SHORT, weighted(THREE, 1, 1, 0))
    write(case.validation, conversation("Hi", "No"))
    prepared = case.prepare(replace(RECIPE, train_on="last", certificate=True, system_prompt=SYSTEM_PROMPT))
    led = with_system_prompt(THREE, SYSTEM_PROMPT)
    row = the_chat(None).encode([weighted(led, 0, 0, 1)])[0]
    assert contents(prepared.train)[0] == (1, row.input_ids, row.labels)
    counts = prepared.statistics["train"]
    assert (counts.rows, counts.dropped_without_loss, counts.supervised_tokens, counts.certified) == (2, 1, 4, 3)
    cut = case.prepare(replace(RECIPE, train_on="last", max_seq_length=30)).statistics["train"]
    assert (cut.rows, cut.dropped_long, cut.dropped_without_loss) == (1, 1, 1)


def test_rows_that_differ_in_weights_only_are_copies(case: Case) -> None:
    write(case.train, weighted(TWO_TURNS, 0, 0), weighted(TWO_TURNS, 0, 1), TWO_TURNS, SHORT)
    write(case.validation, conversation("Hi", "No"))
    assert case.prepare().statistics["train"].duplicates == 1
    prepared = case.prepare(on_duplicate="drop")
    counts = prepared.statistics["train"]
    assert (lines(prepared.train), counts.dropped_duplicates, counts.dropped_without_loss) == ([2, 4], 1, 1)
    write(case.validation, weighted(TWO_TURNS, 1, 0))
    assert case.failure(DataError).startswith("data: 1 row is in both train and validation, the first: ")


def test_without_truncation_a_long_row_is_a_bad_row(case: Case) -> None:
    write(case.train, SHORT, TWO_TURNS, "{}")
    write(case.validation, conversation("Hi", "No"))
    assert case.failure(DataError, replace(RECIPE, max_seq_length=16, truncation=False)) == (
        "data: 2 bad rows\n"
        f"  {case.train}:2: 21 tokens, model.max_seq_length is 16, and dataset.truncation is false\n"
        f'  {case.train}:3: no "messages" key (found no key)\n'
        "Fix them, or leave them out with --set dataset.on_bad_row=drop"
    )


def test_a_row_of_just_the_length_is_whole(case: Case) -> None:
    write(case.train, TWO_TURNS)
    write(case.validation, conversation("Hi", "No"))
    prepared = case.prepare(replace(RECIPE, max_seq_length=21, truncation=False))
    assert prepared.train.lengths.tolist() == [21]
    assert prepared.statistics["train"].truncated == 0


def test_the_system_prompt_leads_only_rows_without_one(case: Case) -> None:
    rows = [conversation("Hi", "Yes"), conversation("Hi", "No", system="Be short.")]
    write(case.train, *rows)
    write(case.validation, SHORT)
    prepared = case.prepare(replace(RECIPE, system_prompt=SYSTEM_PROMPT, certificate=True))
    wanted = the_chat(None).encode([conversation("Hi", "Yes", system=SYSTEM_PROMPT), rows[1]])
    assert contents(prepared.train) == [(line, row.input_ids, row.labels) for line, row in enumerate(wanted, 1)]
    assert prepared.statistics["train"].certified == 2


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=4), max_size=6),
    limit=st.integers(1, 30),
)
def test_rows_of_a_chunk_are_cut_as_one_row_is(rows: list[list[tuple[int, bool]]], limit: int) -> None:
    encoded = []
    for turns in rows:
        ends = np.cumsum([length for length, _ in turns]).tolist()
        ids = list(range(ends[-1]))
        encoded.append(Encoded(ids, ids, [end for end, (_, with_loss) in zip(ends, turns, strict=True) if with_loss]))
    parsed = [encode.Row(1, bytes(16), [], 0, 0, 0, False, [])] * len(rows)
    chunk = encode.make_chunk(parsed, encoded, [False] * len(rows))
    cut = [truncate(row, limit) for row in encoded]
    assert chunk.kept(limit).tolist() == [len(row.input_ids) if row else 0 for row in cut]
