"""What training says about a file that is not chat JSONL: the name of its format, and the command that converts it."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from finetune.data.formats.containers import Container, iconv, recognize
from finetune.data.formats.convert import Options, convert_row
from finetune.data.formats.shapes import PLAIN_TEXT, UNSPOKEN, Notes, message_keys, shape_of, unknown
from finetune.data.jsonl import BadRow, convert_command, open_lines, parse_json, read_lines
from finetune.errors import DataError

EXPECTED = 'expected {"messages": [...]}, one conversation a line'
COLUMNS = " --columns prompt=Q,completion=A"


def refuse(path: Path, split: str) -> None:
    """Raise DataError if `path` is empty, not in UTF-8, or begins with a row of another known format.

    `split` is train or validation. An unknown format is not refused.
    """
    if path.stat().st_size == 0:
        raise DataError(f"data: {path} is empty (0 bytes)", EXPECTED)
    found = recognize(path)
    if found.kind != "JSON Lines":
        raise _other_container(found, split)
    named = named_row(found.first, path, split)
    if named:
        raise DataError(f"data: {path}: {named[0]}", named[1], between="\n")
    if found.encoding != "UTF-8":
        raise DataError(f"data: {path} is {found.encoding}, expected UTF-8", iconv(found.encoding, path), between="\n")


def _other_container(found: Container, split: str) -> DataError:
    """The error for a file that is not JSON Lines. Raises DataError itself if the first row cannot be read."""
    first = found.first if found.first is not None else next(found.rows(), (0, None))[1]
    if first is None:
        return DataError(f"data: {found.path} is {found.described} without rows", EXPECTED)
    shape, fix = shape_of(first), _advice(found.path, split)
    if isinstance(first, BadRow):
        rows = f"its first row has {first}"
    elif shape:
        rows = f"its rows are {shape.described}"
    else:
        rows, fix = f"its rows have {unknown(first)}", fix + COLUMNS
    return DataError(f"data: {found.path} is {found.described}, {rows}", fix, between="\n")


def named_row(row: Any, path: Path, split: str) -> tuple[str, str] | None:
    """For a row of `path`, its format in a clause and what to type; None for chat messages and unknown formats."""
    shape = shape_of(row)
    if shape is None or (isinstance(row, dict) and message_keys(row.get("messages")) == ("role", "content")):
        return None
    advice = _advice(path, split)
    if shape.name == PLAIN_TEXT:
        advice = f"{UNSPOKEN}: write each row as messages (docs/data.md)"
    return f"this looks like {shape.described}", advice


def some_rows(path: Path, numbers: list[int]) -> dict[int, Any]:
    """The parsed JSON of the lines with these numbers, in ascending order; None for a line that is not JSON."""
    with open_lines(path) as stream:
        found = ((number, _row(line)) for number, line in read_lines(stream) if number in numbers)
        return dict(islice(found, len(numbers)))


def _row(line: bytes) -> Any:
    try:
        return parse_json(line)
    except BadRow:
        return None


def conversion(rows: list[Any], path: Path, split: str, most: bool) -> str | None:
    """The command that converts some of `rows`, which training refuses; None if no conversion helps.

    If they are `most` of the file, rows with unknown keys get a command with columns for a person to name.
    """
    advice = _advice(path, split)
    for options, flag in ((Options(), ""), (Options(merge_turns=True), " --merge-turns")):
        if any(_converts(row, options) for row in rows):
            return advice + flag
    has_columns = any(isinstance(row, dict) and len(row) > 1 and "messages" not in row for row in rows)
    return advice + COLUMNS if most and has_columns else None


def _converts(row: Any, options: Options) -> bool:
    try:
        convert_row(row, options, Notes())
    except BadRow:
        return False
    return True


def _advice(path: Path, split: str) -> str:
    return f"Convert it: {convert_command(path, split)}"
