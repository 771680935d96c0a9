"""Files: JSON read as it was written, whatever a kill or an editor did to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.files import read_json, read_json_lines, write_json


def test_a_document_reads_as_it_was_written(tmp_path: Path) -> None:
    document = {"name": "Zoë", "losses": [1.25, None], "line": "a\u2028b"}
    write_json(tmp_path / "a.json", document)
    assert read_json(tmp_path / "a.json") == document
    (tmp_path / "b.json").write_text('\ufeff{"step": 1}', encoding="utf-8")  # as an editor on Windows saves it
    assert read_json(tmp_path / "b.json") == {"step": 1}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_what_is_not_json_is_a_value_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("half", [b'{"step": 3, "lo', b'{"step": 3, "name": "\xc3', b"12", b"[" * 100_000, b"\n"])
def test_a_line_that_a_kill_cut_short_is_left_out_wherever_it_is(half: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "text": "a\xe2\x80\xa8b"}\n' + half)
    whole = [{"step": 1}, {"step": 2, "text": "a\u2028b"}]
    assert read_json_lines(path) == whole
    path.write_bytes(half + b"\n" + path.read_bytes())
    assert read_json_lines(path) == whole


def test_an_absent_file_has_no_lines(tmp_path: Path) -> None:
    assert read_json_lines(tmp_path / "metrics.jsonl") == []
