"""A folder to prepare files in, with a tokenizer that is made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.data import encode
from finetune.data import prepare as prepare_module
from support.prepared import Case, numbered, the_chat, the_reference, write


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setattr(prepare_module, "load_chat", the_chat)
    monkeypatch.setattr(encode, "load_chat", the_chat)
    monkeypatch.setattr(encode, "Reference", the_reference)
    return Case(tmp_path)


@pytest.fixture
def two_files(case: Case) -> Case:
    write(case.train, *numbered(5))
    write(case.validation, *numbered(2, start=100))
    return case
