"""Recognizes a data file by its first bytes and streams its rows: JSON Lines, JSON, CSV or Parquet."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import shlex
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from finetune.data.formats.shapes import message_keys, shape_of
from finetune.data.jsonl import (
    GZIP,
    REFUSED_KEYS,
    BadRow,
    damaged_gzip,
    open_lines,
    parse_json,
    read_lines,
    unique_keys,
)
from finetune.errors import DataError
from finetune.wording import counted

HEAD_BYTES = 2**16  # enough to recognize a file
BLOCK = 2**20  # characters of JSON read at once
MOST_OF_A_ROW = 2**26  # characters; a longer JSON value is reported as cut short
DELIMITERS = ",\t;"  # of CSV; Excel writes the last one in much of Europe
MARKS = (  # byte order marks, longer ones first
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
BETWEEN = re.compile(r"[\ufeff \t\r\n,:]*")  # of two JSON values
PARQUET = b"PAR1"
ONE_OBJECT = "one JSON object"
UNSUPPORTED = {  # by first bytes: what it is, and how to get a supported file
    b"PK\x03\x04": ("a zip archive, as Excel workbooks are", "unpack it, or save the table as CSV"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "unpack it: zstd -d {file}"),
    b"BZh": ("compressed with bzip2", "unpack it: bunzip2 {file}"),
    b"\xfd7zXZ\x00": ("compressed with xz", "unpack it: unxz {file}"),
}
Numbered = Iterator[tuple[int, Any]]


@dataclass(frozen=True)
class Container:
    """How a file stores its rows. `first` is the first row, or None if it cannot be read; `delimiter` is CSV's."""

    path: Path
    kind: str
    encoding: str = "UTF-8"
    zipped: bool = False
    delimiter: str = ","
    first: Any = None

    @property
    def described(self) -> str:
        """`a JSON array, UTF-16, gzip`."""
        kind = "CSV with tabs (TSV)" if self.delimiter == "\t" else self.kind
        encoding = [] if self.encoding == "UTF-8" else [self.encoding]
        return ", ".join([kind, *encoding, *(["gzip"] if self.zipped else [])])

    def rows(self) -> Numbered:
        """Yield (number from 1, row), with a BadRow for a single bad row. Raises DataError if the rest is unreadable.

        The number is the line in JSON Lines and CSV, otherwise the position of the row.
        """
        try:
            yield from READERS[self.kind](self)
        except UnicodeDecodeError as error:
            found = f"{self.path} is not {self.encoding} (byte 0x{error.object[error.start]:02x})"
            raise DataError(found, iconv("WINDOWS-1252", self.path)) from None
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise damaged_gzip(self.path) from None


def iconv(encoding: str, path: Path) -> str:
    """The command that converts a file to UTF-8. WINDOWS-1252 is only the most likely guess, and the text says so."""
    guess = "if it comes from Windows in a Western language: " if encoding == "WINDOWS-1252" else ""
    made = shlex.quote(f"{path}.utf8")
    return f"{guess}iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > {made}"


def recognize(path: Path) -> Container:
    """Recognize a file by its first bytes. Raises DataError with what to type for an unsupported one."""
    with path.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    zipped = head.startswith(GZIP)
    if zipped:
        try:
            head = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head, HEAD_BYTES)
        except zlib.error:
            raise damaged_gzip(path) from None
    for start, (what, advice) in UNSUPPORTED.items():
        if head.startswith(start):
            raise DataError(f"{path} is {what}", advice.format(file=shlex.quote(str(path))))
    found = Container(path, "Parquet", zipped=zipped) if head.startswith(PARQUET) else _of_text(path, head, zipped)
    return replace(found, first=_first(found))


def _of_text(path: Path, head: bytes, zipped: bool) -> Container:
    encoding = encoding_of(head)
    lines = Container(path, "JSON Lines", encoding, zipped)
    text = head.decode(encoding, errors="replace").lstrip("\ufeff \t\r\n")
    if text.startswith("["):
        first = _first(lines)
        is_row = isinstance(first, list) and (shape_of(first) or len(text.splitlines()) > 1)
        return lines if is_row else replace(lines, kind="a JSON array")
    if text.startswith("{"):
        return replace(lines, kind=ONE_OBJECT) if _wraps_rows(lines, text) else lines
    header = text.partition("\n")[0].rstrip("\r")
    delimiter = max(DELIMITERS, key=header.count)
    if delimiter not in header:
        return lines
    columns = next(csv.reader([header], delimiter=delimiter), [])
    is_table = ".csv" in path.suffixes or ".tsv" in path.suffixes or shape_of(dict.fromkeys(columns, ""))
    return replace(lines, kind="CSV", delimiter=delimiter) if is_table else lines


def _wraps_rows(lines: Container, text: str) -> bool:
    """Whether a file that begins with `{` is one object with a list of rows, rather than an object on each line."""
    try:
        first, *more = [row for _, row in islice(lines.rows(), 2)]
    except DataError:
        return False
    is_line = isinstance(first, dict) or "\n" not in text.rstrip()  # else the object continues on the next line
    if shape_of(first) or (is_line and more):
        return False
    row = _first(replace(lines, kind=ONE_OBJECT))
    return isinstance(row, dict) and not message_keys([row])  # a list of messages is one conversation


def encoding_of(head: bytes) -> str:
    """The encoding by the byte order mark, or by zero bytes between letters; UTF-8 without either."""
    for mark, name in MARKS:
        if head.startswith(mark):
            return name
    if head[:1] == b"\0" and head[1:2] != b"\0":
        return "UTF-16BE"
    return "UTF-16LE" if head[1:2] == b"\0" and head[:1] != b"\0" else "UTF-8"


def _first(container: Container) -> Any:
    """The first row; None if it cannot be read."""
    try:
        row = next(container.rows(), (0, None))[1]
    except DataError:
        return None
    return None if isinstance(row, BadRow) else row


def _text(container: Container, newline: str) -> TextIO:
    encoding = "UTF-8-SIG" if container.encoding == "UTF-8" else container.encoding
    opening = gzip.open if container.zipped else io.open
    return opening(container.path, "rt", encoding=encoding, newline=newline)


def _lines(container: Container) -> Numbered:
    for number, line in _encoded_lines(container):
        try:
            yield number, parse_json(line)
        except BadRow as bad:
            if str(bad).startswith("not UTF-8"):  # so the rest of the file is in another encoding too
                raise DataError(f"{container.path}:{number}: {bad}", iconv("WINDOWS-1252", container.path)) from None
            yield number, bad


def _encoded_lines(container: Container) -> Iterator[tuple[int, bytes]]:
    """Yield the lines in UTF-8, whatever the file's encoding."""
    if container.encoding == "UTF-8":
        with open_lines(container.path) as stream:
            yield from read_lines(stream)
        return
    with _text(container, "\n") as text:
        for number, line in enumerate(text, 1):
            if line.strip("\ufeff \t\r\n"):
                yield number, line.lstrip("\ufeff").rstrip("\r\n").encode()


class _Json:
    """JSON text, parsed value by value, so that memory holds one value and one block."""

    def __init__(self, path: Path, text: TextIO) -> None:
        self.path, self.text, self.buffer, self.place, self.row = path, text, "", 0, 1
        self.decoder = json.JSONDecoder(object_pairs_hook=unique_keys)

    def peek(self) -> str:
        """The next character except white space and separators; "" at the end."""
        while True:
            self.place = BETWEEN.match(self.buffer, self.place).end()  # type: ignore[union-attr]
            if self.place < len(self.buffer) or not self._read_more():
                return self.buffer[self.place : self.place + 1]

    def value(self) -> Any:
        """Parse the value that begins here. Raises DataError if it is bad, cut short or longer than MOST_OF_A_ROW."""
        while True:
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.place)
            except json.JSONDecodeError as error:
                if self._read_more():
                    continue
                found = f"{self.path}: row {self.row} is not JSON or cut short: {error.msg}"
                raise DataError(found, "save the file again") from None
            except (BadRow, RecursionError) as bad:
                found = str(bad) if isinstance(bad, BadRow) else "nested too deep"
                raise DataError(f"{self.path}: row {self.row}: {found}", "remove it") from None
            if end == len(self.buffer) and self._read_more():  # a number may continue in the next block
                continue
            self.place = end
            return value

    def elements(self) -> Numbered:
        """Yield the elements of the list that begins here, numbered from 1."""
        self.place += 1
        self.row = 1
        while self.peek() != "]":
            yield self.row, self.value()
            self.row += 1
        self.place += 1

    def _read_more(self) -> bool:
        kept = self.buffer[self.place :]
        more = self.text.read(max(BLOCK, len(kept))) if len(kept) < MOST_OF_A_ROW else ""
        if more:
            self.buffer, self.place = kept + more, 0
        return bool(more)


def _array(container: Container) -> Numbered:
    with _text(container, "") as text:
        values = _Json(container.path, text)
        values.peek()
        yield from values.elements()


def _one_object(container: Container) -> Numbered:
    """Yield the rows of the one list of objects in a JSON object, and skip the other values."""
    found = None
    with _text(container, "") as text:
        values = _Json(container.path, text)
        values.peek()
        values.place += 1
        while values.peek() != "}":
            key = str(values.value())
            if values.peek() != "[":
                values.value()
                continue
            elements = values.elements()
            first = next(elements, None)
            if first and isinstance(first[1], dict) and key not in REFUSED_KEYS:
                if found:
                    two = f"{container.path} has two lists of rows, {found} and {key!a}, expected one"
                    raise DataError(two, "save each list in its own file")
                found = f"{key!a}"
                yield first
                yield from elements
            for _ in elements:
                pass
        values.place += 1
        if values.peek():
            raise DataError(f"{container.path} continues after its first JSON object", "save the rows as JSON Lines")


def _csv(container: Container) -> Numbered:
    csv.field_size_limit(MOST_OF_A_ROW)
    with _text(container, "") as text:
        table = csv.reader(text, delimiter=container.delimiter, strict=True)
        ended = 1
        try:
            columns = next(table, [])
            twice = [column for column in columns if columns.count(column) > 1]
            if twice:
                raise DataError(f"{container.path}:1: column {twice[0]!a} appears twice", "rename one of them")
            for cells in table:
                number, ended = ended + 1, table.line_num
                if len(cells) == len(columns):
                    yield number, dict(zip(columns, cells, strict=True))
                elif cells:
                    yield number, BadRow(f"{counted(len(cells), 'cell')}, the first line has {len(columns)}")
        except csv.Error as error:
            found = f"{container.path}:{ended + 1}: not CSV: {error}"
            raise DataError(found, "save the table again, with each text in double quotes") from None


def _parquet(container: Container) -> Numbered:
    import pyarrow as pa
    from pyarrow import parquet

    if container.zipped:
        raise DataError(f"{container.path} is Parquet in gzip", f"gunzip {shlex.quote(str(container.path))}")
    number = 0
    try:
        for batch in parquet.ParquetFile(container.path).iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pa.ArrowException, OSError) as error:
        found = f"{container.path}: the Parquet is damaged after row {number} ({str(error).splitlines()[0]})"
        raise DataError(found, "copy the file again") from None


READERS = {"JSON Lines": _lines, "a JSON array": _array, ONE_OBJECT: _one_object, "CSV": _csv, "Parquet": _parquet}
