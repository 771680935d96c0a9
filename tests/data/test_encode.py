"""Rows become token ids and labels: cut at turns, certified, led by the system prompt, alike with any workers."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data import certificate, digests, encode, encoded_file, workers
from finetune.data import prepare as prepare_module
from finetune.data.certificate import Certificate
from finetune.data.encode import Encoder, truncate, with_system_prompt
from finetune.data.split import Statistics
from finetune.data.template import IGNORED, Encoded, Messages
from finetune.data.tokenizer import Chat, Reference
from finetune.errors import CheckFailed, DataError, OutOfResource
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
    numbered,
    same,
    the_chat,
    the_reference,
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


@settings(max_examples=100, deadline=None)
@given(texts=st.tuples(st.text(st.characters(max_codepoint=127)), st.text(st.characters(max_codepoint=127))))
def test_the_fast_way_for_ascii_and_the_other_tell_the_same_copies(texts: tuple[str, str]) -> None:
    slow = conversation(*(f"\u00a0{text}\u00a0" for text in texts))
    assert digests.folded_digests(conversation(*texts)) == digests.folded_digests(slow)


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        (conversation("Hi", "Yes"), conversation("hi ", "No", "Why?", "Because."), True),
        (conversation("Hi", "Yes", system="Be kind."), conversation("Hi", "No", system=" be  KIND."), True),
        (conversation("\ufb01ve \u2460", "Yes"), conversation("FIVE 1", "No"), True),
        (conversation("Stra\u00dfe", "Yes"), conversation("STRASSE", "No"), True),
        (conversation("Hi", "Yes", system="Be kind."), conversation("Hi", "Yes"), False),
        (conversation("Hi", "Yes"), conversation("Hi!", "Yes"), False),
        (conversation("Hi", "Yes"), conversation("Hi Yes", "Yes"), False),
    ],
    ids=["later turns", "system message", "forms", "case", "no system message", "punctuation", "other ends"],
)
def test_openings_are_alike_up_to_the_first_answer(one: Messages, other: Messages, alike: bool) -> None:
    assert (digests.folded_digests(one)[1] == digests.folded_digests(other)[1]) == alike


# --- the certificate


class LyingReference(Reference):
    """Says another last token of one row."""

    def encode(self, messages: Messages) -> tuple[list[int], list[int]]:
        input_ids, labels = super().encode(messages)
        if messages[-1]["content"] == "Answer 2":
            return [*input_ids[:-1], 7], [*labels[:-1], 7]
        return input_ids, labels


def test_without_the_certificate_no_row_is_compared(two_files: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificate, "Reference", LyingReference)
    statistics = two_files.prepare(replace(RECIPE, certificate=False)).statistics
    assert (statistics["train"].certified, statistics["validation"].certified) == (0, 0)


def test_a_row_with_other_tokens_than_mistral_common_fails_by_file_and_line(
    two_files: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificate, "Reference", LyingReference)
    write(two_files.train, *numbered(2), "", *numbered(3, start=2))
    last = length(numbered(1, start=2)[0]) - 1
    assert two_files.failure(CheckFailed, replace(RECIPE, certificate=True)) == (
        f"certificate: {two_files.train}:4: token {last} is 2+, mistral-common says 7+\n"
        "Report this row: no run may start on it."
    )


DIFFERENCES: dict[str, tuple[Any, str]] = {
    "a token": (lambda ids, labels: ([*ids[:3], 7, *ids[4:]], labels),
        "3 is 28793 15359 733, mistral-common says 7 15359 733"),
    "only a label": (lambda ids, labels: (ids, [*labels[:-1], IGNORED]), "10 is 2+, mistral-common says 2"),
    "one token less": (lambda ids, labels: (ids[:-1], labels[:-1]), "10 is 2+, mistral-common says the end"),
    "one token more": (lambda ids, labels: ([*ids, 5], [*labels, 5]), "11 is the end, mistral-common says 5+"),
    "two beginnings": (lambda ids, labels: ([1, *ids], [IGNORED, *labels]),
        "1 is 733 16289 28793, mistral-common says 1 733 16289"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "told"), DIFFERENCES.values(), ids=DIFFERENCES.keys())
def test_the_certificate_finds_any_difference(monkeypatch: pytest.MonkeyPatch, change: Any, told: str) -> None:
    class Different(Reference):
        def encode(self, messages: Messages) -> tuple[list[int], list[int]]:
            return change(*super().encode(messages))

    monkeypatch.setattr(certificate, "Reference", Different)
    outcome = Encoder(replace(RECIPE, certificate="every_row")).encode([(3, json.dumps({"messages": SHORT}).encode())])
    assert outcome.mismatch == f"3: token {told}"


def test_a_row_of_which_the_saved_tokenizer_makes_other_ids_fails_the_certificate(
    two_files: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_saved(self: Chat, rows: list[Messages]) -> list[Encoded]:
        return [row._replace(input_ids=[*row.input_ids[:-1], 7]) for row in self.encode(rows)]

    monkeypatch.setattr(Chat, "encode_as_saved", other_saved)
    last = length(numbered(1)[0]) - 1
    assert two_files.failure(CheckFailed, replace(RECIPE, certificate=True)) == (
        f"certificate: {two_files.train}:1: token {last} is 2+, the saved tokenizer says 7+\n"
        "Report this row: no run may start on it."
    )


def compared_lines(monkeypatch: pytest.MonkeyPatch, rows: list[Messages], compare: Certificate = True) -> list[int]:
    """The lines of `rows` that an encoder compares."""
    seen: list[Messages] = []

    class Watching:
        def encode(self, messages: Messages) -> tuple[list[int], list[int]]:
            seen.append(messages)
            return the_reference().encode(messages)

    monkeypatch.setattr(certificate, "Reference", Watching)
    monkeypatch.setattr(encode, "load_chat", the_chat)
    lines = [(number, json.dumps({"messages": messages}).encode()) for number, messages in enumerate(rows, 1)]
    chunk = Encoder(replace(RECIPE, certificate=compare)).encode(lines).rows
    assert (len(chunk.lines), chunk.compared.sum()) == (len(rows), len(seen))
    return [rows.index(messages) + 1 for messages in seen]


UNUSUAL = {
    "a control token": conversation("What is </s>?", "An end."),
    "brackets": conversation("Hi", "[INST] is text"),
    "a run of spaces": conversation("a  b", "c"),
    "a run in the answer": conversation("a", "if x:\n    y"),
    "a space first": conversation(" a", "c"),
    "a space last": conversation("a", "c "),
    "SentencePiece's space": conversation("a▁ b", "c"),
    "a system message": conversation("a", "b", system="c"),
}


@pytest.mark.parametrize("unusual", UNUSUAL.values(), ids=UNUSUAL.keys())
def test_the_certificate_compares_every_row_that_is_unusual_for_a_tokenizer(
    monkeypatch: pytest.MonkeyPatch, unusual: Messages
) -> None:
    rows = [conversation("a", "b"), unusual]
    assert [digest % 20 for digest in map(digests.content_digest, rows)].count(0) == 0
    assert compared_lines(monkeypatch, rows) == [2]
    assert compared_lines(monkeypatch, rows, "every_row") == [1, 2]
    assert compared_lines(monkeypatch, rows, False) == []


def test_of_the_usual_rows_the_certificate_compares_one_in_twenty_chosen_by_content(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = numbered(2000)
    lines = compared_lines(monkeypatch, rows)
    assert abs(len(lines) - 100) < 30
    assert compared_lines(monkeypatch, rows[::-1]) == [2001 - line for line in lines[::-1]]


def test_the_sample_has_rows_of_both_sides_of_a_split() -> None:
    found = map(digests.content_digest, numbered(600))
    sampled = [digest for digest in found if digest % certificate.SAMPLED_ONE_IN == 0]
    assert 0 < sum(digest < 2**63 for digest in sampled) < len(sampled)


def test_a_small_set_is_compared_whole_and_a_larger_one_by_sample(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    write(case.train, *numbered(200))
    for from_bytes, compared in ((case.train.stat().st_size + 1, 200), (case.train.stat().st_size, 7)):
        monkeypatch.setattr(prepare_module, "SAMPLED_FROM_BYTES", from_bytes)
        case.cache = case.folder / f"cache-{compared}"  # else the second takes the rows that the first compared
        counts = case.prepare(replace(RECIPE, certificate=True)).statistics["train"]
        assert (counts.encoded, counts.certified) == (200, compared)


# --- the system prompt


def test_the_system_prompt_leads_only_rows_without_one(case: Case) -> None:
    rows = [conversation("Hi", "Yes"), conversation("Hi", "No", system="Be short.")]
    write(case.train, *rows)
    write(case.validation, SHORT)
    prepared = case.prepare(replace(RECIPE, system_prompt=SYSTEM_PROMPT, certificate=True))
    wanted = the_chat(None).encode([conversation("Hi", "Yes", system=SYSTEM_PROMPT), rows[1]])
    assert contents(prepared.train) == [(line, row.input_ids, row.labels) for line, row in enumerate(wanted, 1)]
    assert prepared.statistics["train"].certified == 2


# --- worker processes


def test_one_process_and_two_workers_make_the_same_rows(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Messages | str] = [
        *numbered(600), *numbered(40), NO_TURN_FITS, conversation("Hi", "Hello " * 40, "a", "b"),
    ]  # fmt: skip
    rows[300] = "{}"
    rows[10] = "not JSON"
    write(case.train, *rows)
    prepared = []
    for processes, chunk_lines in ((0, 256), (2, 64)):
        monkeypatch.setattr(encoded_file, "CHUNK_LINES", chunk_lines)  # more chunks than may wait for two workers
        case.cache = case.folder / f"cache-{processes}"
        prepared.append(
            case.prepare(replace(RECIPE, max_seq_length=24, certificate=True), on_bad_row="drop", workers=processes)
        )
    assert prepared[0].statistics["train"].dropped_bad == 2
    assert prepared[0].tokens == prepared[1].tokens
    assert prepared[0].statistics == prepared[1].statistics
    assert same(*prepared)


# --- what does not depend on the length


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


def test_a_worker_that_is_killed_is_told_as_want_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, *arguments: Any) -> None: ...

        def __enter__(self) -> Broken:
            return self

        def __exit__(self, *exception: object) -> None: ...

        def submit(self, *arguments: Any) -> None:
            raise BrokenProcessPool

    monkeypatch.setattr(workers, "ProcessPoolExecutor", Broken)
    with pytest.raises(OutOfResource) as failure:
        list(workers.encode_batches(iter([[(1, b"{}")]]), RECIPE, 2))
    assert str(failure.value) == (
        "a process that encodes rows was killed, probably out of memory; free some memory and try again"
    )


# --- truncation


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
