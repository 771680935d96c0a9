"""Rows on disk: written in chunks, read back unchanged, and hashed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data import encode
from finetune.data.split import Split
from finetune.data.store import SCHEMA, EncodedFile, EncodedFiles, Rows, from_arrow, to_arrow
from finetune.data.template import IGNORED, Encoded
from support.prepared import contents

messages_of_rows = st.lists(
    st.tuples(st.integers(1, 10**6), st.lists(st.integers(0, 31999), min_size=1, max_size=9)), min_size=1, max_size=12
)


def written(folder: Path, rows: list[tuple[int, list[int]]], chunk_rows: int) -> tuple[Rows, dict[str, str]]:
    """Rows with labels that ignore even ids, written in chunks of `chunk_rows`."""
    path = folder / "rows.arrow"
    with pa.ipc.new_file(str(path), SCHEMA) as writer:
        for start in range(0, len(rows), chunk_rows):
            part = [encode.Row(line, bytes(16), [], 7, 8, 9, False, ["id"]) for line, _ in rows][
                start : start + chunk_rows
            ]
            encoded = [Encoded(ids, labeled(ids), [len(ids)]) for _, ids in rows[start : start + chunk_rows]]
            writer.write_batch(to_arrow(encode.make_chunk(part, encoded, [True] * len(part))))
    file = EncodedFile(path, "rows.jsonl")
    split = Split(EncodedFiles([file]))
    for first, batch in zip(file.starts, file.batches, strict=False):
        chunk = from_arrow(batch)
        split.add(int(first), chunk, chunk.lengths, np.ones(len(chunk.lines), bool))
        split.add(int(first), chunk, chunk.lengths, np.zeros(len(chunk.lines), bool))
    return split.rows(), split.close()


def labeled(row: list[int]) -> list[int]:
    return [token if token % 2 else IGNORED for token in row]


@settings(max_examples=60, deadline=None)
@given(rows=messages_of_rows, chunk_rows=st.integers(1, 5))
def test_rows_read_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, list[int]]], chunk_rows: int
) -> None:
    read, hashes = written(tmp_path_factory.mktemp("rows"), rows, chunk_rows)
    assert contents(read) == [(line, row, labeled(row)) for line, row in rows]
    assert read.lengths.tolist() == [len(row) for _, row in rows]
    assert hashes == written(tmp_path_factory.mktemp("rows"), rows, 100)[1]


ROWS = [(3, [1, 10, 11]), (5, [1, 12, 13, 15]), (9, [1, 17])]


# Examples are plain lists: from int32 arrays torch would make labels that cross_entropy refuses.
def test_a_dataset_has_one_example_a_row(tmp_path: Path) -> None:
    dataset = written(tmp_path, ROWS, 2)[0].dataset(None)
    assert [dataset[index] for index in range(len(dataset))] == [
        {"input_ids": row, "labels": labeled(row), "lines": [f"rows.jsonl:{line}"]} for line, row in ROWS
    ]


def test_a_packed_dataset_has_one_example_a_sequence_with_lines_and_lengths(tmp_path: Path) -> None:
    dataset = written(tmp_path, ROWS, 2)[0].dataset([[1], [0, 2]])
    assert [dataset[index] for index in range(len(dataset))] == [
        {"input_ids": ROWS[1][1], "labels": labeled(ROWS[1][1]), "lines": ["rows.jsonl:5"], "seq_lengths": [4]},
        {
            "input_ids": [1, 10, 11, 1, 17],
            "labels": [1, IGNORED, 11, 1, 17],
            "lines": ["rows.jsonl:3", "rows.jsonl:9"],
            "seq_lengths": [3, 2],
        },
    ]


def test_the_token_hash_is_of_the_int32_stream_in_file_order(tmp_path: Path) -> None:
    hashes = written(tmp_path, ROWS, 2)[1]
    for name, stream in (("input_ids", lambda row: row), ("labels", labeled)):
        values = np.array([token for _, row in ROWS for token in stream(row)], "<i4")
        assert hashes[name] == hashlib.sha256(values.tobytes()).hexdigest()
