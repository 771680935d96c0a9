"""A folder to prepare files in, with a tokenizer that is made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.data import certificate, encode
from finetune.data import prepare as prepare_module
from finetune.data.tokenizer import Chat, load_chat
from support.conversations import chatml_tokenizer
from support.prepared import Case, numbered, the_chat, the_reference, write


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setattr(prepare_module, "load_chat", the_chat)
    monkeypatch.setattr(encode, "load_chat", the_chat)
    monkeypatch.setattr(certificate, "Reference", the_reference)
    return Case(tmp_path)


@pytest.fixture
def two_files(case: Case) -> Case:
    write(case.train, *numbered(5))
    write(case.validation, *numbered(2, start=100))
    return case


@pytest.fixture(scope="module")
def mistral() -> Chat:
    return load_chat(None)


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    folder = tmp_path_factory.mktemp("chatml")
    chatml_tokenizer().save(str(folder / "tokenizer.json"))
    return load_chat(folder)
