"""The table of formats in docs/data.md, and the files that its rows name."""

from __future__ import annotations

import gzip
import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from finetune.cli import command
from finetune.files import ROOT

FILES = ROOT / "tests" / "data" / "formats" / "files"
PAGE = ROOT / "docs" / "data.md"


class Row(NamedTuple):
    """One row: the format, `questions.csv` and how it is packed (`in gzip`, or nothing), and what is said of it."""

    format: str
    example: str
    training: str
    converted: str


def table() -> list[Row]:
    return [Row(*cells) for cells in cells_below("Formats")]


def cells_below(title: str) -> list[list[str]]:
    """The cells of the table below a title of the page, row by row."""
    text = PAGE.read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line.strip("| ") for line in text.splitlines() if line.startswith("| ")]
    return [re.split(r" \| ", line) for line in lines[1:]]


def parquet(content: bytes) -> bytes:
    """The rows of a JSON array as Parquet, lists and structs as `datasets` writes them."""
    import pyarrow as pa
    from pyarrow import parquet

    made, rows = io.BytesIO(), json.loads(content)
    keys = dict.fromkeys(key for row in rows for key in row)  # of all rows: from_pylist looks at the first one only
    parquet.write_table(pa.Table.from_pylist([{key: row.get(key) for key in keys} for row in rows]), made)
    return made.getvalue()


def zipped(content: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("xl/workbook.xml", content)
    return made.getvalue()


PACKINGS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "": ("", lambda content: content),
    "in gzip": (".gz", gzip.compress),
    "as Parquet": (".parquet", parquet),
    "as UTF-16": ("", lambda content: content.decode().encode("utf-16")),
    "as WINDOWS-1252": ("", lambda content: content.decode().encode("windows-1252")),
    "with a byte order mark and CRLF": ("", lambda content: b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n")),
    "as an Excel workbook": (".xlsx", zipped),
    "cut to 0 bytes": ("", lambda _: b""),
    "cut after 100 bytes of gzip": (".gz", lambda content: gzip.compress(content)[:100]),
}


def example(row: Row, folder: Path) -> Path:
    """The file of a row, made in `folder` from the one that is written by hand."""
    name, _, packing = row.example.partition(" ")
    suffix, pack = PACKINGS[packing]
    path = folder / f"{name.strip('`')}{suffix}"
    path.write_bytes(pack((FILES / name.strip("`")).read_bytes()))
    return path


def rendered(message: str, path: Path) -> str:
    """A message as a cell of the table has it: each line as code, the command that converts the file by its name."""
    converting = f"Convert it: {command('scripts/convert_data.py')} FILE data/processed/train.jsonl"
    lines = [line.strip() for line in message.replace(str(path), "FILE").splitlines()]
    return "<br>".join(
        line.replace(converting, "command") if line.startswith(converting) else f"`{line}`" for line in lines
    ).replace("|", "\\|")
