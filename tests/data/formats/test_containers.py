"""A file is recognized by its first bytes, and its rows come as a stream with the numbers that a person would count."""

from __future__ import annotations

import codecs
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data import jsonl
from finetune.data.formats import containers
from finetune.data.formats.containers import encoding_of, recognize
from finetune.data.jsonl import BadRow
from finetune.errors import DataError


def file(folder: Path, content: bytes | str, name: str = "rows.json") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows(path: Path) -> list[tuple[int, Any]]:
    return [(number, str(row) if isinstance(row, BadRow) else row) for number, row in recognize(path).rows()]


def failure(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        rows(path)
    return str(caught.value).replace(str(path), "FILE")


TALK = '{"role": "user", "content": "A"}'
KINDS = {
    "an object a line": ('{"a": 1}\n{"a": 2}\n', "JSON Lines"),
    "one object": ('{"a": 1}', "JSON Lines"),
    "a list of messages a line": (f"[{TALK}]\n[{TALK}]\n", "JSON Lines"),
    "one list of messages": (f"[{TALK}]", "JSON Lines"),
    "an array on one line": ('[{"a": 1}, {"a": 2}]', "a JSON array"),
    "an array on several lines": ('\n [\n  {"a": 1},\n  {"a": 2}\n]\n', "a JSON array"),
    "an empty array": ("[]", "a JSON array"),
    "one object with a list of rows": ('{"data": [{"a": 1}, {"a": 2}]}', "one JSON object"),
    "one object on several lines": ('{\n "data": [\n{"a": 1}\n], "count": 12\n}\n', "one JSON object"),
    "rows below metadata": ('{"n": 1, "tags": ["x", "y"], "none": [], "data": [{"a": 1}]}', "one JSON object"),
    "conversations below one key": (f'{{"conversations": [{{"conversations": [{TALK}]}}]}}', "one JSON object"),
    "one conversation": (f'{{"messages": [{TALK}]}}', "JSON Lines"),
    "one conversation on several lines": (f'{{\n "id": 7,\n "messages": [\n{TALK}\n]}}\n', "JSON Lines"),
    "one pair with a list of objects": ('{"prompt": "A", "completion": "B", "tools": [{"a": 1}]}', "JSON Lines"),
    "a bad row with tools": ('{"tools": [{"a": 1}], "messages": []}', "JSON Lines"),
    "objects with a list each": ('{"data": [{"a": 1}]}\n{"data": [{"a": 2}]}\n', "JSON Lines"),
    "a long object with a list, and another": (
        '{"data": [{"a": "' + "x" * 2**17 + '"}]}\n{"data": [{"a": 2}]}\n',
        "JSON Lines",
    ),
    "an object without a list": ('{\n "a": {"b": [{"c": 1}]}\n}', "JSON Lines"),
    "columns that are known": ("prompt,completion\na,b\n", "CSV"),
    "tabs": ("prompt\tcompletion\na\tb\n", "CSV with tabs (TSV)"),
    "semicolons": ("prompt;completion\na;b\n", "CSV"),
    "text with commas": ("Hello, you\n", "JSON Lines"),
    "text": ("Hello\n", "JSON Lines"),
}


@pytest.mark.parametrize(("content", "kind"), KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_text_is_recognized_in_any_encoding_whatever_its_name(
    tmp_path: Path, content: str, kind: str, encoding: str
) -> None:
    path = file(tmp_path, content.encode(encoding))
    name = {"utf-8": "", "utf-8-sig": "", "utf-16-le": ", UTF-16LE", "utf-16-be": ", UTF-16BE"}
    assert recognize(path).described == kind + name.get(encoding, f", {encoding.upper()}")
    plain = file(tmp_path, content, "plain")
    assert rows(path) == rows(plain)
    assert rows(file(tmp_path, gzip.compress(path.read_bytes()), "packed")) == rows(plain)


def test_unknown_columns_are_csv_by_the_name_of_the_file(tmp_path: Path) -> None:
    assert recognize(file(tmp_path, "Q,A\na,b\n", "rows.csv")).kind == "CSV"
    assert recognize(file(tmp_path, gzip.compress(b"Q,A\na,b\n"), "rows.csv.gz")).described == "CSV, gzip"
    assert recognize(file(tmp_path, "Q,A\na,b\n", "rows.txt")).kind == "JSON Lines"


@pytest.mark.parametrize(
    ("head", "encoding"),
    [(codecs.BOM_UTF16_BE + b"\0a", "UTF-16"), (codecs.BOM_UTF32_LE + b"a\0\0\0", "UTF-32"), (b"", "UTF-8"),
        (b"\0", "UTF-16BE"), (b"a", "UTF-8"), (b"\0\0", "UTF-8")],
)  # fmt: skip
def test_an_encoding_is_known_by_its_mark_or_by_zeros(head: bytes, encoding: str) -> None:
    assert encoding_of(head) == encoding


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(
    elements=st.lists(st.dictionaries(st.text(max_size=3), values, max_size=3), max_size=9),
    block=st.integers(1, 40),
    indent=st.sampled_from([None, 0, 4]),
)
def test_an_array_read_in_blocks_is_the_array(
    tmp_path_factory: pytest.TempPathFactory, elements: list[Any], block: int, indent: int | None
) -> None:
    path = file(tmp_path_factory.mktemp("array"), json.dumps(elements, indent=indent))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(containers, "BLOCK", block)
        assert list(containers.Container(path, "a JSON array").rows()) == list(enumerate(elements, 1))


@settings(max_examples=100, deadline=None)
@given(
    keys=st.dictionaries(st.text(max_size=3), values.filter(lambda value: not isinstance(value, list)), max_size=3),
    elements=st.lists(st.dictionaries(st.text(max_size=3), values, max_size=3), min_size=1, max_size=5),
    place=st.integers(0, 3),
    block=st.integers(1, 40),
    indent=st.sampled_from([None, 0, 4]),
)
def test_the_list_of_rows_is_read_in_blocks_wherever_it_is_in_the_object(
    tmp_path_factory: pytest.TempPathFactory,
    keys: dict[str, Any],
    elements: list[Any],
    place: int,
    block: int,
    indent: int | None,
) -> None:
    pairs = list(keys.items())
    content = dict([*pairs[:place], ("the rows", elements), *pairs[place:]])
    path = file(tmp_path_factory.mktemp("object"), json.dumps(content, indent=indent))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(containers, "BLOCK", block)
        assert list(containers.Container(path, containers.ONE_OBJECT).rows()) == list(enumerate(elements, 1))


CUT = "FILE: row 2 is not JSON or cut short: Expecting value; save the file again"
UNREADABLE = {
    "a zip archive": (b"PK\x03\x04...",
        "FILE is a zip archive, as Excel workbooks are; unpack it, or save the table as CSV"),
    "zstd": (b"\x28\xb5\x2f\xfd...", "FILE is compressed with zstd; unpack it: zstd -d FILE"),
    "bzip2": (b"BZh9...", "FILE is compressed with bzip2; unpack it: bunzip2 FILE"),
    "xz": (b"\xfd7zXZ\x00...", "FILE is compressed with xz; unpack it: unxz FILE"),
    "a damaged gzip": (b"\x1f\x8b" + bytes(40),
        "FILE: the gzip is damaged or cut short; copy the file again; gzip -t FILE tests it"),
    "damaged Parquet": (b"PAR1" + bytes(40),
        "FILE: the Parquet is damaged after row 0 (Parquet magic bytes not found in footer. Either the file is "
        "corrupted or this is not a parquet file.); copy the file again"),
    "Parquet in gzip": (gzip.compress(b"PAR1" + bytes(40)), "FILE is Parquet in gzip; gunzip FILE"),
    "an array cut short": ('[{"a": 1}, {"a": ', CUT),
    "an array without its end": ('[{"a": 1}', CUT),
    "an array with a key twice": ('[{"a": 1}, {"a": 1, "a": 2}]',
        "FILE: row 2: key 'a' appears twice in one object; remove it"),
    "an array nested too deep": (f'[{{"a": {"[" * 3000}{"]" * 3000}}}]', "FILE: row 1: nested too deep; remove it"),
    "an object cut short": ('{"data": [{"a": 1}, {"a": ', CUT),
    "an object without its end": ('{"data": [{"a": 1}]', CUT),
    "an object with two lists": ('{"train": [{"a": 1}], "test": [{"a": 1}]}',
        "FILE has two lists of rows, 'train' and 'test', expected one; save each list in its own file"),
    "two objects": ('{\n"data": [{"a": 1}]}\n{\n"data": [{"a": 2}]}\n',
        "FILE continues after its first JSON object; save the rows as JSON Lines"),
    "CSV with an open quote": ('prompt,completion\na,b\nc,"d\ne,f\n',
        "FILE:3: not CSV: unexpected end of data; save the table again, with each text in double quotes"),
    "CSV with a column twice": ("prompt,completion,prompt\na,b,c\n",
        "FILE:1: column 'prompt' appears twice; rename one of them"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_an_unreadable_file_is_reported_with_what_to_type(tmp_path: Path, content: bytes | str, message: str) -> None:
    assert failure(file(tmp_path, content)) == message


def test_of_an_element_without_an_end_no_more_is_kept_than_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "BLOCK", 100)
    monkeypatch.setattr(containers, "MOST_OF_A_ROW", 1000)
    path = file(tmp_path, '[{"a": "' + "x" * 5000 + '"}]')
    assert failure(path).startswith("FILE: row 1 is not JSON or cut short: ")


NUMBERED: dict[str, tuple[str, list[tuple[int, Any]]]] = {
    "CSV by its lines": ('prompt,completion\n"a\nb",c\n\nd,"e ""f"""\ng\nh,i,j\n', [
        (2, {"prompt": "a\nb", "completion": "c"}),
        (5, {"prompt": "d", "completion": 'e "f"'}),
        (6, "1 cell, the first line has 2"),
        (7, "3 cells, the first line has 2"),
    ]),
    "lines that are not JSON": ('{"a": 1}\n\nhello\n{"a": 2}\n', [
        (1, {"a": 1}), (3, "not JSON: Expecting value at column 1"), (4, {"a": 2}),
    ]),
    "a line that is too long": (json.dumps({"a": "x" * jsonl.MAX_LINE_BYTES}) + '\n{"a": 2}\n', [
        (1, "longer than 1 MiB, expected one conversation a line"), (2, {"a": 2}),
    ]),
}  # fmt: skip


@pytest.mark.parametrize(("content", "numbered"), NUMBERED.values(), ids=NUMBERED.keys())
def test_a_bad_row_does_not_end_the_stream_and_the_others_keep_their_numbers(
    tmp_path: Path, content: str, numbered: list[tuple[int, Any]]
) -> None:
    assert rows(file(tmp_path, content)) == numbered


def test_a_path_is_quoted_where_it_is_to_be_typed(tmp_path: Path) -> None:
    path = file(tmp_path, b'{"a": "\xff"}\n', "it's here.jsonl")
    quoted = str(path).replace("'", "'\"'\"'")
    with pytest.raises(DataError) as caught:
        rows(path)
    assert str(caught.value) == (
        f"{path}:1: not UTF-8: byte 0xff at position 7; if it comes from Windows in a Western language: "
        f"iconv -f WINDOWS-1252 -t UTF-8 '{quoted}' > '{quoted}.utf8'"
    )
