"""Encoded rows on disk: an Arrow file, written as a stream and read through a memory map."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from finetune.data.encode import Chunk, Statistics
from finetune.data.template import IGNORED

if TYPE_CHECKING:
    import datasets

# What `SplitWriter` keeps of each row, by its name in `Chunk`.
NO_ROWS: dict[str, np.ndarray] = {
    "lines": np.empty(0, np.int32),
    "digests": np.empty(0, np.uint64),
    "normalised": np.empty(0, np.uint64),
    "full_lengths": np.empty(0, np.int32),
}
MOST_BARS = 30
WIDTHS = [round(digit * 10**power) for power in range(9) for digit in (1, 2, 5)]  # tokens, of a histogram's bar
SCHEMA = pa.schema([("line", pa.int32()), ("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])


class SplitWriter:
    """Writes one split's rows to an Arrow file and keeps its statistics and hashes of the token stream and labels.

    Of each row it keeps a few numbers, by which rows are compared when all are there.
    """

    def __init__(self, path: Path) -> None:
        self.statistics = Statistics()
        self._kept: dict[str, list[np.ndarray]] = {name: [array] for name, array in NO_ROWS.items()}
        self._dropped_digests = [NO_ROWS["digests"]]
        self._hashes = {"input_ids": hashlib.sha256(), "labels": hashlib.sha256()}
        self._whole_hashes = {"input_ids": hashlib.sha256(), "labels": hashlib.sha256()}
        self._writer = pa.ipc.new_file(str(path), SCHEMA)

    def write(self, chunk: Chunk, split: np.ndarray) -> None:
        """Append the rows of `chunk` that the mask `split` [rows] selects, but for those too long to keep."""
        self._whole_hashes["input_ids"].update(chunk.ids_hashes[split].tobytes())
        self._whole_hashes["labels"].update(chunk.labels_hashes[split].tobytes())
        mine = split & (chunk.lengths > 0)
        self._dropped_digests.append(chunk.digests[split & ~mine])
        for name, arrays in self._kept.items():
            arrays.append(getattr(chunk, name)[mine])
        tokens = np.repeat(mine, chunk.lengths)
        input_ids, labels, lengths = chunk.input_ids[tokens], chunk.labels[tokens], chunk.lengths[mine]
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        columns = [pa.array(chunk.lines[mine])]
        for name, values in (("input_ids", input_ids), ("labels", labels)):
            self._hashes[name].update(values.tobytes())
            columns.append(pa.ListArray.from_arrays(offsets, pa.array(values)))
        if len(lengths):
            self._writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
        self._count_control_tokens(chunk.lines[mine & chunk.literal])
        self.statistics.truncated += int((chunk.full_lengths[mine] > lengths).sum())
        self.statistics.rows += len(lengths)
        self.statistics.tokens += len(input_ids)
        self.statistics.supervised_tokens += int((labels != IGNORED).sum())

    def close(self) -> dict[str, str]:
        """Finish the file; returns the sha256 of the token stream and of the labels, both int32 in file order."""
        self._writer.close()
        digests, lengths = self.kept("digests"), self.kept("full_lengths")
        firsts = np.unique(digests, return_index=True)[1]
        copies = np.delete(self.kept("lines"), firsts)
        self.statistics.duplicates, self.statistics.first_copy = len(copies), int(copies[0]) if len(copies) else None
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
        """One of the numbers that NO_ROWS names, of each row written, [rows]."""
        return np.concatenate(self._kept[name])

    def _count_control_tokens(self, lines: np.ndarray) -> None:
        self.statistics.control_tokens += len(lines)
        if len(lines) and self.statistics.first_control_token is None:
            self.statistics.first_control_token = int(lines[0])


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


def first_pair(train: SplitWriter, validation: SplitWriter, name: str) -> tuple[int, int] | None:
    """Lines (train, validation) of the first training row whose `name` (of NO_ROWS) a validation row has too."""
    ours, theirs = train.kept(name), validation.kept(name)
    shared = np.flatnonzero(np.isin(ours, theirs))
    if not len(shared):
        return None
    place = np.flatnonzero(theirs == ours[shared[0]])[0]
    return int(train.kept("lines")[shared[0]]), int(validation.kept("lines")[place])


class Rows:
    """Encoded rows in a memory-mapped Arrow file: all, or `most` of them at even distances.

    `lengths`: tokens of each row, [rows].
    """

    def __init__(self, path: Path, most: int | None = None) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        parts = [np.diff(batch.column("input_ids").offsets.to_numpy()) for batch in self._batches]
        lengths = np.concatenate([np.empty(0, np.int32), *parts])
        count = min(len(lengths), len(lengths) if most is None else most)
        self._places = np.arange(count) * len(lengths) // max(1, count)
        self.lengths: np.ndarray = lengths[self._places]

    def row(self, index: int) -> tuple[int, np.ndarray, np.ndarray]:
        """(line, input_ids [tokens], labels [tokens]) of one row, read from the map."""
        place = self._places[index]
        batch_index = int(np.searchsorted(self._starts, place, side="right")) - 1
        batch, inside = self._batches[batch_index], int(place - self._starts[batch_index])
        columns = (batch.column(name)[inside].values.to_numpy() for name in ("input_ids", "labels"))
        return (batch.column("line")[inside].as_py(), *columns)

    def dataset(self, sequences: list[list[int]] | None) -> datasets.Dataset:
        """A dataset for the trainer: one example a row, or one a packed sequence of rows (then with `seq_lengths`)."""
        import datasets

        groups = sequences if sequences is not None else [[index] for index in range(len(self.lengths))]
        packed = sequences is not None

        def gather(batch: dict[str, list[list[int]]]) -> dict[str, list[Any]]:
            examples: dict[str, list[Any]] = {"input_ids": [], "labels": [], "lines": []}
            if packed:
                examples["seq_lengths"] = []
            for group in batch["rows"]:
                lines, input_ids, labels = zip(*(self.row(index) for index in group), strict=True)
                examples["input_ids"].append(np.concatenate(input_ids).tolist())
                examples["labels"].append(np.concatenate(labels).tolist())
                examples["lines"].append(list(lines))
                if packed:
                    examples["seq_lengths"].append([len(ids) for ids in input_ids])
            return examples

        return datasets.Dataset.from_dict({"rows": groups}).with_transform(gather)
