"""The certificate compares rows with mistral-common's and the saved tokenizer's ids and labels."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from finetune.data import certificate, digests, encode
from finetune.data import prepare as prepare_module
from finetune.data.certificate import Certificate
from finetune.data.encode import Encoder
from finetune.data.template import IGNORED, Encoded, Messages
from finetune.data.tokenizer import Chat, Reference
from finetune.errors import CheckFailed
from support.conversations import conversation
from support.prepared import (
    RECIPE,
    SHORT,
    Case,
    numbered,
    the_chat,
    the_reference,
    write,
)


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
    last = len(the_chat(None).encode(numbered(1, start=2))[0].input_ids) - 1
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
    last = len(the_chat(None).encode(numbered(1))[0].input_ids) - 1
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
