"""What a file is by its first bytes, and its rows as a stream: JSON Lines, a JSON array, CSV or Parquet."""

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
from pathlib import Path
from typing import Any, TextIO

from finetune.data.formats.shapes import shape_of
from finetune.data.jsonl import GZIP, BadRow, damaged_gzip, open_lines, parse_json, read_lines, unique_keys
from finetune.errors import DataError
from finetune.wording import counted

HEAD_BYTES = 2**16  # by which a file is recognized
BLOCK = 2**20  # characters of a JSON array that are read at once
MOST_OF_A_ROW = 2**26  # characters of one element of a JSON array, above which it is taken to have no end
DELIMITERS = ",\t;"  # of CSV; the last is Excel's in much of Europe
MARKS = (  # at the start of a text, the longer one first
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
PARQUET = b"PAR1"
UNREAD = {  # what is not read, by its first bytes, and what makes of it a file that is
    b"PK\x03\x04": ("a zip archive, as Excel workbooks are", "unpack it, or save the table as CSV"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "unpack it: zstd -d {file}"),
    b"BZh": ("compressed with bzip2", "unpack it: bunzip2 {file}"),
    b"\xfd7zXZ\x00": ("compressed with xz", "unpack it: unxz {file}"),
}
Numbered = Iterator[tuple[int, Any]]


@dataclass(frozen=True)
class Container:
    """What holds the rows of a file. `first` is the first row, None where it cannot be read.

    `kind` is one of the four that the module names; `delimiter` is of CSV.
    """

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
        """(number from 1, row); a BadRow in place of a row that cannot be read by itself.

        Numbers are lines of JSON Lines and CSV, else they count the rows. Raises DataError where the rest cannot be
        read.
        """
        reading = {"JSON Lines": _lines, "a JSON array": _array, "CSV": _csv, "Parquet": _parquet}[self.kind]
        try:
            yield from reading(self)
        except UnicodeDecodeError as error:
            found = f"{self.path} is not {self.encoding} (byte 0x{error.object[error.start]:02x})"
            raise DataError(found, iconv("WINDOWS-1252", self.path)) from None
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise damaged_gzip(self.path) from None


def iconv(encoding: str, path: Path) -> str:
    """The line that makes UTF-8 of a file; Windows' encoding is a guess, the most frequent of many."""
    guess = "if it comes from Windows in a Western language: " if encoding == "WINDOWS-1252" else ""
    made = shlex.quote(f"{path}.utf8")
    return f"{guess}iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > {made}"


def recognize(path: Path) -> Container:
    """What `path` is. Raises DataError for what is not read, with what to type."""
    with path.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    zipped = head.startswith(GZIP)
    if zipped:
        try:
            head = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head, HEAD_BYTES)
        except zlib.error:
            raise damaged_gzip(path) from None
    for start, (what, advice) in UNREAD.items():
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
    header = text.partition("\n")[0].rstrip("\r")
    delimiter = max(DELIMITERS, key=header.count)
    if text.startswith("{") or delimiter not in header:
        return lines
    columns = next(csv.reader([header], delimiter=delimiter), [])
    is_table = ".csv" in path.suffixes or ".tsv" in path.suffixes or shape_of(dict.fromkeys(columns, ""))
    return replace(lines, kind="CSV", delimiter=delimiter) if is_table else lines


def encoding_of(head: bytes) -> str:
    """UTF-8, -16 or -32 by the mark at the start of a text, or by the zeros between its letters."""
    for mark, name in MARKS:
        if head.startswith(mark):
            return name
    if head[:1] == b"\0" and head[1:2] != b"\0":
        return "UTF-16BE"
    return "UTF-16LE" if head[1:2] == b"\0" and head[:1] != b"\0" else "UTF-8"


def _first(container: Container) -> Any:
    """The first row, None where it cannot be read."""
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
            if str(bad).startswith("not UTF-8"):  # all of the file is in another encoding
                raise DataError(f"{container.path}:{number}: {bad}", iconv("WINDOWS-1252", container.path)) from None
            yield number, bad


def _encoded_lines(container: Container) -> Iterator[tuple[int, bytes]]:
    """Lines in UTF-8, whatever the file's own encoding is."""
    if container.encoding == "UTF-8":
        with open_lines(container.path) as stream:
            yield from read_lines(stream)
        return
    with _text(container, "\n") as text:
        for number, line in enumerate(text, 1):
            if line.strip("\ufeff \t\r\n"):
                yield number, line.lstrip("\ufeff").encode()


def _array(container: Container) -> Numbered:
    """The elements of a JSON array, one after the other, so that no more than one and a block is in memory."""
    decoder, between = json.JSONDecoder(object_pairs_hook=unique_keys), re.compile(r"[ \t\r\n,]*")
    with _text(container, "") as text:
        buffer = text.read(BLOCK).lstrip("\ufeff \t\r\n")
        place, number = 1, 0
        while True:
            place = between.match(buffer, place).end()  # type: ignore[union-attr]
            if buffer[place : place + 1] == "]":
                return
            try:
                row, place = decoder.raw_decode(buffer, place)
            except json.JSONDecodeError as error:
                more = text.read(max(BLOCK, len(buffer))) if len(buffer) - place < MOST_OF_A_ROW else ""
                if not more:
                    found = f"{container.path}: row {number + 1} is not JSON or cut short: {error.msg}"
                    raise DataError(found, "save the file again") from None
                buffer, place = buffer[place:] + more, 0
                continue
            except (BadRow, RecursionError) as bad:
                found = str(bad) if isinstance(bad, BadRow) else "nested too deep"
                raise DataError(f"{container.path}: row {number + 1}: {found}", "remove it") from None
            number += 1
            yield number, row


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
