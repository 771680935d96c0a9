"""Encoded rows: an Arrow file of a data file's rows, whole, and splits that say which of them count, and how far."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from finetune.data.encode import ROW_HASH_BYTES, Chunk, Place, Statistics
from finetune.data.template import IGNORED

if TYPE_CHECKING:
    import datasets

# What `Split` keeps of each row; most by its name in `Chunk`.
NO_ROWS: dict[str, np.ndarray] = {
    "digests": np.empty(0, np.uint64),
    "normalized": np.empty(0, np.uint64),
    "openings": np.empty(0, np.uint64),
    "full_lengths": np.empty(0, np.int32),
    "indices": np.empty(0, np.int64),
    "kept_lengths": np.empty(0, np.int32),
}
MOST_BARS = 30
WIDTHS = [round(digit * 10**power) for power in range(9) for digit in (1, 2, 5)]  # tokens, of a histogram's bar
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


def to_arrow(chunk: Chunk) -> pa.RecordBatch:
    """A chunk as a batch of SCHEMA."""
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
    """The chunk that a batch of SCHEMA was made from; its arrays are those of the batch."""
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
    """The hashes in a column of SCHEMA, [rows, ROW_HASH_BYTES] bytes."""
    whole = np.frombuffer(column.buffers()[1], np.uint8).reshape(-1, ROW_HASH_BYTES)
    return whole[column.offset : column.offset + len(column)]


class EncodedFile:
    """The rows of the data file `source`, whole, in a memory-mapped Arrow file of SCHEMA."""

    def __init__(self, path: Path, source: str = "") -> None:
        self.source = source
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self.batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        self.starts = np.cumsum([0, *(batch.num_rows for batch in self.batches)])

    def place(self, index: int) -> tuple[pa.RecordBatch, int]:
        """The batch of a row, and its place in there."""
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.batches[number], index - int(self.starts[number])


class EncodedFiles:
    """The rows of some encoded files, one file after the other: `starts` are the numbers of their first rows."""

    def __init__(self, files: list[EncodedFile]) -> None:
        self.files = files
        self.starts = np.cumsum([0, *(file.starts[-1] for file in files)])

    def column(self, name: str) -> np.ndarray:
        """One of the numbers that NO_ROWS names and SCHEMA has, of all rows, [rows]."""
        batches = (batch for file in self.files for batch in file.batches)
        return np.concatenate([NO_ROWS[name], *(batch.column(name).to_numpy() for batch in batches)])

    def turns(self) -> np.ndarray:
        """How many turns of each row carry loss, [rows]."""
        batches = (batch for file in self.files for batch in file.batches)
        counts = [np.diff(batch.column("turn_ends").offsets.to_numpy()) for batch in batches]
        return np.concatenate([np.empty(0, np.int32), *counts])

    def find(self, index: int) -> tuple[EncodedFile, pa.RecordBatch, int]:
        """The file of a row, its batch, and its place in there."""
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        file = self.files[number]
        return file, *file.place(index - int(self.starts[number]))

    def place(self, index: int) -> Place:
        """Where a row was read."""
        file, batch, inside = self.find(index)
        return Place(file.source, batch.column("lines")[inside].as_py())


class Known:
    """Rows of earlier encoded files, found by the hash of their line."""

    def __init__(self, files: list[EncodedFile]) -> None:
        self._rows = EncodedFiles(files)
        hashes = [_hashes(batch.column("line_hashes")) for file in files for batch in file.batches]
        whole = np.concatenate([np.empty((0, ROW_HASH_BYTES), np.uint8), *hashes]).view(f"S{ROW_HASH_BYTES}").ravel()
        self._order = np.argsort(whole)
        self._hashes = whole[self._order]

    def find(self, hashes: list[bytes]) -> np.ndarray:
        """The number of a row with each of the hashes, -1 where there is none, [hashes]."""
        if not len(self._hashes):
            return np.full(len(hashes), -1)
        wanted = np.array(hashes, self._hashes.dtype)
        places = np.minimum(np.searchsorted(self._hashes, wanted), len(self._hashes) - 1)
        return np.where(self._hashes[places] == wanted, self._order[places], -1)

    def take(self, numbers: np.ndarray, lines: np.ndarray) -> pa.RecordBatch:
        """The rows with these `numbers`, as on these `lines` of another file and in their order; both [rows]."""
        parts: dict[int, tuple[pa.RecordBatch, list[int], list[int]]] = {}
        for number, line in zip(numbers.tolist(), lines.tolist(), strict=True):
            _, batch, inside = self._rows.find(number)
            _, rows, of_lines = parts.setdefault(id(batch), (batch, [], []))
            rows.append(inside)
            of_lines.append(line)
        taken = [
            batch.take(pa.array(rows)).set_column(0, "lines", pa.array(of_lines, pa.int32()))
            for batch, rows, of_lines in parts.values()
        ]
        return merged(taken)


def merged(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    """The rows of all batches in the order of their lines."""
    batches = [batch for batch in batches if batch.num_rows]
    if len(batches) == 1:
        return batches[0]
    table = pa.Table.from_batches(batches, SCHEMA).sort_by("lines").combine_chunks()
    return (table.to_batches() or [pa.RecordBatch.from_pylist([], SCHEMA)])[0]


class Split:
    """The rows of one split: which, how many tokens of each, their statistics, and hashes of token stream and labels.

    They are rows of `encoded`; one that was added twice is there twice. Of each it keeps a few numbers, by which rows
    are compared when all are there.
    """

    def __init__(self, encoded: EncodedFiles) -> None:
        self._encoded = encoded
        self.statistics = Statistics()
        self._kept: dict[str, list[np.ndarray]] = {name: [array] for name, array in NO_ROWS.items()}
        self._dropped_digests = [NO_ROWS["digests"]]
        self._hashes = {"input_ids": hashlib.sha256(), "labels": hashlib.sha256()}
        self._whole_hashes = {"input_ids": hashlib.sha256(), "labels": hashlib.sha256()}

    def add(self, first: int, chunk: Chunk, kept: np.ndarray, split: np.ndarray) -> None:
        """Add the rows of `chunk` that the mask `split` [rows] selects, but for those of which nothing is kept.

        `kept` is how many tokens of each row are, [rows]; `first` is the number of the chunk's first row in `encoded`.
        """
        self._whole_hashes["input_ids"].update(chunk.ids_hashes[split].tobytes())
        self._whole_hashes["labels"].update(chunk.labels_hashes[split].tobytes())
        mine = split & (kept > 0)
        self._dropped_digests.append(chunk.digests[split & ~mine])
        indices = np.arange(first, first + len(kept))
        facts = {"indices": indices, "kept_lengths": kept, "full_lengths": chunk.lengths}
        for name, arrays in self._kept.items():
            arrays.append((facts[name] if name in facts else getattr(chunk, name))[mine])
        tokens = _kept_tokens(chunk.lengths, np.where(mine, kept, 0))
        labels = chunk.labels[tokens]
        self._hashes["input_ids"].update(chunk.input_ids[tokens].tobytes())
        self._hashes["labels"].update(labels.tobytes())
        literal = indices[mine & chunk.literal]
        self.statistics.control_tokens += len(literal)
        if len(literal) and self.statistics.first_control_token is None:
            self.statistics.first_control_token = self._encoded.place(int(literal[0]))
        self.statistics.truncated += int((chunk.lengths[mine] > kept[mine]).sum())
        self.statistics.rows += int(mine.sum())
        self.statistics.tokens += len(labels)
        self.statistics.supervised_tokens += int((labels != IGNORED).sum())

    def close(self) -> dict[str, str]:
        """Count what needs all rows; returns the sha256 of the token stream and of the labels, int32 in file order."""
        lengths = self.kept("full_lengths")
        indices, once = np.unique(self.kept("indices"), return_index=True)
        copies = np.delete(indices, np.unique(self.kept("digests")[once], return_index=True)[1])
        self.statistics.duplicates = len(copies)
        self.statistics.first_copy = self._encoded.place(int(copies[0])) if len(copies) else None
        self.statistics.repeated = len(lengths) - len(indices)
        if len(lengths):
            quantiles = np.quantile(lengths, [0.5, 0.95, 1], method="inverted_cdf")
            self.statistics.p50, self.statistics.p95, self.statistics.longest = map(int, quantiles)
            self.statistics.histogram = histogram(lengths, self.statistics.p95)
        return {name: digest.hexdigest() for name, digest in self._hashes.items()}

    def whole(self) -> dict[str, Any]:
        """What does not depend on the length: rows before truncation, those too long to keep included.

        `rows`, and three sha256: `content` (which conversations, in whatever order), `input_ids` and `labels` (of the
        hashes of each row, in file order).
        """
        digests = np.concatenate([self.kept("digests"), *self._dropped_digests])
        content = hashlib.sha256(np.sort(digests).astype(">u8").tobytes()).hexdigest()
        hashes = {name: digest.hexdigest() for name, digest in self._whole_hashes.items()}
        return {"rows": len(digests), "content": content, **hashes}

    def kept(self, name: str) -> np.ndarray:
        """One of the numbers that NO_ROWS names, of each row added, [rows]."""
        return np.concatenate(self._kept[name])

    def place(self, number: int) -> Place:
        """Where the row was read that was added as the `number`th."""
        return self._encoded.place(int(self.kept("indices")[number]))

    def rows(self, most: int | None = None) -> Rows:
        """The rows, all or `most` of them at even distances."""
        indices = self.kept("indices")
        count = min(len(indices), len(indices) if most is None else most)
        places = np.arange(count) * len(indices) // max(1, count)
        return Rows(self._encoded, indices[places], self.kept("kept_lengths")[places])


def _kept_tokens(lengths: np.ndarray, kept: np.ndarray) -> np.ndarray | slice:
    """Which of the tokens of rows of `lengths` [rows] are among the first `kept` [rows] of their row, [tokens]."""
    if (lengths == kept).all():
        return slice(None)  # all of them, and nothing to copy
    places = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    chosen: np.ndarray = places < np.repeat(kept, lengths)
    return chosen


def histogram(lengths: np.ndarray, p95: int) -> dict[str, list[int]]:
    """How many rows [rows] have how many tokens: `counts[i]` rows have `edges[i]` to `edges[i + 1] - 1` of them.

    Bars are equally wide, at most MOST_BARS up to a quarter above `p95`; the last takes all that is longer, so that one
    very long row does not squeeze the rest into one bar.
    """
    reach = min(p95 + p95 // 4, int(lengths.max()))
    width = next(width for width in WIDTHS if width * MOST_BARS > reach)
    edges = np.arange(lengths.min() // width, reach // width + 2) * width
    edges[-1] = max(edges[-1], lengths.max() + 1)
    return {"edges": edges.tolist(), "counts": np.histogram(lengths, edges)[0].tolist()}


def first_pair(
    train: Split, validation: Split, name: str, of: np.ndarray | slice = slice(None)
) -> tuple[Place, Place] | None:
    """Places (train, validation) of the first training row whose `name` (of NO_ROWS) a validation row has too.

    `of` says which validation rows are looked at, [rows].
    """
    ours, theirs = train.kept(name), validation.kept(name)
    looked_at = np.arange(len(theirs))[of]
    shared = np.flatnonzero(np.isin(ours, theirs[looked_at]))
    if not len(shared):
        return None
    other = looked_at[theirs[looked_at] == ours[shared[0]]][0]
    return train.place(int(shared[0])), validation.place(int(other))


class Rows:
    """Some rows of encoded files, each cut. `indices` are theirs in `encoded`, `lengths` their tokens, [rows]."""

    def __init__(self, encoded: EncodedFiles, indices: np.ndarray, lengths: np.ndarray) -> None:
        self._encoded, self._indices, self.lengths = encoded, indices, lengths

    @property
    def files(self) -> int:
        """From how many files they may be."""
        return len(self._encoded.files)

    def row(self, index: int) -> tuple[Place, np.ndarray, np.ndarray]:
        """(place, input_ids [tokens], labels [tokens]) of one row, read from the map."""
        file, batch, inside = self._encoded.find(int(self._indices[index]))
        length = int(self.lengths[index])
        columns = (batch.column(name)[inside].values.to_numpy()[:length] for name in ("input_ids", "labels"))
        return (Place(file.source, batch.column("lines")[inside].as_py()), *columns)

    def dataset(self, sequences: list[list[int]] | None) -> datasets.Dataset:
        """A dataset for the trainer: one example a row, or one a packed sequence of rows (then with `seq_lengths`).

        Its `lines` are file:line of each row.
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
