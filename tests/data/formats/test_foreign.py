"""What training says of files in other formats: the row of docs/data.md, and what is no file at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune.cli import PYTHON, command
from finetune.data import jsonl
from finetune.data.cache import Cache
from finetune.data.jsonl import NO_TOOLS
from finetune.data.prepare import prepare
from finetune.data.preview import marked, segments
from finetune.errors import ConfigError, DataError, UserError
from support.as_nobody import as_nobody
from support.data_page import Row, cells_below, example, rendered, table
from support.prepared import RECIPE, SHORT, Case, contents, numbered, write


@pytest.fixture(autouse=True)
def nothing_processed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(jsonl, "resolve", tmp_path.joinpath)


def said(case: Case, path: Path) -> str:
    """What training says of a file: `read`, or its message."""
    write(case.validation, *numbered(1))
    try:
        case.prepare(train_file=str(path))
    except UserError as error:
        return rendered(str(error), path)
    return "read"


@pytest.mark.parametrize("row", table(), ids=lambda row: f"{row.format}: {row.example}")
def test_training_says_of_a_format_what_the_page_says(case: Case, row: Row) -> None:
    assert said(case, example(row, case.folder)) == row.training


TABLES = {
    "no row": ("prompt,completion\n",
        'data: FILE is CSV without rows; expected {"messages": [...]}, one conversation a line'),
    "a bad first row": ("prompt,completion\na,b,c\nd,e\n",
        "data: FILE is CSV, its first row has 3 cells, the first line has 2\n"
        f"Convert it: {command('scripts/convert_data.py')} FILE data/processed/train.jsonl"),
    "no JSON": ('[{"a": ]', "FILE: row 1 is not JSON or cut short: Expecting value; save the file again"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), TABLES.values(), ids=TABLES.keys())
def test_training_says_what_is_wrong_with_a_file_whose_first_row_nobody_can_read(
    case: Case, content: str, message: str
) -> None:
    case.train.write_text(content)
    assert case.failure(DataError).replace(str(case.train), "FILE") == message


NO_FILE: dict[str, Callable[[Path], object]] = {
    "a folder": Path.mkdir,
    "a pipe, as `<(zcat rows.gz)` is": os.mkfifo,
    "a file that you may not read": lambda path: path.touch(mode=0),
    "nothing": lambda _: None,
}


@pytest.mark.parametrize(("kind", "message"), cells_below("Paths that are not regular files"))
def test_training_says_of_what_is_no_file_what_the_page_says(case: Case, kind: str, message: str) -> None:
    path = case.folder / "rows"
    NO_FILE[kind](path)
    dataset = case.dataset(train_file=str(path), validation_file=None)
    user = as_nobody() if kind.startswith("a file") else nullcontext()
    with user, pytest.raises(ConfigError) as caught:
        prepare(dataset, RECIPE, False, Cache(case.cache))
    problem = caught.value.problems[0].replace(str(path), "FILE").replace(PYTHON, ".venv/bin/python")
    assert f"`{problem}`" == message


USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
ONE, LAST = "[INST] Why? [/INST] Because.</s>", "[INST] Why? [/INST]>> Because.</s><<"
PARTS = [{"type": "text", "text": text} for text in ("Why", "now?")]


def row(*messages: dict[str, Any], **keys: Any) -> str:
    return json.dumps({"messages": messages, **keys})


# What the page lists: rows and settings of the dataset, and what is trained on, or why nothing is.
HELD: dict[str, tuple[list[str], dict[str, str], list[str] | str]] = {
    "content as a list of text parts": (
        [row(USER | {"content": PARTS}, ANSWER)], {}, ["<s> [INST] Why\n\nnow? [/INST]>> Because.</s><<"]),
    "`weight: 0` on an assistant message": (
        [row(USER | {"weight": 0}, ANSWER | {"weight": 0}, USER, ANSWER)], {}, [f"<s> {ONE} {LAST}"]),
    "`dataset.train_on=last`": (
        [row(USER, ANSWER, USER, ANSWER)], {"train_on": "last"}, [f"<s> {ONE} {LAST}"]),
    "no message with loss": ([row(USER, ANSWER | {"weight": 0})], {}, []),
    "`weight: 1`; keys that are null or empty; an empty system message": (
        [row({"role": "system", "content": ""}, USER | {"name": None}, ANSWER | {"weight": 1}, tools=[])], {},
        [f"<s> {LAST}"]),
    "`system` or `system_prompt` next to `messages`": (
        [row(USER, ANSWER, system="Be short.")], {}, ["<s> [INST] Be short.\n\nWhy? [/INST]>> Because.</s><<"]),
    "`tools`, `available_tools`, `functions`, tool calls, the role `tool`, `images`": (
        [row(USER, ANSWER, available_tools=[{}])], {}, f"has a key 'available_tools': {NO_TOOLS}"),
    "`label`, `rejected...`": (
        [row(USER, ANSWER, rejected="No.")], {}, "has a key 'rejected': an answer that is not to be learned"),
    "another key next to `messages`": ([row(USER, ANSWER, id=7)], {}, [f"<s> {LAST}"]),
    "bad rows": (["{}"], {"on_bad_row": "drop"}, []),
    "a duplicate of another row": (
        [row(USER, ANSWER | {"weight": 0}), row(USER, ANSWER), row(USER, ANSWER)], {"on_duplicate": "drop"},
        [f"<s> {LAST}"]),
}  # fmt: skip


@pytest.mark.parametrize("what", [cells[0] for cells in cells_below("What a row may contain")])
def test_the_rows_listed_on_the_page_are_learned_with_loss_between_the_marks(case: Case, what: str) -> None:
    rows, settings, wanted = HELD[what]
    write(case.train, *rows, SHORT)
    write(case.validation, *numbered(1))
    recipe = replace(RECIPE, train_on=settings.get("train_on", "all"))
    if isinstance(wanted, str):
        assert case.failure(DataError, recipe).splitlines()[1] == f"  {case.train}:1: {wanted}"
        return
    prepared = case.prepare(recipe, **settings)
    learned = [marked(segments(prepared.chat, ids, labels)) for _, ids, labels in contents(prepared.train)]
    assert learned == [*wanted, "<s> [INST] Hi [/INST]>> Hello</s><<"]
