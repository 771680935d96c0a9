"""What training says of a file that is not chat JSONL: its format by name, once, and the command that converts it."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from finetune.cli import command
from finetune.data.formats.containers import Container, iconv, recognize
from finetune.data.formats.convert import Options, convert_row
from finetune.data.formats.shapes import PLAIN_TEXT, UNSPOKEN, Notes, message_keys, shape_of, unknown
from finetune.data.jsonl import BadRow, open_lines, parse_json, read_lines
from finetune.errors import DataError
from finetune.files import quoted, resolve

PROCESSED = "data/processed"
WANTED = 'expected {"messages": [...]}, one conversation a line'
COLUMNS = " --columns prompt=Q,completion=A"


def refuse(path: Path, name: str) -> None:
    """Raise DataError where `path` is empty, in another encoding, or its first row is that of another format.

    `name` is that of the split, train or validation. What cannot be recognized is not refused.
    """
    if path.stat().st_size == 0:
        raise DataError(f"data: {path} is empty (0 bytes)", WANTED)
    found = recognize(path)
    if found.kind != "JSON Lines":
        raise _other_container(found, name)
    named = named_row(found.first, path, name)
    if named:
        raise DataError(f"data: {path}: {named[0]}", named[1], between="\n")
    if found.encoding != "UTF-8":
        raise DataError(f"data: {path} is {found.encoding}, expected UTF-8", iconv(found.encoding, path), between="\n")


def _other_container(found: Container, name: str) -> DataError:
    """What to say of a JSON array, CSV or Parquet; raises DataError itself where its first row cannot be read."""
    first = found.first if found.first is not None else next(found.rows(), (0, None))[1]
    if first is None:
        return DataError(f"data: {found.path} is {found.described} without any row", WANTED)
    shape, fix = shape_of(first), converting(found.path, name)
    if isinstance(first, BadRow):
        rows = f"its first row has {first}"
    elif shape:
        rows = f"its rows are {shape.described}"
    else:
        rows, fix = f"its rows have {unknown(first)}", fix + COLUMNS
    return DataError(f"data: {found.path} is {found.described}, {rows}", fix, between="\n")


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


def some_rows(path: Path, numbers: list[int]) -> dict[int, Any]:
    """What the lines of `numbers`, which ascend, hold as JSON; None for what is none."""
    with open_lines(path) as stream:
        wanted = ((number, _row(line)) for number, line in read_lines(stream) if number in numbers)
        return dict(islice(wanted, len(numbers)))


def _row(line: bytes) -> Any:
    try:
        return parse_json(line)
    except BadRow:
        return None


def conversion(rows: list[Any], path: Path, name: str, most: bool) -> str | None:
    """The command that makes of one of `rows`, refused by training, one that is not; None where there is none.

    If they are `most` of the file, rows of unknown keys are columns, of which a person has to name two.
    """
    for options, flag in ((Options(), ""), (Options(merge_turns=True), " --merge-turns")):
        if any(_converts(row, options) for row in rows):
            return converting(path, name) + flag
    has_columns = any(isinstance(row, dict) and len(row) > 1 and "messages" not in row for row in rows)
    return converting(path, name) + COLUMNS if most and has_columns else None


def _converts(row: Any, options: Options) -> bool:
    try:
        convert_row(row, options, Notes())
    except BadRow:
        return False
    return True


def converting(path: Path, name: str) -> str:
    """The command that converts a file into one that is not there yet."""
    script = command("scripts/convert_data.py")
    return f"Convert it: {script} {quoted(path)} {quoted(converted(path, name))}"


def converted(path: Path, name: str) -> Path:
    """Where the rows of `path` go: the file that a config names, or another one where that is there already."""
    default = Path(PROCESSED) / {"train": "train.jsonl", "validation": "val.jsonl"}[name]
    return Path(PROCESSED) / f"{path.name.split('.')[0]}-chat.jsonl" if resolve(str(default)).exists() else default
