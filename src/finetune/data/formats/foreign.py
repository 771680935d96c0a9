"""What training says of a file that is not chat JSONL: its format by name, once, and the command that converts it."""

from __future__ import annotations

from itertools import dropwhile
from pathlib import Path
from typing import Any

from finetune.cli import command
from finetune.data.formats.containers import iconv, recognize
from finetune.data.formats.shapes import PLAIN_TEXT, UNSPOKEN, message_keys, shape_of
from finetune.data.jsonl import BadRow, open_lines, parse_json, read_lines
from finetune.errors import DataError
from finetune.files import quoted, resolve

PROCESSED = "data/processed"


def refuse(path: Path, name: str) -> None:
    """Raise DataError where `path` is empty, in another encoding, or its first row is that of another format.

    `name` is that of the split, train or validation. What cannot be recognized is not refused.
    """
    if path.stat().st_size == 0:
        raise DataError(f"data: {path} is empty (0 bytes)", 'wanted {"messages": [...]}, one conversation a line')
    found = recognize(path)
    if found.kind != "JSON Lines":
        shape = shape_of(found.first)
        rows = f", its rows are {shape.described}" if shape else ""
        fix = converting(path, name) + ("" if shape else " --columns prompt=Q,completion=A")
        raise DataError(f"data: {path} is {found.described}{rows}", fix, between="\n")
    named = named_row(found.first, path, name)
    if named:
        raise DataError(f"data: {path}: {named[0]}", named[1], between="\n")
    if found.encoding != "UTF-8":
        raise DataError(f"data: {path} is {found.encoding}, wanted UTF-8", iconv(found.encoding, path), between="\n")


def named_row(row: Any, path: Path, name: str) -> tuple[str, str] | None:
    """(`this looks like ShareGPT (conversations/from/value)`, what to type) of a row of the file `path`.

    None for chat messages, and for what is not known.
    """
    shape = shape_of(row)
    if shape is None or (isinstance(row, dict) and message_keys(row.get("messages")) == ("role", "content")):
        return None
    if shape.name == PLAIN_TEXT:
        return f"this looks like {shape.described}", f"{UNSPOKEN}: write each row as messages (docs/data.md)"
    return f"this looks like {shape.described}", converting(path, name)


def named_line(path: Path, name: str, line: int) -> tuple[str, str] | None:
    """The same of one line of a file."""
    with open_lines(path) as stream:
        _, content = next(dropwhile(lambda numbered: numbered[0] < line, read_lines(stream)))
    try:
        return named_row(parse_json(content), path, name)
    except BadRow:
        return None


def converting(path: Path, name: str) -> str:
    """The command that converts a file into one that is not there yet."""
    script = command("scripts/convert_data.py")
    return f"Convert it: {script} {quoted(path)} {quoted(converted(path, name))}"


def converted(path: Path, name: str) -> Path:
    """Where the rows of `path` go: the file that a config names, or another one where that is there already."""
    default = Path(PROCESSED) / {"train": "train.jsonl", "validation": "val.jsonl"}[name]
    return Path(PROCESSED) / f"{path.name.split('.')[0]}-chat.jsonl" if resolve(str(default)).exists() else default
