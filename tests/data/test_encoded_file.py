"""A data file is encoded once: another length or split encodes nothing, and a few more rows only these."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune import files
from finetune.data import encode, encoded_file, workers
from finetune.data import prepare as prepare_module
from finetune.data.tokenizer import Chat
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
    numbered,
    same,
    the_chat,
    write,
)


def no_encoder(*_: Any) -> None:
    raise AssertionError("rows are encoded again")


def test_a_second_time_the_rows_come_from_the_cache(two_files: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    write(two_files.train, SHORT, TWO_TURNS, "{}")
    first = two_files.prepare(packing=True, on_bad_row="drop")
    monkeypatch.setattr(workers, "Encoder", no_encoder)
    assert same(two_files.prepare(packing=True, on_bad_row="drop"), first)
    assert len(two_files.caches()) == 2


def test_the_same_content_in_another_place_comes_from_the_cache(
    two_files: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_files.prepare()
    moved = shutil.copy(two_files.train, two_files.folder / "moved.jsonl")
    monkeypatch.setattr(workers, "Encoder", no_encoder)
    assert two_files.prepare(train_file=str(moved)).files["train"]["path"] == str(moved)


SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "length": ({"max_seq_length": 20}, {}),
    "truncation": ({"truncation": False}, {}),
    "what a bad row does": ({}, {"on_bad_row": "drop"}),
    "how many bad rows are left out": ({}, {"max_bad_share": 0.2}),
    "what a copy does": ({}, {"on_duplicate": "drop"}),
    "split": ({}, {"validation_split": 0.4}),
    "no validation file": ({}, {"validation_file": None}),
}  # fmt: skip


@pytest.mark.parametrize(("of_recipe", "of_dataset"), SAME.values(), ids=SAME.keys())
def test_another_length_or_split_encodes_no_row_again(
    two_files: Case, monkeypatch: pytest.MonkeyPatch, of_recipe: dict[str, Any], of_dataset: dict[str, Any]
) -> None:
    write(two_files.train, *numbered(20), TWO_TURNS)
    recipe = replace(RECIPE, **of_recipe)
    two_files.prepare()
    afresh = Case(two_files.folder)
    afresh.cache = two_files.folder / "another-cache"
    wanted = afresh.prepare(recipe, **of_dataset)
    monkeypatch.setattr(workers, "Encoder", no_encoder)
    found = two_files.prepare(recipe, **of_dataset)
    assert same(found, wanted)
    assert len(two_files.caches()) == 2


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "system prompt": ({"system_prompt": SYSTEM_PROMPT}, {}),
    "certificate": ({"certificate": True}, {}),
    "which turns are learned": ({"train_on": "last"}, {}),
    "rows read": ({}, {"max_rows": 10}),
}  # fmt: skip


@pytest.mark.parametrize(("of_recipe", "of_dataset"), OTHERS.values(), ids=OTHERS.keys())
def test_a_change_of_what_decides_a_row_makes_a_new_entry(
    two_files: Case, of_recipe: dict[str, Any], of_dataset: dict[str, Any]
) -> None:
    write(two_files.train, *numbered(20))
    two_files.prepare()
    two_files.prepare(replace(RECIPE, **of_recipe), **of_dataset)
    assert len(two_files.caches()) == (3 if of_dataset else 4)


@pytest.mark.parametrize("name", ["train", "validation"])
def test_changed_content_makes_a_new_entry(two_files: Case, name: str) -> None:
    two_files.prepare()
    path: Path = getattr(two_files, name)
    path.write_text(path.read_text().replace("Answer", "Reply"))
    two_files.prepare()
    assert len(two_files.caches()) == 3


def test_another_tokenizer_or_template_makes_new_entries(two_files: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    two_files.prepare()
    other: Chat = replace(the_chat(None), fingerprint="another")
    monkeypatch.setattr(prepare_module, "load_chat", lambda _: other)
    two_files.prepare()
    assert len(two_files.caches()) == 4


@pytest.mark.parametrize("name", ["template", "tokenizer", "jsonl", "digests", "certificate", "encode", "store"])
def test_changed_code_makes_new_entries(two_files: Case, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    two_files.prepare()
    code = two_files.folder / "code"
    shutil.copytree(Path(encoded_file.__file__).parent, code)
    monkeypatch.setattr(encoded_file, "__file__", str(code / "encoded_file.py"))
    two_files.prepare()
    assert len(two_files.caches()) == 2
    with (code / f"{name}.py").open("a") as module:
        module.write("\n# another version\n")
    two_files.prepare()
    assert len(two_files.caches()) == 4


def encoded_lines(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the number of each line that is encoded from now on."""
    seen: list[int] = []
    encode_lines = encode.Encoder.encode

    def watched(self: encode.Encoder, numbered_lines: encode.Lines) -> encode.Outcome:
        seen.extend(number for number, _ in numbered_lines)
        return encode_lines(self, numbered_lines)

    monkeypatch.setattr(encode.Encoder, "encode", watched)
    return seen


def test_of_a_file_with_other_weights_only_the_rows_that_have_them_are_encoded(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(case.train, *numbered(20), TWO_TURNS, weighted(SHORT, 0))
    case.prepare()
    write(case.train, *numbered(20), weighted(TWO_TURNS, 0, 1), weighted(SHORT, 0))
    seen = encoded_lines(monkeypatch)
    found = case.prepare()
    assert seen == [21]
    case.cache = case.folder / "another-cache"
    assert same(found, case.prepare())


def test_of_a_file_with_a_few_more_rows_only_these_are_encoded(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoded_file, "CHUNK_LINES", 16)
    keyed = [json.dumps({"id": number, "messages": row}) for number, row in enumerate(numbered(98))]
    write(case.train, *keyed, "{}", TWO_TURNS)
    case.prepare(on_bad_row="drop")
    write(case.train, TWO_TURNS, *keyed[50:], SHORT, "", "[]", *keyed[:50], NO_TURN_FITS)
    seen = encoded_lines(monkeypatch)
    found = case.prepare(on_bad_row="drop")
    assert seen == [50, 52, 103]
    case.cache = case.folder / "another-cache"
    assert same(found, case.prepare(on_bad_row="drop"))
    assert found.statistics["train"].other_keys == {"id": 98}


def test_rows_that_were_not_compared_are_encoded_again_where_they_must_be(
    two_files: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_files.prepare(replace(RECIPE, certificate=False))
    seen = encoded_lines(monkeypatch)
    strict = two_files.prepare(replace(RECIPE, certificate="every_row"))
    assert (len(seen), strict.statistics["train"].certified) == (7, 5)
    write(two_files.train, *numbered(6))
    two_files.prepare(replace(RECIPE, certificate="every_row"))
    assert len(seen) == 8


def test_rows_of_a_damaged_entry_are_not_taken(two_files: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    two_files.prepare()
    for name in two_files.caches():
        os.truncate(two_files.cache / name / "rows.arrow", 100)
    seen = encoded_lines(monkeypatch)
    write(two_files.train, *numbered(6))
    two_files.prepare()
    assert len(seen) == 6 + 2


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_crash_midway_leaves_nothing_in_the_cache(
    two_files: Case, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    encode_batches = workers.encode_batches

    def crash(*arguments: Any) -> Iterator[Any]:
        yield from encode_batches(*arguments)
        assert [name for name in two_files.caches() if name.endswith(".partial")]
        raise error

    with monkeypatch.context() as crashing:
        crashing.setattr(encoded_file, "encode_batches", crash)
        with pytest.raises(error):
            two_files.prepare()
    assert two_files.caches() == []
    assert lines(two_files.prepare().train) == [1, 2, 3, 4, 5]


def test_a_file_that_changes_while_it_is_read_is_refused_and_not_kept(
    two_files: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(*arguments: Any) -> Iterator[Any]:
        for outcome in workers.encode_batches(*arguments):
            with two_files.train.open("a") as stream:
                stream.write(json.dumps({"messages": numbered(1, start=7)[0]}) + "\n")
            yield outcome

    with monkeypatch.context() as changing:
        changing.setattr(encoded_file, "encode_batches", changed)
        assert two_files.failure(DataError) == (
            f"data: {two_files.train} changed while it was read; try again when nothing writes to it"
        )
    assert lines(two_files.prepare().train) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_of_a_file_of_which_only_the_first_rows_are_read_the_rest_is_hashed_too(case: Case, packed: bool) -> None:
    write(case.train, *numbered(3000))
    if packed:
        case.train.write_bytes(gzip.compress(case.train.read_bytes()))
    prepared = case.prepare(max_rows=100)
    assert prepared.files["train"]["sha256"] == files.sha256(case.train)
    assert prepared.files["train"]["rows"] == 100


def test_a_damaged_entry_of_the_cache_is_made_again(two_files: Case) -> None:
    before = contents(two_files.prepare().train)
    entries = [two_files.cache / name for name in two_files.caches()]
    for entry in entries:
        os.truncate(entry / "rows.arrow", 100)
    assert contents(two_files.prepare().train) == before
    assert sorted(text.split(" is damaged")[0] for text in two_files.said) == sorted(map(str, entries))


def test_a_line_of_many_megabytes_is_a_bad_row_before_it_costs_anything(case: Case) -> None:
    write(case.train, SHORT, conversation("a " * 20_000_000, "b"), TWO_TURNS)
    tracemalloc.start()
    started = time.process_time()
    message = case.failure(DataError)
    seconds, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message == (
        f"data: 1 bad row\n  {case.train}:2: longer than 1 MiB, expected one conversation a line\n"
        "Fix them, or leave them out with --set dataset.on_bad_row=drop"
    )
    assert (seconds < 5, peak < 50 * 2**20) == (True, True)


def test_progress_is_told_from_the_second_second_with_the_time_that_is_left(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 1))
    monkeypatch.setattr(encoded_file.time, "monotonic", lambda: next(clock) / 2)
    monkeypatch.setattr(encoded_file, "CHUNK_LINES", 25)
    write(case.train, *numbered(100))
    case.prepare(max_rows=100)
    assert case.said == [
        f"encoding {case.train}: 50 rows, 50 rows/s, 0 s left",
        f"encoding {case.train}: 100 rows, 50 rows/s, 0 s left",
    ]


def test_packing_is_no_part_of_the_cache(two_files: Case) -> None:
    assert two_files.prepare(packing=False).sequences is None
    assert two_files.prepare(replace(RECIPE, max_seq_length=64), packing=True).sequences == [[0, 1, 2, 3], [4]]
    assert len(two_files.caches()) == 2


def test_of_a_new_key_in_each_row_only_some_are_counted(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoded_file, "MOST_KEYS", 5)
    write(case.train, *(json.dumps({f"key {index}": 1, "messages": row}) for index, row in enumerate(numbered(40))))
    assert len(case.prepare().statistics["train"].other_keys) == 5
