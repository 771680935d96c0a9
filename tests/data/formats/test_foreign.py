"""What training says of files in other formats: the row of docs/data.md, and what is no file at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.data.formats import foreign
from finetune.errors import UserError
from support.data_page import Row, example, rendered, table
from support.prepared import Case, numbered, write


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
