"""Encoded rows on disk: one Arrow file per data file, read through a memory map."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from finetune.data.digests import ROW_HASH_BYTES
from finetune.data.encode import Chunk
from finetune.files import shown

if TYPE_CHECKING:
    import datasets

_HASH = pa.binary(ROW_HASH_BYTES)
SCHEMA = pa.schema(
    [
        ("lines", pa.int32()),
        ("line_hashes", _HASH),
        ("digests", pa.uint64()),
        ("normalized", pa.uint64()),
        ("openings", pa.uint64()),
        ("literal", pa.bool_()),
        ("compared", pa.bool_()),
        ("ids_hashes", _HASH),
        ("labels_hashes", _HASH),
        ("other_keys", pa.list_(pa.string())),
        ("turn_ends", pa.list_(pa.int32())),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
    ]
)


class Place(NamedTuple):
    """Where a row was read: a file's path and a line number."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def shown(self) -> str:
        """The place with the path as a user types it in the project's root."""
        return f"{shown(Path(self.file))}:{self.line}"


def to_arrow(chunk: Chunk) -> pa.RecordBatch:
    """Convert a chunk into a batch of SCHEMA."""
    lists = {"turn_ends": chunk.turns, "input_ids": chunk.lengths, "labels": chunk.lengths}
    columns = []
    for field in SCHEMA:
        values = getattr(chunk, field.name)
        if field.name in lists:
            offsets = pa.array(np.concatenate([[0], np.cumsum(lists[field.name])]), pa.int32())
            columns.append(pa.ListArray.from_arrays(offsets, pa.array(values, pa.int32())))
        elif field.type == _HASH:
            columns.append(pa.FixedSizeBinaryArray.from_buffers(_HASH, len(values), [None, pa.py_buffer(values)]))
        else:
            columns.append(pa.array(values, field.type))
    return pa.record_batch(columns, schema=SCHEMA)


def from_arrow(batch: pa.RecordBatch) -> Chunk:
    """Convert a batch of SCHEMA back into a chunk, whose arrays share the batch's memory."""
    arrays: dict[str, Any] = {"other_keys": batch.column("other_keys").to_pylist()}
    for field in SCHEMA:
        column = batch.column(field.name)
        if field.type == _HASH:
            arrays[field.name] = _hashes(column)
        elif field.name != "other_keys" and pa.types.is_list(field.type):
            arrays[field.name] = column.flatten().to_numpy()
        elif field.name != "other_keys":
            arrays[field.name] = column.to_numpy(zero_copy_only=False)
    for name, of_column in (("turns", "turn_ends"), ("lengths", "input_ids")):
        arrays[name] = np.diff(batch.column(of_column).offsets.to_numpy())
    return Chunk(**arrays)


def _hashes(column: pa.Array) -> np.ndarray:
    """Read a column of hashes, [rows, ROW_HASH_BYTES]."""
    buffer = np.frombuffer(column.buffers()[1], np.uint8).reshape(-1, ROW_HASH_BYTES)
    return buffer[column.offset : column.offset + len(column)]


class EncodedFile:
    """The complete rows of the data file `source`; `starts` are the numbers of its batches' first rows."""

    def __init__(self, path: Path, source: str = "") -> None:
        self.source = source
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self.batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        self.starts = np.cumsum([0, *(batch.num_rows for batch in self.batches)])


class EncodedFiles:
    """The rows of several encoded files, numbered through; `starts` are the numbers of the files' first rows."""

    def __init__(self, files: list[EncodedFile]) -> None:
        self.files = files
        self.starts = np.cumsum([0, *(file.starts[-1] for file in files)])

    def column(self, name: str) -> np.ndarray:
        """A numeric column of SCHEMA, [rows]."""
        values: np.ndarray = self._column(name).to_numpy()
        return values

    def turns(self) -> np.ndarray:
        """How many turns of each row carry loss, [rows]."""
        counts = [np.diff(array.offsets.to_numpy()) for array in self._column("turn_ends").chunks]
        return np.concatenate([np.empty(0, np.int32), *counts])

    def _column(self, name: str) -> pa.ChunkedArray:
        arrays = [batch.column(name) for file in self.files for batch in file.batches]
        return pa.chunked_array(arrays, SCHEMA.field(name).type)

    def find(self, number: int) -> tuple[EncodedFile, pa.RecordBatch, int]:
        """The file and batch of a row, and its index in the batch."""
        at = int(np.searchsorted(self.starts, number, side="right")) - 1
        file, in_file = self.files[at], number - int(self.starts[at])
        at = int(np.searchsorted(file.starts, in_file, side="right")) - 1
        return file, file.batches[at], in_file - int(file.starts[at])

    def place(self, number: int) -> Place:
        """Where a row was read."""
        file, batch, index = self.find(number)
        return Place(file.source, batch.column("lines")[index].as_py())


class KnownLines:
    """Rows of files encoded earlier, found by the hash of their line."""

    def __init__(self, files: list[EncodedFile]) -> None:
        self._rows = EncodedFiles(files)
        hashes = [_hashes(batch.column("line_hashes")) for file in files for batch in file.batches]
        every = np.concatenate([np.empty((0, ROW_HASH_BYTES), np.uint8), *hashes]).view(f"S{ROW_HASH_BYTES}").ravel()
        self._order = np.argsort(every)
        self._hashes = every[self._order]

    def find(self, hashes: list[bytes]) -> np.ndarray:
        """The number of a row with each hash, -1 if there is none, [hashes]."""
        if not len(self._hashes):
            return np.full(len(hashes), -1)
        sought = np.array(hashes, self._hashes.dtype)
        nearest = np.minimum(np.searchsorted(self._hashes, sought), len(self._hashes) - 1)
        return np.where(self._hashes[nearest] == sought, self._order[nearest], -1)

    def take(self, numbers: np.ndarray, lines: np.ndarray) -> pa.RecordBatch:
        """The rows with these `numbers`, with their `lines` in another file and in that order; both [rows]."""
        parts: dict[int, tuple[pa.RecordBatch, list[int], list[int]]] = {}
        for number, line in zip(numbers.tolist(), lines.tolist(), strict=True):
            _, batch, index = self._rows.find(number)
            _, indices, of_lines = parts.setdefault(id(batch), (batch, [], []))
            indices.append(index)
            of_lines.append(line)
        return merged(
            [
                batch.take(pa.array(indices)).set_column(0, "lines", pa.array(of_lines, pa.int32()))
                for batch, indices, of_lines in parts.values()
            ]
        )


def merged(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    """Merge batches into one, in the order of their lines."""
    batches = [batch for batch in batches if batch.num_rows]
    if len(batches) == 1:
        return batches[0]
    table = pa.Table.from_batches(batches, SCHEMA).sort_by("lines").combine_chunks()
    return (table.to_batches() or [pa.RecordBatch.from_pylist([], SCHEMA)])[0]


class Rows:
    """Some rows of encoded files, by their numbers `indices`, each cut to its length in `lengths`; both [rows]."""

    def __init__(self, encoded: EncodedFiles, indices: np.ndarray, lengths: np.ndarray) -> None:
        self._encoded, self._indices, self.lengths = encoded, indices, lengths

    @property
    def files(self) -> int:
        """The number of files the rows may come from."""
        return len(self._encoded.files)

    def row(self, index: int) -> tuple[Place, np.ndarray, np.ndarray]:
        """(place, input_ids [tokens], labels [tokens]) of one row, read from the memory map."""
        file, batch, inside = self._encoded.find(int(self._indices[index]))
        length = int(self.lengths[index])
        columns = (batch.column(name)[inside].values.to_numpy()[:length] for name in ("input_ids", "labels"))
        return (Place(file.source, batch.column("lines")[inside].as_py()), *columns)

    def dataset(self, sequences: list[list[int]] | None) -> datasets.Dataset:
        """A dataset for the trainer: one example per row, or per packed sequence (then with `seq_lengths`).

        `lines` of an example are file:line of each row in it.
        """
        import datasets

        groups = sequences if sequences is not None else [[index] for index in range(len(self.lengths))]
        packed = sequences is not None

        def gather(batch: dict[str, list[list[int]]]) -> dict[str, list[Any]]:
            examples: dict[str, list[Any]] = {"input_ids": [], "labels": [], "lines": []}
            if packed:
                examples["seq_lengths"] = []
            for group in batch["rows"]:
                places, input_ids, labels = zip(*(self.row(index) for index in group), strict=True)
                examples["input_ids"].append(np.concatenate(input_ids).tolist())
                examples["labels"].append(np.concatenate(labels).tolist())
                examples["lines"].append([place.shown for place in places])
                if packed:
                    examples["seq_lengths"].append([len(ids) for ids in input_ids])
            return examples

        return datasets.Dataset.from_dict({"rows": groups}).with_transform(gather)
