"""Files become checked, split, encoded and cached rows; what happened to each row is counted and told."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune import files
from finetune.config.schema import DatasetConfig
from finetune.data import encode
from finetune.data import prepare as prepare_module
from finetune.data.encode import Encoder, Recipe, Statistics, control_tokens, with_system_prompt
from finetune.data.prepare import Prepared, prepare
from finetune.data.preview import marked, preview, segments
from finetune.data.store import Rows, SplitWriter, histogram
from finetune.data.template import CHATML_FORMAT, IGNORED, MISTRAL_FORMAT, ChatFormat, Messages
from finetune.data.tokenizer import Chat, Reference, load_chat
from finetune.errors import CheckFailed, ConfigError, DataError, OutOfResource
from finetune.wording import clean

RECIPE = Recipe(None, None, max_seq_length=64, truncation=True, certificate=False)
SYSTEM_PROMPT = "Be kind."

# Making Mistral's tokenizer takes a third of a second, and these tests make it some hundred times.
the_chat = functools.cache(load_chat)
the_reference = functools.cache(Reference)


@pytest.fixture(autouse=True)
def made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "load_chat", the_chat)
    monkeypatch.setattr(encode, "load_chat", the_chat)
    monkeypatch.setattr(encode, "Reference", the_reference)


def conversation(*turns: str, system: str | None = None) -> Messages:
    led = [{"role": "system", "content": system}] if system is not None else []
    roles = ("user", "assistant") * len(turns)
    return led + [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]


def write(path: Path, *rows: Messages | str) -> Path:
    """A JSONL file; a row that is text is written as it stands."""
    lines = [row if isinstance(row, str) else json.dumps({"messages": row}) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def numbered(count: int, start: int = 0) -> list[Messages]:
    return [conversation(f"Question {index}", f"Answer {index}") for index in range(start, start + count)]


class Case:
    """A folder with a train file, perhaps a validation file, and a cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.train = folder / "train.jsonl"
        self.validation = folder / "val.jsonl"
        self.cache = folder / "cache"

    def dataset(self, **values: Any) -> DatasetConfig:
        validation = str(self.validation) if self.validation.exists() else None
        standard = DatasetConfig(str(self.train), validation, 0.5, None, True, "right", "fail", False, ())
        return replace(standard, **values)

    def prepare(
        self, recipe: Recipe = RECIPE, packing: bool = False, workers: int | None = 0, **of_dataset: Any
    ) -> Prepared:
        return prepare(self.dataset(**of_dataset), recipe, packing, self.cache, workers)

    def caches(self) -> list[str]:
        return sorted(path.name for path in self.cache.iterdir() if path.name != "lock") if self.cache.exists() else []

    def failure(self, kind: type[Exception], *arguments: Any, **named: Any) -> str:
        with pytest.raises(kind) as caught:
            self.prepare(*arguments, **named)
        assert self.caches() == []
        return str(caught.value)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


@pytest.fixture
def two_files(case: Case) -> Case:
    write(case.train, *numbered(5))
    write(case.validation, *numbered(2, start=100))
    return case


def contents(rows: Rows) -> list[tuple[int, list[int], list[int]]]:
    return [
        (line, input_ids.tolist(), labels.tolist())
        for line, input_ids, labels in (rows.row(index) for index in range(len(rows.lengths)))
    ]


def lines(rows: Rows) -> list[int]:
    return [rows.row(index)[0] for index in range(len(rows.lengths))]


def length(messages: Messages) -> int:
    return len(the_chat(None).encode([messages])[0].input_ids)


# --- what is counted

# Each answer is one id and </s>.
SHORT = conversation("Hi", "Hello")
TWO_TURNS = conversation("Hi", "Hello", "Hi", "Yes")
NO_TURN_FITS = conversation("Hi " * 20, "Hello")


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
        "dropped_bad": 2,
        "duplicates": 1,
        "certified": 5,
        "control_tokens": 0,
        "first_control_token": None,
        "normalised_leaks": 0,
        "first_leak": None,
        "copies": [6],
        "histogram": {"edges": list(range(11, 23)), "counts": [3, *[0] * 9, 1]},
        "bad": [
            (4, "not JSON: Expecting value at column 1"),
            (8, 'found an empty list, wanted an object {"messages": [...]}'),
        ],
    }
    assert prepared.statistics["validation"] == Statistics(
        1, 11, 2, 11, 11, 11, certified=1, histogram={"edges": [11, 12], "counts": [1]}
    )
    assert {name: entry["rows"] for name, entry in prepared.files.items()} == {"train": 4, "validation": 1}
    assert lines(prepared.train) == [1, 3, 6, 7]


def test_one_very_long_row_does_not_squeeze_the_histogram_into_one_bar() -> None:
    lengths = np.array([*range(100, 300), 30_000])
    found = histogram(lengths, 290)
    assert found["edges"] == [*range(100, 380, 20), 30_001]
    assert found["counts"] == [*[20] * 10, 0, 0, 0, 1]
    assert histogram(np.array([7]), 7) == {"edges": [7, 8], "counts": [1]}


def test_a_row_that_was_cut_ends_with_its_last_whole_turn(case: Case) -> None:
    write(case.train, TWO_TURNS)
    write(case.validation, conversation("Hi", "No"))
    prepared = case.prepare(replace(RECIPE, max_seq_length=20))
    whole = the_chat(None).encode([conversation("Hi", "Hello")])[0]
    assert contents(prepared.train) == [(1, whole.input_ids, whole.labels)]


def test_a_row_in_which_no_turn_fits_is_dropped_and_counted(case: Case) -> None:
    write(case.train, SHORT, NO_TURN_FITS)
    write(case.validation, conversation("Hi", "No"))
    prepared = case.prepare(replace(RECIPE, max_seq_length=16))
    assert (prepared.statistics["train"].dropped_long, lines(prepared.train)) == (1, [1])


def test_without_truncation_a_long_row_is_a_bad_row(case: Case) -> None:
    write(case.train, SHORT, TWO_TURNS, "{}")
    write(case.validation, conversation("Hi", "No"))
    assert case.failure(DataError, replace(RECIPE, max_seq_length=16, truncation=False)) == (
        "data: 2 bad rows\n"
        f"  {case.train}:2: 21 tokens, model.max_seq_length is 16, and dataset.truncation is false\n"
        f'  {case.train}:3: no "messages" key (found no key)\n'
        "Mend them, or leave them out with --set dataset.on_bad_row=drop"
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
    monkeypatch.setattr(encode, "CHUNK_LINES", chunk_lines)
    rows = [conversation("What is </s>?", "An end."), conversation("Hi", "[/INST] is text"), NO_TURN_FITS]
    write(case.train, SHORT, "", *rows, conversation("<|im_end|> < s> [inst]", "Hello"))
    write(case.validation, conversation("a", "b", system="<s>"))
    counts = case.prepare().statistics
    assert (counts["train"].control_tokens, counts["train"].first_control_token) == (2, 3)
    assert (counts["validation"].control_tokens, counts["validation"].first_control_token) == (1, 1)


def test_a_dropped_row_and_the_configs_own_prompt_are_not_counted_for_control_tokens(case: Case) -> None:
    write(case.train, SHORT, conversation("</s> " * 20, "Hello"))
    write(case.validation, conversation("Hi", "No"))
    counts = case.prepare(replace(RECIPE, max_seq_length=20, system_prompt="</s>")).statistics["train"]
    assert (counts.rows, counts.dropped_long, counts.control_tokens) == (1, 1, 0)


@pytest.mark.parametrize(
    ("chat_format", "tokens"),
    [
        (MISTRAL_FORMAT, ("</s>", "<s>", "<unk>", "[/INST]", "[INST]")),
        (CHATML_FORMAT, ("<|endoftext|>", "<|im_end|>", "<|im_start|>")),
    ],
    ids=["Mistral", "ChatML"],
)
def test_the_control_tokens_of_a_format_are_what_it_writes_round_messages(
    chat_format: ChatFormat, tokens: tuple[str, ...]
) -> None:
    assert control_tokens(chat_format) == tokens


# --- copies but for whitespace and case

COPIES = {
    "case": conversation("QUESTION 2", "answer 2"),
    "whitespace inside": conversation("Question\n\n \t2", "Answer\u00a02"),
    "a long run of spaces": conversation("Question       2", "Answer 2"),
    "whitespace outside": conversation("  Question 2\n", "\u3000Answer 2 "),
    "all of them": conversation(" question\t2", "ANSWER  2\r\n"),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES.keys())
def test_a_validation_row_that_is_a_training_row_but_for_whitespace_and_case_is_counted(
    two_files: Case, copy: Messages
) -> None:
    write(two_files.validation, *numbered(2, start=100), "", copy, copy)
    counts = two_files.prepare().statistics
    assert (counts["validation"].normalised_leaks, counts["validation"].first_leak) == (2, (3, 4))
    assert (counts["train"].normalised_leaks, counts["train"].first_leak) == (0, None)


OTHERS = {
    "joined words": conversation("Question2", "Answer 2"),
    "another order": conversation("Answer 2", "Question 2"),
    "a system message": conversation("Question 2", "Answer 2", system="Be kind."),
    "other ends of messages": conversation("Question", "2 Answer 2"),
    "more turns": conversation("Question 2", "Answer 2", "Question 2", "Answer 2"),
    "punctuation": conversation("Question 2.", "Answer 2"),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_whatever_else_differs_is_no_copy(two_files: Case, other: Messages) -> None:
    write(two_files.validation, other)
    assert two_files.prepare().statistics["validation"].normalised_leaks == 0


def test_case_is_folded_as_unicode_does(two_files: Case) -> None:
    write(two_files.train, conversation("Straße", "Ça"), *numbered(3))
    write(two_files.validation, conversation("STRASSE", "ça"))
    assert two_files.prepare().statistics["validation"].first_leak == (1, 1)


@settings(max_examples=100, deadline=None)
@given(texts=st.tuples(st.text(st.characters(max_codepoint=127)), st.text(st.characters(max_codepoint=127))))
def test_the_fast_way_for_ascii_and_the_other_tell_the_same_copies(texts: tuple[str, str]) -> None:
    slow = conversation(*(f"\u00a0{text}\u00a0" for text in texts))
    assert encode._normalised_digest(conversation(*texts)) == encode._normalised_digest(slow)


def test_copies_within_one_split_are_no_leak(case: Case) -> None:
    write(case.train, *numbered(5), conversation("question 1", "answer 1"))
    write(case.validation, *numbered(1, start=50), conversation("question 50", "answer 50"))
    assert case.prepare().statistics["validation"].normalised_leaks == 0


# --- a preview


def first_row(case: Case, row: Messages, width: int, recipe: Recipe = RECIPE) -> list[tuple[str, bool]]:
    write(case.train, row)
    write(case.validation, conversation("Something", "else"))
    return preview(case.prepare(replace(recipe, max_seq_length=4096)), width)


def test_a_preview_tells_what_carries_loss_by_marks(case: Case) -> None:
    parts = first_row(case, TWO_TURNS, 200)
    assert parts == [
        ("<s> [INST] Hi [/INST]", False),
        (" Hello</s>", True),
        (" [INST] Hi [/INST]", False),
        (" Yes</s>", True),
    ]
    assert marked(parts) == "<s> [INST] Hi [/INST]>> Hello</s><< [INST] Hi [/INST]>> Yes</s><<"


def test_a_preview_is_of_the_stored_ids_with_the_configs_prompt_and_cut(case: Case) -> None:
    write(case.train, TWO_TURNS)
    write(case.validation, conversation("Hi", "No"))
    prepared = case.prepare(replace(RECIPE, max_seq_length=20, system_prompt="Be kind."))
    assert marked(preview(prepared, 200)) == "<s> [INST] Be kind.\\n\\nHi [/INST]>> Hello</s><<"


def test_a_preview_of_a_long_row_keeps_both_ends_of_each_turn(case: Case) -> None:
    parts = first_row(case, conversation("Hi " * 100, "Hello " * 100 + "you"), 65)
    assert marked(parts) == "<s> [INST] H ...  Hi  [/INST]>> Hello Hello ... ello you</s><<"


def test_a_preview_of_many_turns_says_that_some_are_left_out(case: Case) -> None:
    parts = first_row(case, conversation(*["Hi", "Hello"] * 30), 60)
    assert marked(parts) == "<s> [INST] Hi [/INST]>> Hello</s><< ... "


odd_texts = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip) | st.sampled_from(
    ["</s>", "<s>", "[INST]", "<unk>", "\x1b[31m", "\ufffd", "\U0001f642", "a\u0301", "\u202e", "\r\n.", "  . "]
)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.tuples(odd_texts, odd_texts), min_size=1, max_size=5), width=st.integers(50, 120))
def test_a_preview_of_any_row_fits_its_width_on_one_safe_line(
    tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[str, str]], width: int
) -> None:
    parts = first_row(Case(tmp_path_factory.mktemp("preview")), conversation(*sum(texts, ())), width)
    assert sum(len(text) for text, _ in parts) <= width
    assert {supervised for _, supervised in parts} == {False, True}
    assert all(character == clean(character) and character != "\n" for text, _ in parts for character in text)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.tuples(odd_texts, odd_texts), min_size=1, max_size=4))
def test_segments_joined_are_the_decoded_row(texts: list[tuple[str, str]]) -> None:
    chat = the_chat(None)
    input_ids, labels, _ = chat.encode([conversation(*sum(texts, ()))])[0]
    found = segments(chat, input_ids, labels)
    assert "".join(text for text, _ in found) == chat.tokenizer.decode(input_ids, skip_special_tokens=False)
    assert [supervised for _, supervised in found] == [False, True] * len(texts)


# --- bad rows


def test_one_bad_row_is_told_as_file_and_line(case: Case) -> None:
    write(case.train, SHORT, "", conversation("Hi"))
    assert case.failure(DataError) == (
        "data: 1 bad row\n"
        f"  {case.train}:3: ends with user, wanted an assistant message last\n"
        "Mend them, or leave them out with --set dataset.on_bad_row=drop"
    )


@pytest.mark.parametrize(("bad", "more"), [(20, []), (21, ["  ... and 1 more"]), (600, ["  ... and 580 more"])])
def test_twenty_bad_rows_are_listed_and_the_others_counted(case: Case, bad: int, more: list[str]) -> None:
    write(case.train, SHORT, *["{}"] * bad, SHORT)
    listed = [f'  {case.train}:{line}: no "messages" key (found no key)' for line in range(2, 22)]
    advice = "Mend them, or leave them out with --set dataset.on_bad_row=drop"
    assert case.failure(DataError) == "\n".join([f"data: {bad} bad rows", *listed, *more, advice])


def test_bad_rows_of_the_validation_file_are_told_with_its_name(two_files: Case) -> None:
    write(two_files.validation, SHORT, "{}")
    assert two_files.failure(DataError) == (
        f'data: 1 bad row\n  {two_files.validation}:2: no "messages" key (found no key)\n'
        "Mend them, or leave them out with --set dataset.on_bad_row=drop"
    )


def test_dropped_rows_are_counted_and_listed_all(case: Case) -> None:
    write(case.train, SHORT, *["{}"] * 30)
    write(case.validation, conversation("Hi", "No"), "{}")
    statistics = case.prepare(on_bad_row="drop").statistics
    assert (statistics["train"].dropped_bad, statistics["validation"].dropped_bad) == (30, 1)
    assert [number for number, _ in statistics["train"].bad] == list(range(2, 32))
    assert statistics["train"].rows == 1


# --- files and the split


def test_a_validation_file_is_used_as_it_is(two_files: Case) -> None:
    prepared = two_files.prepare()
    assert (lines(prepared.train), lines(prepared.validation)) == ([1, 2, 3, 4, 5], [1, 2])
    assert prepared.split_reason == f"validation rows are those of {two_files.validation}"
    assert [entry["path"] for entry in prepared.files.values()] == [str(two_files.train), str(two_files.validation)]


def test_without_a_validation_file_a_share_of_the_rows_is_held_out(case: Case) -> None:
    write(case.train, *numbered(40))
    prepared = case.prepare(validation_split=0.25)
    assert prepared.split_reason == "no validation file: 25% of the rows, chosen by content, are held out"
    assert sorted(lines(prepared.train) + lines(prepared.validation)) == list(range(1, 41))
    assert prepared.files.keys() == {"train"}
    assert prepared.files["train"]["rows"] == 40
    assert sum(prepared.statistics[name].rows for name in ("train", "validation")) == 40


def test_of_the_training_file_only_so_many_rows_are_read_and_its_share_is_held_out_of_these(case: Case) -> None:
    write(case.train, *numbered(30), "", *numbered(10, start=30), "{}")
    whole, few = (
        case.prepare(validation_split=0.25, on_bad_row="drop"),
        case.prepare(validation_split=0.25, max_rows=35),
    )
    for rows, all_rows in ((few.train, whole.train), (few.validation, whole.validation)):
        assert lines(rows) == [line for line in lines(all_rows) if line <= 36]  # a blank line is no row
    assert len(lines(few.train) + lines(few.validation)) == few.files["train"]["rows"] == 35
    assert few.split_reason == (
        "no validation file: 25% of the rows, chosen by content, are held out; "
        f"of {case.train} only the first 35 rows are read (dataset.max_rows)"
    )


def test_a_validation_file_stays_whole_however_few_training_rows_are_read(two_files: Case) -> None:
    write(two_files.validation, *numbered(4, start=100))
    prepared = two_files.prepare(max_rows=3)
    assert (lines(prepared.train), lines(prepared.validation)) == ([1, 2, 3], [1, 2, 3, 4])
    assert prepared.split_reason == (
        f"validation rows are those of {two_files.validation}; "
        f"of {two_files.train} only the first 3 rows are read (dataset.max_rows)"
    )


def test_too_few_rows_for_a_split_are_told_with_the_limit_to_raise(case: Case) -> None:
    write(case.train, *numbered(40))
    assert case.failure(DataError, validation_split=0.01, max_rows=3) == (
        f"data: {case.train} leaves no row for validation (3 to train on); name a dataset.validation_file, "
        "raise dataset.max_rows above 3, or raise dataset.validation_split"
    )


def test_the_default_validation_file_may_be_absent(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "ROOT", case.folder)
    write(case.train, *numbered(40))
    prepared = case.prepare(train_file="train.jsonl", validation_file="data/processed/val.jsonl", validation_split=0.1)
    assert prepared.split_reason == (
        "data/processed/val.jsonl is not there: 10% of the rows, chosen by content, are held out"
    )
    assert len(prepared.validation.lengths)


def test_the_default_validation_file_is_used_where_it_is(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "ROOT", case.folder)
    (case.folder / "data" / "processed").mkdir(parents=True)
    write(case.train, *numbered(5))
    write(case.folder / "data" / "processed" / "val.jsonl", *numbered(2, start=100))
    prepared = case.prepare(train_file="train.jsonl", validation_file="data/processed/val.jsonl")
    assert prepared.split_reason == "validation rows are those of data/processed/val.jsonl"
    assert lines(prepared.validation) == [1, 2]


def test_another_absent_validation_file_is_a_config_error(case: Case) -> None:
    write(case.train, *numbered(5))
    absent = case.folder / "absent.jsonl"
    assert case.failure(ConfigError, validation_file=str(absent)) == (
        f"config: 1 problem\n  dataset.validation_file: {absent}: not there; set a file that is, or null for a split"
    )


def test_an_absent_train_file_is_a_config_error(case: Case) -> None:
    assert case.failure(ConfigError) == (
        f"config: 1 problem\n  {case.train}: No such file or directory; put your JSONL there, "
        "or try with --set dataset.train_file=data/sample/train.jsonl"
    )


def test_adding_rows_never_moves_old_rows(case: Case) -> None:
    rows = numbered(120)
    held_out: dict[str, bool] = {}
    for present in (rows[:30], rows[:60], rows[90:] + rows[:60], list(reversed(rows))):
        write(case.train, *present)
        prepared = case.prepare(validation_split=0.3)
        for split, is_held_out in ((prepared.train, False), (prepared.validation, True)):
            for line in lines(split):
                question = present[line - 1][0]["content"]
                assert held_out.setdefault(question, is_held_out) == is_held_out
    assert set(held_out.values()) == {True, False}
    assert len(held_out) == 120


def test_neither_length_nor_system_prompt_moves_a_row(case: Case) -> None:
    write(case.train, *numbered(60))
    recipes = RECIPE, replace(RECIPE, max_seq_length=32), replace(RECIPE, system_prompt=SYSTEM_PROMPT)
    assert len({tuple(lines(case.prepare(recipe).validation)) for recipe in recipes}) == 1


def test_the_same_row_twice_is_on_one_side_of_a_split(case: Case) -> None:
    write(case.train, *numbered(30), *numbered(30))
    prepared = case.prepare()
    assert all((line + 30 in lines(prepared.train)) for line in lines(prepared.train) if line <= 30)
    duplicates = [prepared.statistics[name].duplicates for name in ("train", "validation")]
    assert sum(duplicates) == 30


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_about_the_share_asked_for_is_held_out(case: Case, share: float) -> None:
    write(case.train, *numbered(1500))
    held_out = case.prepare(validation_split=share).statistics["validation"].rows
    deviation = (1500 * share * (1 - share)) ** 0.5
    assert abs(held_out - 1500 * share) < 3 * deviation


@pytest.mark.parametrize("text", ["", "\n \n\r\n\t\n"], ids=["empty", "blank"])
def test_a_train_file_without_rows_is_a_data_error(case: Case, text: str) -> None:
    case.train.write_text(text)
    assert case.failure(DataError) == f"data: {case.train} leaves no row to train on; add rows"


def test_rows_that_are_all_too_long_are_a_data_error_that_says_so(case: Case) -> None:
    write(case.train, NO_TURN_FITS, NO_TURN_FITS)
    write(case.validation, SHORT)
    assert case.failure(DataError, replace(RECIPE, max_seq_length=16)) == (
        f"data: {case.train} leaves no row to train on (2 were longer than model.max_seq_length); "
        "raise model.max_seq_length"
    )


def test_a_split_that_leaves_no_validation_row_is_a_data_error(case: Case) -> None:
    write(case.train, *numbered(3))
    assert case.failure(DataError, validation_split=1e-9) == (
        f"data: {case.train} leaves no row for validation (3 to train on); "
        "name a dataset.validation_file, add rows, or raise dataset.validation_split"
    )


def test_an_empty_validation_file_is_a_data_error_that_names_it(two_files: Case) -> None:
    two_files.validation.write_text("\n")
    assert two_files.failure(DataError) == (
        f"data: {two_files.validation} leaves no row for validation (5 to train on); "
        "name a dataset.validation_file, add rows, or raise dataset.validation_split"
    )


def test_a_row_in_both_files_is_a_data_error_that_names_both_lines(two_files: Case) -> None:
    rows = numbered(5)
    write(two_files.train, rows[0], "", rows[1], rows[2])
    write(two_files.validation, "", *numbered(3, start=50), rows[1])
    message = two_files.failure(DataError)
    assert message.startswith("data: 1 ")
    assert f"{two_files.train}:3 is {two_files.validation}:5; remove" in message
    assert message.endswith("remove them from one")


def test_a_row_in_both_files_is_found_whatever_the_system_prompt(two_files: Case) -> None:
    write(two_files.validation, numbered(1)[0])
    assert f"{two_files.train}:1 is {two_files.validation}:1" in two_files.failure(
        DataError, replace(RECIPE, system_prompt=SYSTEM_PROMPT)
    )


# --- the certificate


class LyingReference(Reference):
    """Says another last token of one row."""

    def encode(self, messages: Messages) -> tuple[list[int], list[int]]:
        input_ids, labels = super().encode(messages)
        if messages[-1]["content"] == "Answer 2":
            return [*input_ids[:-1], 7], [*labels[:-1], 7]
        return input_ids, labels


def test_the_certificate_compares_every_row(two_files: Case) -> None:
    statistics = two_files.prepare(replace(RECIPE, certificate=True)).statistics
    assert (statistics["train"].certified, statistics["validation"].certified) == (5, 2)


def test_without_the_certificate_no_row_is_compared(two_files: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "Reference", LyingReference)
    statistics = two_files.prepare(replace(RECIPE, certificate=False)).statistics
    assert (statistics["train"].certified, statistics["validation"].certified) == (0, 0)


def test_a_row_whose_tokens_are_not_mistral_commons_fails_the_certificate_by_file_and_line(
    two_files: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "Reference", LyingReference)
    write(two_files.train, *numbered(2), "", *numbered(3, start=2))
    last = length(numbered(1, start=2)[0]) - 1
    assert two_files.failure(CheckFailed, replace(RECIPE, certificate=True)) == (
        f"certificate: {two_files.train}:4: token {last} is 2+, mistral-common says 7+\n"
        "Report this row: no run may start on it."
    )


DIFFERENCES: dict[str, tuple[Any, str]] = {
    "a token": (
        lambda ids, labels: ([*ids[:3], 7, *ids[4:]], labels),
        "3 is 28793 15359 733, mistral-common says 7 15359 733",
    ),
    "only a label": (lambda ids, labels: (ids, [*labels[:-1], IGNORED]), "10 is 2+, mistral-common says 2"),
    "one token less": (lambda ids, labels: (ids[:-1], labels[:-1]), "10 is 2+, mistral-common says the end"),
    "one token more": (lambda ids, labels: ([*ids, 5], [*labels, 5]), "11 is the end, mistral-common says 5+"),
    "two beginnings": (
        lambda ids, labels: ([1, *ids], [IGNORED, *labels]),
        "1 is 733 16289 28793, mistral-common says 1 733 16289",
    ),
}


@pytest.mark.parametrize(("change", "told"), DIFFERENCES.values(), ids=DIFFERENCES.keys())
def test_the_certificate_finds_any_difference(monkeypatch: pytest.MonkeyPatch, change: Any, told: str) -> None:
    class Different(Reference):
        def encode(self, messages: Messages) -> tuple[list[int], list[int]]:
            return change(*super().encode(messages))

    monkeypatch.setattr(encode, "Reference", Different)
    chunk = Encoder(replace(RECIPE, certificate=True)).encode([(3, json.dumps({"messages": SHORT}).encode())])
    assert chunk.mismatch is not None
    assert chunk.mismatch == f"3: token {told}"


# --- the system prompt


def test_the_system_prompt_leads_only_rows_without_one(case: Case) -> None:
    rows = [conversation("Hi", "Yes"), conversation("Hi", "No", system="Be short.")]
    write(case.train, *rows)
    write(case.validation, SHORT)
    prepared = case.prepare(replace(RECIPE, system_prompt=SYSTEM_PROMPT, certificate=True))
    wanted = the_chat(None).encode([conversation("Hi", "Yes", system=SYSTEM_PROMPT), rows[1]])
    assert contents(prepared.train) == [(line, row.input_ids, row.labels) for line, row in enumerate(wanted, 1)]
    assert prepared.statistics["train"].certified == 2


def test_no_system_prompt_leaves_every_row_as_it_is() -> None:
    assert with_system_prompt(SHORT, None) == SHORT
    assert with_system_prompt(SHORT, SYSTEM_PROMPT) == conversation("Hi", "Hello", system=SYSTEM_PROMPT)
    assert with_system_prompt(conversation("a", "b", system="c"), SYSTEM_PROMPT) == conversation("a", "b", system="c")


# --- the cache


def no_encoder(*_: Any) -> None:
    raise AssertionError("rows are encoded again")


def same(first: Prepared, second: Prepared) -> bool:
    return (
        contents(first.train) == contents(second.train)
        and contents(first.validation) == contents(second.validation)
        and (first.statistics, first.sequences, first.files, first.tokens, first.split_reason)
        == (second.statistics, second.sequences, second.files, second.tokens, second.split_reason)
        and first.whole == second.whole
    )


def test_a_second_time_the_rows_come_from_the_cache(two_files: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    write(two_files.train, SHORT, TWO_TURNS, "{}")
    first = two_files.prepare(packing=True, on_bad_row="drop")
    monkeypatch.setattr(encode, "Encoder", no_encoder)
    assert same(two_files.prepare(packing=True, on_bad_row="drop"), first)
    assert len(two_files.caches()) == 1


def test_the_same_content_in_another_place_comes_from_the_cache(
    two_files: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_files.prepare()
    moved = shutil.copy(two_files.train, two_files.folder / "moved.jsonl")
    monkeypatch.setattr(encode, "Encoder", no_encoder)
    assert two_files.prepare(train_file=str(moved)).files["train"]["path"] == str(moved)


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "length": ({"max_seq_length": 63}, {}),
    "system prompt": ({"system_prompt": SYSTEM_PROMPT}, {}),
    "truncation": ({"truncation": False}, {}),
    "certificate": ({"certificate": True}, {}),
    "what a bad row does": ({}, {"on_bad_row": "drop"}),
    "split": ({}, {"validation_split": 0.4}),
    "no validation file": ({}, {"validation_file": None}),
    "rows read": ({}, {"max_rows": 10}),
}  # fmt: skip


@pytest.mark.parametrize(("of_recipe", "of_dataset"), CHANGES.values(), ids=CHANGES.keys())
def test_a_change_of_what_decides_a_token_makes_a_new_cache(
    two_files: Case, of_recipe: dict[str, Any], of_dataset: dict[str, Any]
) -> None:
    write(two_files.train, *numbered(20))
    two_files.prepare()
    two_files.prepare(replace(RECIPE, **of_recipe), **of_dataset)
    assert len(two_files.caches()) == 2


@pytest.mark.parametrize("name", ["train", "validation"])
def test_changed_content_makes_a_new_cache(two_files: Case, name: str) -> None:
    two_files.prepare()
    path: Path = getattr(two_files, name)
    path.write_text(path.read_text().replace("Answer", "Reply"))
    two_files.prepare()
    assert len(two_files.caches()) == 2


def test_another_tokenizer_or_template_makes_a_new_cache(two_files: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    two_files.prepare()
    other: Chat = replace(the_chat(None), fingerprint="another")
    monkeypatch.setattr(prepare_module, "load_chat", lambda _: other)
    two_files.prepare()
    assert len(two_files.caches()) == 2


@pytest.mark.parametrize("name", ["template.py", "tokenizer.py", "jsonl.py", "encode.py", "store.py", "prepare.py"])
def test_changed_code_makes_a_new_cache(two_files: Case, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    two_files.prepare()
    code = two_files.folder / "code"
    shutil.copytree(Path(prepare_module.__file__).parent, code)
    monkeypatch.setattr(prepare_module, "__file__", str(code / "prepare.py"))
    two_files.prepare()
    assert len(two_files.caches()) == 1
    (code / name).write_text((code / name).read_text() + "\n# another version\n")
    two_files.prepare()
    assert len(two_files.caches()) == 2


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_crash_midway_leaves_nothing_in_the_cache(
    two_files: Case, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    write_chunk, seen = SplitWriter.write, []

    def crash(self: SplitWriter, chunk: Any, mine: np.ndarray) -> None:
        write_chunk(self, chunk, mine)
        seen.append(chunk)
        if len(seen) == 3:
            assert [name for name in two_files.caches() if name.endswith(".partial")]
            raise error

    with monkeypatch.context() as crashing:
        crashing.setattr(SplitWriter, "write", crash)
        with pytest.raises(error):
            two_files.prepare()
    assert two_files.caches() == []
    assert lines(two_files.prepare().train) == [1, 2, 3, 4, 5]


def test_what_a_killed_process_of_the_same_number_left_stands_in_no_ones_way(
    two_files: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as killed:  # as kill -9 does: no clean-up runs
        killed.setattr(prepare_module, "_check_splits", no_encoder)
        killed.setattr(prepare_module.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(AssertionError):
            two_files.prepare()
    assert [name for name in two_files.caches() if name.endswith(".partial")]
    assert lines(two_files.prepare().train) == [1, 2, 3, 4, 5]  # in a container the number is the same every time


def test_packing_is_no_part_of_the_cache(two_files: Case) -> None:
    assert two_files.prepare(packing=False).sequences is None
    assert two_files.prepare(replace(RECIPE, max_seq_length=64), packing=True).sequences == [[0, 1, 2, 3], [4]]
    assert len(two_files.caches()) == 1


# --- worker processes


def test_one_process_and_two_workers_make_the_same_rows(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Messages | str] = [
        *numbered(600),
        *numbered(40),
        NO_TURN_FITS,
        conversation("Hi", "Hello " * 40, "a", "b"),
    ]
    rows[300] = "{}"
    rows[10] = "not JSON"
    write(case.train, *rows)
    prepared = []
    for workers, chunk_lines in ((0, 256), (2, 64)):
        monkeypatch.setattr(encode, "CHUNK_LINES", chunk_lines)  # more chunks than may wait for two workers
        case.cache = case.folder / f"cache-{workers}"
        prepared.append(
            case.prepare(replace(RECIPE, max_seq_length=24, certificate=True), on_bad_row="drop", workers=workers)
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


# --- rows


messages_of_rows = st.lists(
    st.tuples(st.integers(1, 10**6), st.lists(st.integers(0, 31999), min_size=1, max_size=9)), min_size=1, max_size=12
)


def written(folder: Path, rows: list[tuple[int, list[int]]], chunk_rows: int) -> tuple[Rows, dict[str, str]]:
    """Rows with labels that ignore even ids, written in chunks of `chunk_rows`."""
    writer = SplitWriter(folder / "rows.arrow")
    for start in range(0, len(rows), chunk_rows):
        part = rows[start : start + chunk_rows]
        ids = np.array([token for _, row in part for token in row], np.int32)
        chunk = encode.Chunk(
            np.array([line for line, _ in part], np.int32),
            np.arange(start, start + len(part)).astype(np.uint64),
            np.arange(start, start + len(part)).astype(np.uint64),
            np.zeros(len(part), bool),
            np.array([len(row) for _, row in part], np.int32),
            np.array([len(row) for _, row in part], np.int32),
            np.zeros((len(part), 16), np.uint8),
            np.zeros((len(part), 16), np.uint8),
            ids,
            np.where(ids % 2, ids, IGNORED).astype(np.int32),
            Statistics(),
            None,
        )
        writer.write(chunk, np.ones(len(part), bool))
        writer.write(chunk, np.zeros(len(part), bool))
    hashes = writer.close()
    return Rows(folder / "rows.arrow"), hashes


def labelled(row: list[int]) -> list[int]:
    return [token if token % 2 else IGNORED for token in row]


@settings(max_examples=60, deadline=None)
@given(rows=messages_of_rows, chunk_rows=st.integers(1, 5))
def test_rows_read_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, list[int]]], chunk_rows: int
) -> None:
    read, hashes = written(tmp_path_factory.mktemp("rows"), rows, chunk_rows)
    assert contents(read) == [(line, row, labelled(row)) for line, row in rows]
    assert read.lengths.tolist() == [len(row) for _, row in rows]
    assert hashes == written(tmp_path_factory.mktemp("rows"), rows, 100)[1]


ROWS = [(3, [1, 10, 11]), (5, [1, 12, 13, 15]), (9, [1, 17])]


# Examples are plain lists: from int32 arrays torch would make labels that cross_entropy refuses.
def test_a_dataset_has_one_example_a_row(tmp_path: Path) -> None:
    dataset = written(tmp_path, ROWS, 2)[0].dataset(None)
    assert [dataset[index] for index in range(len(dataset))] == [
        {"input_ids": row, "labels": labelled(row), "lines": [line]} for line, row in ROWS
    ]


def test_a_packed_dataset_has_one_example_a_sequence_with_lines_and_lengths(tmp_path: Path) -> None:
    dataset = written(tmp_path, ROWS, 2)[0].dataset([[1], [0, 2]])
    assert [dataset[index] for index in range(len(dataset))] == [
        {"input_ids": ROWS[1][1], "labels": labelled(ROWS[1][1]), "lines": [5], "seq_lengths": [4]},
        {
            "input_ids": [1, 10, 11, 1, 17],
            "labels": [1, IGNORED, 11, 1, 17],
            "lines": [3, 9],
            "seq_lengths": [3, 2],
        },
    ]


def test_the_token_hash_is_of_the_int32_stream_in_file_order(tmp_path: Path) -> None:
    hashes = written(tmp_path, ROWS, 2)[1]
    for name, stream in (("input_ids", lambda row: row), ("labels", labelled)):
        values = np.array([token for _, row in ROWS for token in stream(row)], "<i4")
        assert hashes[name] == hashlib.sha256(values.tobytes()).hexdigest()


# --- later findings


def test_bad_rows_of_both_files_are_listed_at_once(case: Case) -> None:
    write(case.train, SHORT, "{}")
    write(case.validation, conversation("Hi", "No"), "[]")
    assert case.failure(DataError) == (
        "data: 2 bad rows\n"
        f'  {case.train}:2: no "messages" key (found no key)\n'
        f'  {case.validation}:2: found an empty list, wanted an object {{"messages": [...]}}\n'
        "Mend them, or leave them out with --set dataset.on_bad_row=drop"
    )


def test_a_cut_row_is_counted_in_the_split_it_goes_to(case: Case) -> None:
    write(case.train, SHORT)
    write(case.validation, TWO_TURNS)
    counts = case.prepare(replace(RECIPE, max_seq_length=16)).statistics
    assert (counts["train"].truncated, counts["validation"].truncated) == (0, 1)
    assert (counts["train"].longest, counts["validation"].longest) == (11, 21)


def test_workers_are_the_cores_this_process_may_use_and_not_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module.os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert prepare_module.worker_count() == 3
    monkeypatch.setattr(prepare_module.os, "sched_getaffinity", lambda _: set(range(100)), raising=False)
    assert prepare_module.worker_count() == 8


def test_a_worker_that_is_killed_is_told_as_want_of_memory(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, *arguments: Any) -> None: ...

        def __enter__(self) -> Broken:
            return self

        def __exit__(self, *exception: object) -> None: ...

        def submit(self, *arguments: Any) -> None:
            raise BrokenProcessPool

    monkeypatch.setattr(encode, "ProcessPoolExecutor", Broken)
    write(case.train, SHORT)
    with pytest.raises(OutOfResource) as failure:
        list(encode.chunks(case.train, RECIPE, 2))
    assert str(failure.value) == (
        f"{case.train}: a process that encodes it was killed, probably for want of memory; free some and try again"
    )
