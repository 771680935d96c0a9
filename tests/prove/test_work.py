"""The rows that the parts train on."""

from __future__ import annotations

import json
from pathlib import Path

from finetune.prove.work import write_rows


def test_rows_are_the_samples_or_joined_where_a_sequence_has_room(tmp_path: Path) -> None:
    def rows(length: int) -> list[str]:
        return write_rows(tmp_path / "rows.jsonl", length).read_text(encoding="utf-8").splitlines()

    short, long = rows(512), rows(4096)
    assert len(short) == 150
    assert len(long) == sum(151 - count for count in range(1, 9))
    assert len(set(long)) == len(long)
    assert len(json.loads(long[-1])["messages"]) > 8
