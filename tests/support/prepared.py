"""Conversations, files of them, and a folder in which they are prepared."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from finetune.config.schema import DatasetConfig
from finetune.data.cache import Cache
from finetune.data.encode import Recipe
from finetune.data.prepare import Prepared, prepare
from finetune.data.store import Place, Rows
from finetune.data.template import Messages
from finetune.data.tokenizer import Reference, load_chat
from finetune.wording import Report
from support.conversations import conversation

RECIPE = Recipe(None, None, max_seq_length=64, truncation=True, certificate=False)
SYSTEM_PROMPT = "Be kind."

# These tests make them some hundred times.
the_chat = functools.cache(load_chat)
the_reference = functools.cache(Reference)


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
        self.said: list[str] = []
        self.report = Report(self.said.append, lambda what, why: self.said.append(f"{what}: {why}"), self.said.append)

    def dataset(self, **values: Any) -> DatasetConfig:
        validation = str(self.validation) if self.validation.exists() else None
        standard = {
            "train_file": str(self.train),
            "validation_file": validation,
            "validation_split": 0.5,
            "max_rows": None,
            "max_validation_rows": None,
            "train_on": "all",
            "truncation": True,
            "padding_side": "right",
            "on_bad_row": "fail",
            "max_bad_share": 1.0,
            "on_duplicate": "keep",
            "certificate": False,
            "sample_prompts": (),
        }
        return DatasetConfig.model_validate(standard | values)

    def prepare(
        self, recipe: Recipe = RECIPE, packing: bool = False, workers: int | None = 0, **of_dataset: Any
    ) -> Prepared:
        return prepare(self.dataset(**of_dataset), recipe, packing, Cache(self.cache, self.report), workers)

    def in_train(self, line: int) -> Place:
        return Place(str(self.train), line)

    def in_validation(self, line: int) -> Place:
        return Place(str(self.validation), line)

    def caches(self) -> list[str]:
        return sorted(path.name for path in self.cache.iterdir() if path.is_dir()) if self.cache.exists() else []

    def failure(self, kind: type[Exception], *arguments: Any, **named: Any) -> str:
        with pytest.raises(kind) as caught:
            self.prepare(*arguments, **named)
        assert not [name for name in self.caches() if name.endswith(".partial")]
        return str(caught.value)


def contents(rows: Rows) -> list[tuple[int, list[int], list[int]]]:
    return [
        (place.line, input_ids.tolist(), labels.tolist())
        for place, input_ids, labels in (rows.row(index) for index in range(len(rows.lengths)))
    ]


def lines(rows: Rows) -> list[int]:
    return [rows.row(index)[0].line for index in range(len(rows.lengths))]


def places(rows: Rows) -> list[str]:
    """The same with the names of the files, as `a.jsonl:3`."""
    found = [rows.row(index)[0] for index in range(len(rows.lengths))]
    return [f"{Path(place.file).name}:{place.line}" for place in found]


# Each answer is one id and </s>.
SHORT = conversation("Hi", "Hello")
TWO_TURNS = conversation("Hi", "Hello", "Hi", "Yes")
NO_TURN_FITS = conversation("Hi " * 20, "Hello")


def same(first: Prepared, second: Prepared) -> bool:
    return (
        contents(first.train) == contents(second.train)
        and contents(first.validation) == contents(second.validation)
        and (first.statistics, first.sequences, first.files, first.tokens, first.split_reason)
        == (second.statistics, second.sequences, second.files, second.tokens, second.split_reason)
        and first.whole == second.whole
    )
