"""Files become checked, split and cached rows; what is wrong with them is told at once."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune import files
from finetune.data import workers
from finetune.data.jsonl import convert_command
from finetune.data.template import Messages
from finetune.errors import ConfigError, DataError
from support.conversations import conversation, weighted
from support.prepared import (
    NO_TURN_FITS,
    RECIPE,
    SHORT,
    SYSTEM_PROMPT,
    Case,
    contents,
    lines,
    numbered,
    places,
    same,
    write,
)

# --- bad rows


def convert(case: Case) -> str:
    """The command that converts the training file."""
    return convert_command(case.train)


def test_one_bad_row_is_told_as_file_and_line(case: Case) -> None:
    write(case.train, SHORT, "", conversation("Hi"))
    assert case.failure(DataError) == (
        "data: 1 bad row\n"
        f"  {case.train}:3: ends with user, expected an assistant message last\n"
        "Fix them, or leave them out with --set dataset.on_bad_row=drop"
    )


@pytest.mark.parametrize("on_bad_row", ["fail", "drop"])
def test_a_file_without_any_json_is_one_message(case: Case, on_bad_row: str) -> None:
    case.train.write_text("Not JSON.\n" * 30, encoding="utf-8")
    assert case.failure(DataError, on_bad_row=on_bad_row, max_bad_share=0.1) == (
        f"data: 30 bad rows, none of the first 20 is JSON; {case.train}:1: not JSON: Expecting value at column 1\n"
        'Write each conversation on one line, as {"messages": [...]}; '
        "docs/data.md has the formats that can be converted"
    )


@pytest.mark.parametrize(("bad", "more"), [(20, []), (21, ["  ... and 1 more"])])
def test_twenty_bad_rows_are_listed_and_the_others_counted(case: Case, bad: int, more: list[str]) -> None:
    write(case.train, SHORT, *["{}"] * bad, *numbered(bad))
    listed = [f'  {case.train}:{line}: no "messages" key (found no key)' for line in range(2, 22)]
    advice = "Fix them, or leave them out with --set dataset.on_bad_row=drop"
    assert case.failure(DataError) == "\n".join([f"data: {bad} bad rows", *listed, *more, advice])


def test_where_more_than_half_of_the_rows_are_bad_nobody_is_advised_to_leave_them_out(case: Case) -> None:
    write(case.train, SHORT, *["{}"] * 2)
    assert case.failure(DataError) == (
        f'data: 2 bad rows\n  {case.train}:2: no "messages" key (found no key)\n'
        f'  {case.train}:3: no "messages" key (found no key)\n'
        "Fix them: more than half of the rows are bad. docs/data.md has the formats that can be converted"
    )


def test_advice_to_leave_rows_out_names_the_share_that_has_to_be_allowed(case: Case) -> None:
    write(case.train, *["{}"] * 3, *numbered(20))
    assert case.failure(DataError, max_bad_share=0.1).splitlines()[-1] == (
        "Fix them, or leave them out with --set dataset.on_bad_row=drop --set dataset.max_bad_share=0.14"
    )


def test_too_large_a_share_of_bad_rows_is_not_left_out_and_the_first_five_are_listed(case: Case) -> None:
    write(case.train, *["{}"] * 6, *numbered(34))
    listed = [f'  {case.train}:{line}: no "messages" key (found no key)' for line in range(1, 6)]
    assert case.failure(DataError, on_bad_row="drop", max_bad_share=0.1) == "\n".join(
        [
            "data: 6 bad rows of 40 (15%), above dataset.max_bad_share (10%)",
            *listed,
            "  ... and 1 more",
            "Fix them, or leave them out with --set dataset.max_bad_share=0.15",
        ]
    )
    assert case.prepare(on_bad_row="drop", max_bad_share=0.15).statistics["train"].dropped_bad == 6


def test_a_first_bad_row_of_a_known_format_is_named_once(case: Case) -> None:
    shared = json.dumps({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]})
    write(case.train, *numbered(30), *[shared] * 30)
    assert case.failure(DataError) == (
        f"data: 30 bad rows, the first {case.train}:31: this looks like ShareGPT (conversations/from/value)\n"
        f"Convert it: {convert(case)}"
    )


def test_a_known_format_is_named_though_the_first_bad_rows_are_of_none(case: Case) -> None:
    pair = json.dumps({"prompt": "Hi", "completion": "Hello"})
    write(case.train, "{", *[pair] * 2)
    assert case.failure(DataError) == (
        f"data: 3 bad rows, for example {case.train}:2: this looks like prompt and completion (prompt/completion)\n"
        f"Convert it: {convert(case)}"
    )


def chat(*messages: dict[str, Any], **keys: Any) -> str:
    return json.dumps({"messages": messages, **keys})


ASKED, ANSWERED = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CONVERTED = {
    "two turns of one role": (chat(ASKED, ASKED, ANSWERED),
        "message 2 is from user, expected assistant", " --merge-turns"),
    "a name": (chat(ASKED | {"name": "Ann"}, ANSWERED),
        "message 1 has a key 'name', expected only role and content", ""),
    "a label": (chat(ASKED, ANSWERED, label=True),
        "has a key 'label': it marks answers as good or bad, and bad ones would be learned", ""),
    "no last answer": (chat(ASKED, ANSWERED, ASKED), "ends with user, expected an assistant message last", ""),
}  # fmt: skip


@pytest.mark.parametrize(("row", "found", "flag"), CONVERTED.values(), ids=CONVERTED.keys())
def test_a_row_that_a_conversion_keeps_is_answered_with_its_command(
    case: Case, row: str, found: str, flag: str
) -> None:
    write(case.train, *numbered(1), row, *numbered(2, start=1))
    told = f"data: 1 bad row\n  {case.train}:2: {found}\nConvert it: {convert(case)}{flag}"
    assert case.failure(DataError) == f"{told}\nOr leave them out with --set dataset.on_bad_row=drop"
    write(case.train, "{}", row)
    assert case.failure(DataError).splitlines()[-1] == f"Convert it: {convert(case)}{flag}"


def test_rows_of_unknown_keys_are_answered_with_the_flag_that_names_them(case: Case) -> None:
    write(case.train, '{"Q": "Hi", "A": "Hello"}')
    assert case.failure(DataError) == (
        f"data: 1 bad row\n  {case.train}:1: no \"messages\" key (found 'Q', 'A')\n"
        f"Convert it: {convert(case)} --columns prompt=Q,completion=A"
    )


def test_a_validation_file_of_another_format_is_named_before_the_training_file_is_read(two_files: Case) -> None:
    write(two_files.validation, json.dumps({"prompt": "Hi", "completion": "Hello"}))
    assert two_files.failure(DataError) == (
        f"data: {two_files.validation}: this looks like prompt and completion (prompt/completion)\n"
        f"Convert it: {convert_command(two_files.validation, 'validation')}"
    )


def test_dropped_rows_are_counted_and_listed_all(case: Case) -> None:
    write(case.train, SHORT, *["{}"] * 30)
    write(case.validation, conversation("Hi", "No"), "{}")
    statistics = case.prepare(on_bad_row="drop").statistics
    assert (statistics["train"].dropped_bad, statistics["validation"].dropped_bad) == (30, 1)
    assert [place for place, _ in statistics["train"].bad] == [case.in_train(line) for line in range(2, 32)]
    assert statistics["train"].rows == 1


def test_keys_besides_messages_are_counted_where_their_file_is_read(case: Case) -> None:
    first, second = (json.dumps({"id": index, "messages": row})[:-1] for index, row in enumerate(numbered(2)))
    write(case.train, f'{first}, "system": "Be kind."}}', f"{second}}}", *numbered(2, start=2))
    write(case.validation, f'{second}, "source": "web", "turns": 2}}'.replace("Question", "Another"))
    statistics = case.prepare().statistics
    assert statistics["train"].other_keys == {"id": 2, "system": 1}
    assert statistics["validation"].other_keys == {"id": 1, "source": 1, "turns": 1}


def test_a_gzip_gives_the_rows_of_what_it_holds(two_files: Case) -> None:
    plain = two_files.prepare()
    packed = two_files.folder / "train.jsonl.gz"
    packed.write_bytes(gzip.compress(two_files.train.read_bytes()))
    assert contents(two_files.prepare(train_file=str(packed)).train) == contents(plain.train)


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


def test_max_rows_reads_the_first_rows_and_holds_out_a_share_of_these(case: Case) -> None:
    write(case.train, *numbered(130), "", *numbered(10, start=130), "{}")
    whole, few = (
        case.prepare(validation_split=0.25, on_bad_row="drop"),
        case.prepare(validation_split=0.25, max_rows=135),
    )
    for rows, all_rows in ((few.train, whole.train), (few.validation, whole.validation)):
        assert lines(rows) == [line for line in lines(all_rows) if line <= 136]  # a blank line is no row
    assert len(lines(few.train) + lines(few.validation)) == few.files["train"]["rows"] == 135
    assert few.split_reason == (
        "no validation file: 25% of the rows, chosen by content, are held out; "
        f"only the first 135 rows of {case.train} are read (dataset.max_rows)"
    )


def test_a_validation_file_stays_whole_however_few_training_rows_are_read(two_files: Case) -> None:
    write(two_files.validation, *numbered(4, start=100))
    prepared = two_files.prepare(max_rows=3)
    assert (lines(prepared.train), lines(prepared.validation)) == ([1, 2, 3], [1, 2, 3, 4])
    assert prepared.split_reason == (
        f"validation rows are those of {two_files.validation}; "
        f"only the first 3 rows of {two_files.train} are read (dataset.max_rows)"
    )


def test_a_limit_evaluates_on_rows_at_even_distances_and_trains_on_no_other_row(two_files: Case) -> None:
    write(two_files.validation, *numbered(10, start=100))
    whole, part = two_files.prepare(), two_files.prepare(max_validation_rows=4)
    assert lines(part.validation) == [1, 3, 6, 8]
    assert contents(part.validation) == [contents(whole.validation)[line - 1] for line in (1, 3, 6, 8)]
    assert (lines(part.train), part.statistics) == (lines(whole.train), whole.statistics)
    assert lines(two_files.prepare(max_validation_rows=11).validation) == lines(whole.validation)


def test_the_default_validation_file_is_used_if_it_exists(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "ROOT", case.folder)
    write(case.train, *numbered(40))
    default = "data/processed/val.jsonl"
    named = {"train_file": "train.jsonl", "validation_file": default, "validation_split": 0.1}
    absent = case.prepare(**named)
    assert absent.split_reason == f"no {default}: 10% of the rows, chosen by content, are held out"
    assert len(absent.validation.lengths) == 4
    (case.folder / default).parent.mkdir(parents=True)
    write(case.folder / default, *numbered(2, start=100))
    present = case.prepare(**named)
    assert present.split_reason == f"validation rows are those of {default}"
    assert lines(present.validation) == [1, 2]


def test_another_absent_validation_file_is_a_config_error(case: Case) -> None:
    write(case.train, *numbered(5))
    absent = case.folder / "absent.jsonl"
    assert case.failure(ConfigError, validation_file=str(absent)) == (
        f"config: 1 problem\n  dataset.validation_file: no file {absent}; name an existing file, or null for a split"
    )


def test_an_absent_train_file_is_a_config_error(case: Case) -> None:
    assert case.failure(ConfigError) == (
        f"config: 1 problem\n  {case.train}: No such file or directory; put your JSONL there, "
        "or try with --set dataset.train_file=data/sample/train.jsonl"
    )


def test_adding_rows_never_moves_old_rows(case: Case) -> None:
    rows = numbered(1100)
    held_out: dict[str, bool] = {}
    for present in (rows[:1000], rows[100:] + rows[:50], list(reversed(rows))):
        write(case.train, *present)
        prepared = case.prepare(validation_split=0.3)
        for split, is_held_out in ((prepared.train, False), (prepared.validation, True)):
            for line in lines(split):
                question = present[line - 1][0]["content"]
                assert held_out.setdefault(question, is_held_out) == is_held_out
    assert set(held_out.values()) == {True, False}
    assert len(held_out) == 1100


def test_neither_length_nor_system_prompt_moves_a_row(case: Case) -> None:
    write(case.train, *numbered(60))
    recipes = RECIPE, replace(RECIPE, max_seq_length=32), replace(RECIPE, system_prompt=SYSTEM_PROMPT)
    assert len({tuple(lines(case.prepare(recipe).validation)) for recipe in recipes}) == 1


def variants(number: int) -> list[Messages]:
    """A conversation in which only the answer, case, spaces, forms of characters or later turns differ."""
    question = f"Is it {number} %?"
    return [
        conversation(question, "Yes"),
        conversation(question.upper(), "No"),
        conversation(f"  Is it\n{number}\t%? ", "Maybe"),
        conversation(f"Is it {number} \uff05\uff1f", "Yes"),
        conversation(question, "Yes", "Why?", "Because."),
    ]


def test_variants_of_one_conversation_are_all_held_out_or_all_trained_on(case: Case) -> None:
    write(case.train, *(row for number in range(120) for row in variants(number)))
    prepared = case.prepare()
    for rows in (prepared.train, prepared.validation):
        assert {count for _, count in Counter((line - 1) // 5 for line in lines(rows)).items()} == {5}
    counts = prepared.statistics["validation"]
    assert (counts.normalized_leaks, counts.opening_leaks) == (0, 0)


def test_a_system_message_makes_another_conversation(case: Case) -> None:
    systems = [conversation("Is it so?", "Yes", system=f"You are number {number}.") for number in range(400)]
    write(case.train, *systems)
    assert case.prepare(validation_split=0.25).statistics["validation"].rows in range(70, 130)


@pytest.mark.parametrize(("rows", "held_out"), [(2, 1), (37, 4), (99, 10)])
def test_of_fewer_than_a_hundred_rows_exactly_the_share_is_held_out(case: Case, rows: int, held_out: int) -> None:
    write(case.train, *numbered(rows))
    prepared = case.prepare(validation_split=0.1)
    assert (prepared.statistics["validation"].rows, prepared.statistics["train"].rows) == (held_out, rows - held_out)


def test_copies_that_are_left_out_do_not_count_for_the_share(case: Case) -> None:
    write(case.train, *numbered(20), *numbered(20))
    assert case.prepare(validation_split=0.1).statistics["validation"].rows == 4
    assert case.prepare(validation_split=0.1, on_duplicate="drop").statistics["validation"].rows == 2


def test_of_copies_the_first_one_stays_and_the_others_are_counted(two_files: Case) -> None:
    rows = numbered(3)
    write(two_files.train, rows[0], rows[1], rows[0], rows[2], *[rows[1]] * 300)
    write(two_files.validation, *numbered(1, start=50), *numbered(1, start=50))
    prepared = two_files.prepare(on_duplicate="drop")
    assert (lines(prepared.train), lines(prepared.validation)) == ([1, 2, 4], [1])
    statistics = [prepared.statistics[name] for name in ("train", "validation")]
    assert [(it.rows, it.duplicates, it.dropped_duplicates) for it in statistics] == [(3, 0, 301), (1, 0, 1)]
    assert {name: entry["rows"] for name, entry in prepared.files.items()} == {"train": 3, "validation": 1}
    assert [prepared.whole[name]["rows"] for name in ("train", "validation")] == [3, 1]


@pytest.mark.parametrize("share", [0.02, 0.5])
def test_about_the_share_asked_for_is_held_out(case: Case, share: float) -> None:
    write(case.train, *numbered(1500))
    held_out = case.prepare(validation_split=share).statistics["validation"].rows
    deviation = (1500 * share * (1 - share)) ** 0.5
    assert abs(held_out - 1500 * share) < 3 * deviation


VALID = [SHORT]  # the rows of a validation file
NO_ROW: dict[str, tuple[list[Any], list[Any] | None, dict[str, Any], str]] = {
    "blank lines": (["", " ", "\r", "\t"], VALID, {}, "{train} leaves no row to train on; add rows"),
    "no loss": ([weighted(SHORT, 0), weighted(numbered(1)[0], 0)], VALID, {},
        "{train} leaves no row to train on (in 2 no turn carries loss); remove weight 0 from the answers to train on"),
    "too long": ([NO_TURN_FITS] * 2, VALID, {"recipe": replace(RECIPE, max_seq_length=16)},
        "{train} leaves no row to train on (2 were longer than model.max_seq_length); raise model.max_seq_length"),
    "tiny share": (numbered(1000), None, {"validation_split": 1e-9},
        "{train} leaves no row for validation (1000 to train on); "
        "name a dataset.validation_file, add rows, or raise dataset.validation_split"),
    "tiny share of max_rows": (numbered(1010), None, {"validation_split": 1e-9, "max_rows": 1005},
        "{train} leaves no row for validation (1005 to train on); name a dataset.validation_file, "
        "raise dataset.max_rows above 1005, or raise dataset.validation_split"),
    "one opening": ([conversation("Go on.", f"Answer {number}") for number in range(8)], None, {},
        "{train} leaves no row for validation (8 to train on); all have the same system and first user "
        "message and stay together: name a dataset.validation_file"),
    "empty validation file": (numbered(5), [""], {},
        "{validation} leaves no row for validation (5 to train on); "
        "name a dataset.validation_file, add rows, or raise dataset.validation_split"),
}  # fmt: skip


@pytest.mark.parametrize(("train", "validation", "changes", "found"), NO_ROW.values(), ids=NO_ROW.keys())
def test_a_split_without_rows_is_an_error_that_says_why_and_what_to_do(
    case: Case, train: list[Any], validation: list[Any] | None, changes: dict[str, Any], found: str
) -> None:
    write(case.train, *train)
    if validation is not None:
        write(case.validation, *validation)
    assert case.failure(DataError, **changes) == f"data: {found.format(train=case.train, validation=case.validation)}"


def test_an_empty_train_file_is_a_data_error(case: Case) -> None:
    case.train.touch()
    assert case.failure(DataError) == (
        f'data: {case.train} is empty (0 bytes); expected {{"messages": [...]}}, one conversation a line'
    )


def test_rows_without_loss_are_good_rows_of_which_the_bad_ones_are_a_share(case: Case) -> None:
    write(case.train, SHORT, *(weighted(row, 0) for row in numbered(7)), "{}")
    write(case.validation, conversation("Hi", "No"))
    assert case.prepare(on_bad_row="drop", max_bad_share=0.1).statistics["train"].dropped_bad == 1
    assert case.failure(DataError, on_bad_row="drop", max_bad_share=0.09).startswith(
        "data: 1 bad row of 10 (10%), above dataset.max_bad_share (9%)\n"
    )


# --- several training files


@pytest.fixture
def several(case: Case) -> Case:
    """a.jsonl has questions 0 to 199, b.jsonl 200 to 399."""
    write(case.folder / "a.jsonl", *numbered(200))
    write(case.folder / "b.jsonl", *numbered(200, start=200))
    return case


def named(case: Case, *files: str | tuple[str, float]) -> dict[str, Any]:
    """The setting for training files of the case's folder, some with a weight."""
    found: list[Any] = []
    for file in files:
        name, weight = (file, None) if isinstance(file, str) else file
        path = str(case.folder / name)
        found.append(path if weight is None else {"path": path, "weight": weight})
    return {"train_file": found}


def test_several_files_are_one_after_the_other_and_a_share_of_all_rows_is_held_out(several: Case) -> None:
    prepared = several.prepare(**named(several, "b.jsonl", "a.jsonl"), validation_split=0.25)
    every = [f"{name}.jsonl:{line}" for name in "ba" for line in range(1, 201)]
    held_out = set(places(prepared.validation))
    assert places(prepared.train) == [place for place in every if place not in held_out]
    assert {place[0] for place in held_out} == {"a", "b"}
    assert prepared.split_reason == "no validation file: 25% of the rows, chosen by content, are held out"
    assert [
        (name, Path(entry["path"]).name, entry["sha256"], entry["rows"]) for name, entry in prepared.files.items()
    ] == [
        ("train", "b.jsonl", files.sha256(several.folder / "b.jsonl"), 200),
        ("train 2", "a.jsonl", files.sha256(several.folder / "a.jsonl"), 200),
    ]


def test_the_rows_of_several_files_are_those_of_one_file_that_holds_them_all(several: Case) -> None:
    joined = "".join((several.folder / name).read_text() for name in ("a.jsonl", "b.jsonl"))
    several.train.write_text(joined)
    one = several.prepare(packing=True)
    both = several.prepare(packing=True, **named(several, "a.jsonl", "b.jsonl"))
    assert [row[1:] for row in contents(both.train)] == [row[1:] for row in contents(one.train)]
    assert [row[1:] for row in contents(both.validation)] == [row[1:] for row in contents(one.validation)]
    assert (both.tokens, both.whole, both.sequences) == (one.tokens, one.whole, one.sequences)
    assert both.statistics == one.statistics


def test_a_list_of_one_file_is_that_file(several: Case) -> None:
    path = str(several.folder / "a.jsonl")
    assert same(several.prepare(train_file=[path]), several.prepare(train_file=path))


def test_a_weight_of_two_trains_on_each_row_twice_and_holds_out_the_same_rows_once(several: Case) -> None:
    once = several.prepare(**named(several, "a.jsonl", "b.jsonl"), validation_split=0.25)
    twice = several.prepare(**named(several, "a.jsonl", ("b.jsonl", 2)), validation_split=0.25)
    of_a = [place for place in places(once.train) if place.startswith("a")]
    of_b = [place for place in places(once.train) if place.startswith("b")]
    assert places(twice.train) == [*of_a, *of_b, *of_b]  # a second time when all have been there
    assert places(twice.validation) == places(once.validation)
    assert [twice.files[name]["rows"] for name in ("train", "train 2")] == [200, 200]
    assert [entry.get("weight") for entry in twice.files.values()] == [None, 2]
    counts, before = twice.statistics["train"], once.statistics["train"]
    assert (counts.rows, counts.repeated, counts.duplicates) == (before.rows + len(of_b), len(of_b), 0)
    assert counts.tokens == int(twice.train.lengths.sum())
    assert twice.tokens["train"] != once.tokens["train"]
    assert twice.tokens["validation"] == once.tokens["validation"]


def test_a_weight_below_one_selects_that_share_of_the_rows_in_any_order(several: Case) -> None:
    rows = numbered(1000, start=200)
    write(several.folder / "b.jsonl", *rows)
    half = several.prepare(**named(several, "a.jsonl", ("b.jsonl", 0.5)))
    chosen = {place for place in places(half.train) + places(half.validation) if place.startswith("b")}
    assert len(chosen) in range(450, 551)
    assert half.statistics["train"].left_out == 1000 - len(chosen) == 1000 - half.files["train 2"]["rows"]
    write(several.folder / "b.jsonl", *reversed(rows), *numbered(50, start=1200))
    moved = several.prepare(**named(several, ("b.jsonl", 0.5)))
    found = {place for place in places(moved.train) + places(moved.validation) if int(place.split(":")[1]) <= 1000}
    assert found == {f"b.jsonl:{1001 - int(place.split(':')[1])}" for place in chosen}


def test_a_weight_of_one_and_a_half_repeats_the_rows_that_a_half_selects(several: Case) -> None:
    write(several.validation, *numbered(2, start=900))
    half = several.prepare(**named(several, ("a.jsonl", 0.5)))
    more = several.prepare(**named(several, ("a.jsonl", 1.5)))
    assert places(more.train) == [*(f"a.jsonl:{line}" for line in range(1, 201)), *places(half.train)]
    assert (more.statistics["train"].left_out, more.statistics["train"].repeated) == (0, len(half.train.lengths))


@pytest.mark.parametrize(("weight", "rows"), [(0.01, 1), (0.3, 3), (0.5, 5), (2.2, 22)])
def test_a_small_file_uses_exactly_its_share_and_at_least_one_row(case: Case, weight: float, rows: int) -> None:
    write(case.train, *numbered(10))
    write(case.validation, *numbered(2, start=900))
    assert case.prepare(**named(case, ("train.jsonl", weight))).statistics["train"].rows == rows


def test_copies_in_two_files_are_counted_and_the_first_named(several: Case) -> None:
    write(several.folder / "b.jsonl", "", *numbered(3, start=500), *numbered(2))
    write(several.validation, *numbered(2, start=900))
    kept = several.prepare(**named(several, "a.jsonl", "b.jsonl")).statistics["train"]
    assert (kept.duplicates, str(kept.first_copy)) == (2, f"{several.folder}/b.jsonl:5")
    dropped = several.prepare(**named(several, "a.jsonl", ("b.jsonl", 2)), on_duplicate="drop")
    counts = dropped.statistics["train"]
    assert (counts.rows, counts.duplicates, counts.dropped_duplicates) == (206, 0, 2)
    assert (counts.repeated, counts.left_out) == (3, 0)
    assert dropped.files["train 2"]["rows"] == 3


def test_bad_rows_of_all_files_are_listed_with_their_file(several: Case) -> None:
    write(several.folder / "a.jsonl", SHORT, "{}")
    write(several.folder / "b.jsonl", conversation("Hi", "No"), "[]", *numbered(3))
    write(several.validation, *numbered(2, start=900), "{")
    assert several.failure(DataError, **named(several, "a.jsonl", "b.jsonl")) == (
        "data: 3 bad rows\n"
        f'  {several.folder}/a.jsonl:2: no "messages" key (found no key)\n'
        f'  {several.folder}/b.jsonl:2: found an empty list, expected an object {{"messages": [...]}}\n'
        f"  {several.validation}:3: not JSON: Expecting property name enclosed in double quotes at column 2\n"
        "Fix them, or leave them out with --set dataset.on_bad_row=drop"
    )


def test_a_row_of_a_second_file_that_is_held_out_is_refused_with_both_places(several: Case) -> None:
    write(several.validation, "", numbered(1, start=203)[0])
    led = replace(RECIPE, system_prompt=SYSTEM_PROMPT)
    assert several.failure(DataError, led, **named(several, "a.jsonl", "b.jsonl")) == (
        f"data: 1 row is in both train and validation, the first: {several.folder}/b.jsonl:4 is "
        f"{several.validation}:2; remove them from one"
    )


def test_of_each_training_file_only_so_many_rows_are_read(several: Case) -> None:
    prepared = several.prepare(**named(several, "a.jsonl", ("b.jsonl", 3)), max_rows=5)
    assert len(set(places(prepared.train) + places(prepared.validation))) == 10
    assert prepared.split_reason == (
        "no validation file: 50% of the rows, chosen by content, are held out; "
        "only the first 5 rows of each training file are read (dataset.max_rows)"
    )


def test_each_file_is_encoded_once_whatever_its_weight_and_company(
    several: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    several.prepare(**named(several, "a.jsonl", "b.jsonl"))
    monkeypatch.setattr(workers, "Encoder", None)
    several.prepare(**named(several, ("b.jsonl", 1.5)))
    several.prepare(**named(several, ("b.jsonl", 2), ("a.jsonl", 0.1)))
    assert len(several.caches()) == 2


def test_the_rows_of_more_files_than_are_kept_otherwise_are_all_kept(case: Case) -> None:
    names = [f"{number}.jsonl" for number in range(7)]
    for number, name in enumerate(names):
        write(case.folder / name, *numbered(3, start=10 * number))
    case.prepare(**named(case, *names))
    assert len(case.caches()) == 7


def test_files_that_leave_no_row_are_a_data_error(case: Case) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (case.folder / name).write_text("\n")
    message = case.failure(DataError, **named(case, "a.jsonl", "b.jsonl"))
    assert message == "data: dataset.train_file leaves no row to train on; add rows"
