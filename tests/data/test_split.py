"""A split counts its rows, hashes them, and finds the rows it shares with another split."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest

from finetune.data import encoded_file
from finetune.data.split import histogram
from support.conversations import conversation
from support.prepared import (
    NO_TURN_FITS,
    RECIPE,
    SHORT,
    TWO_TURNS,
    Case,
    numbered,
    the_chat,
    write,
)


def test_one_very_long_row_does_not_squeeze_the_histogram_into_one_bar() -> None:
    lengths = np.array([*range(100, 300), 30_000])
    found = histogram(lengths, 290)
    assert found["edges"] == [*range(100, 380, 20), 30_001]
    assert found["counts"] == [*[20] * 10, 0, 0, 0, 1]
    assert histogram(np.array([7]), 7) == {"edges": [7, 8], "counts": [1]}


def test_validation_rows_that_are_a_training_row_but_for_whitespace_and_case_are_counted(
    two_files: Case,
) -> None:
    copy = conversation(" question\t2", "ANSWER  2\r\n")
    write(two_files.validation, *numbered(2, start=100), "", copy, copy)
    counts = two_files.prepare().statistics
    assert counts["validation"].normalized_leaks == 2
    assert counts["validation"].first_leak == (two_files.in_train(3), two_files.in_validation(4))
    assert (counts["train"].normalized_leaks, counts["train"].first_leak) == (0, None)


def test_copies_within_one_split_are_no_leak(case: Case) -> None:
    write(case.train, *numbered(5), conversation("question 1", "answer 1"))
    write(case.validation, *numbered(1, start=50), conversation("question 50", "answer 50"))
    assert case.prepare().statistics["validation"].normalized_leaks == 0


def test_rows_that_begin_as_a_training_row_does_are_counted_for_what_they_are(two_files: Case) -> None:
    rows = numbered(5)
    write(two_files.train, *rows)
    others = [conversation(rows[index][0]["content"].lower(), "Another answer") for index in (3, 1)]
    copies = [conversation(*(message["content"].upper() for message in rows[index])) for index in (1, 2)]
    write(two_files.validation, *numbered(1, start=50), "", copies[0], *others, copies[1])
    counts = two_files.prepare().statistics["validation"]
    assert (counts.normalized_leaks, counts.opening_leaks) == (2, 2)
    assert counts.first_leak == (two_files.in_train(2), two_files.in_validation(3))
    assert counts.first_opening == (two_files.in_train(2), two_files.in_validation(5))


def test_duplicates_are_rows_with_the_same_messages_whatever_else_the_line_holds(case: Case) -> None:
    same = json.dumps({"id": 3, "messages": [dict(reversed(message.items())) for message in SHORT]})
    write(case.train, SHORT, same, TWO_TURNS, SHORT)
    write(case.validation, conversation("Hi", "No"))
    assert case.prepare().statistics["train"].duplicates == 2


def test_lengths_are_of_the_kept_rows_before_they_are_cut(case: Case) -> None:
    write(case.train, *(conversation("Hi", "Yes", *["Hi", "Yes"] * more) for more in range(20)), NO_TURN_FITS)
    write(case.validation, conversation("Hi", "No"))
    counts = case.prepare(replace(RECIPE, max_seq_length=16)).statistics["train"]
    lengths = sorted(11 + 10 * more for more in range(20))
    assert (counts.p50, counts.p95, counts.longest) == (lengths[9], lengths[18], lengths[19])
    assert (counts.truncated, counts.dropped_long) == (19, 1)


@pytest.mark.parametrize("chunk_lines", [1, 256])
def test_control_tokens_in_messages_are_counted_with_their_first_line(
    case: Case, monkeypatch: pytest.MonkeyPatch, chunk_lines: int
) -> None:
    monkeypatch.setattr(encoded_file, "CHUNK_LINES", chunk_lines)
    rows = [conversation("What is </s>?", "An end."), conversation("Hi", "[/INST] is text"), NO_TURN_FITS]
    write(case.train, SHORT, "", *rows, conversation("<|im_end|> < s> [inst]", "Hello"))
    write(case.validation, conversation("a", "b", system="<s>"))
    counts = case.prepare().statistics
    assert (counts["train"].control_tokens, counts["train"].first_control_token) == (2, case.in_train(3))
    counts_held_out = counts["validation"]
    assert (counts_held_out.control_tokens, counts_held_out.first_control_token) == (1, case.in_validation(1))


def test_a_dropped_row_and_the_configs_own_prompt_are_not_counted_for_control_tokens(case: Case) -> None:
    write(case.train, SHORT, conversation("</s> " * 20, "Hello"))
    write(case.validation, conversation("Hi", "No"))
    counts = case.prepare(replace(RECIPE, max_seq_length=20, system_prompt="</s>")).statistics["train"]
    assert (counts.rows, counts.dropped_long, counts.control_tokens) == (1, 1, 0)


def test_whole_rows_are_the_same_whatever_is_cut_or_dropped(case: Case) -> None:
    write(case.train, *numbered(30), TWO_TURNS, NO_TURN_FITS, conversation("Hi", "No"))
    recipes = [replace(RECIPE, max_seq_length=length) for length in (4096, 20, 16)]
    refusing = replace(RECIPE, max_seq_length=20, truncation=False)
    prepared = [
        *(case.prepare(recipe, validation_split=0.2) for recipe in recipes),
        case.prepare(refusing, validation_split=0.2, on_bad_row="drop"),
    ]
    assert len({every.statistics["train"].tokens for every in prepared}) > 1
    assert all(every.whole == prepared[0].whole for every in prepared)
    assert sum(split["rows"] for split in prepared[0].whole.values()) == 33


def test_the_hashes_of_whole_rows_are_of_each_rows_int32_ids_and_labels(case: Case) -> None:
    rows = [SHORT, TWO_TURNS, NO_TURN_FITS]
    write(case.train, *rows)
    write(case.validation, conversation("Hi", "No"))
    encoded = the_chat(None).encode(rows)
    whole = case.prepare(replace(RECIPE, max_seq_length=16)).whole["train"]
    for name, values in (
        ("input_ids", [row.input_ids for row in encoded]),
        ("labels", [row.labels for row in encoded]),
    ):
        hashes = (hashlib.blake2b(np.array(row, "<i4").tobytes(), digest_size=16).digest() for row in values)
        assert whole[name] == hashlib.sha256(b"".join(hashes)).hexdigest()
    assert whole["rows"] == 3


def test_the_order_of_rows_is_in_the_hashes_of_ids_and_labels_only(case: Case) -> None:
    write(case.validation, conversation("Hi", "No"))
    wholes = []
    for rows in (numbered(5), numbered(5)[::-1]):
        write(case.train, *rows)
        wholes.append(case.prepare().whole["train"])
    assert [name for name in wholes[0] if wholes[0][name] != wholes[1][name]] == ["input_ids", "labels"]
