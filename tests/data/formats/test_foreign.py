"""What training says of files in other formats: the row of docs/data.md, and what is no file at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from finetune.data.cache import Cache
from finetune.data.formats import foreign
from finetune.data.prepare import prepare
from finetune.errors import ConfigError, UserError
from support.as_nobody import as_nobody
from support.data_page import Row, cells_below, example, rendered, table
from support.prepared import RECIPE, Case, numbered, write


@pytest.fixture(autouse=True)
def nothing_processed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(foreign, "resolve", tmp_path.joinpath)


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


NO_FILE: dict[str, Callable[[Path], object]] = {
    "a folder": Path.mkdir,
    "a pipe, as `<(zcat rows.gz)` is": os.mkfifo,
    "a file that others may not read": lambda path: path.touch(mode=0),
    "nothing": lambda _: None,
}


@pytest.mark.parametrize(("kind", "message"), cells_below("What is no file"))
def test_training_says_of_what_is_no_file_what_the_page_says(case: Case, kind: str, message: str) -> None:
    path = case.folder / "rows"
    NO_FILE[kind](path)
    dataset = case.dataset(train_file=str(path), validation_file=None)
    user = as_nobody() if kind.startswith("a file") else nullcontext()
    with user, pytest.raises(ConfigError) as caught:
        prepare(dataset, RECIPE, False, Cache(case.cache))
    assert f"`{caught.value.problems[0].replace(str(path), 'FILE')}`" == message
