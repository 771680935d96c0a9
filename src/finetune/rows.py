"""Encoded rows on disk: an Arrow file, written as a stream and read through a memory map."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from finetune.chat import IGNORED
from finetune.encoding import Chunk, Statistics

if TYPE_CHECKING:
    import datasets

SCHEMA = pa.schema([("line", pa.int32()), ("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])


class SplitWriter:
    """Writes one split's rows to an Arrow file and keeps its statistics and hashes of the token stream and labels."""

    def __init__(self, path: Path) -> None:
        self.statistics = Statistics()
        self.lines: list[np.ndarray] = []
        self.digests: list[np.ndarray] = []
        self._hashes = {"input_ids": hashlib.sha256(), "labels": hashlib.sha256()}
        self._writer = pa.ipc.new_file(str(path), SCHEMA)

    def write(self, chunk: Chunk, mine: np.ndarray) -> None:
        """Append the rows of `chunk` that the mask `mine` [rows] selects."""
        tokens = np.repeat(mine, chunk.lengths)
        input_ids, labels, lengths = chunk.input_ids[tokens], chunk.labels[tokens], chunk.lengths[mine]
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        columns = [pa.array(chunk.lines[mine])]
        for name, values in (("input_ids", input_ids), ("labels", labels)):
            self._hashes[name].update(values.tobytes())
            columns.append(pa.ListArray.from_arrays(offsets, pa.array(values)))
        if len(lengths):
            self._writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
        self.lines.append(chunk.lines[mine])
        self.digests.append(chunk.digests[mine])
        full_lengths = chunk.full_lengths[mine]
        self.statistics.longest = max(self.statistics.longest, int(full_lengths.max(initial=0)))
        self.statistics.truncated += int((full_lengths > lengths).sum())
        self.statistics.rows += len(lengths)
        self.statistics.tokens += len(input_ids)
        self.statistics.supervised_tokens += int((labels != IGNORED).sum())

    def close(self) -> dict[str, str]:
        """Finish the file; returns the sha256 of the token stream and of the labels, both int32 in file order."""
        self._writer.close()
        digests = self.all_digests()
        self.statistics.duplicates = len(digests) - len(np.unique(digests))
        return {name: digest.hexdigest() for name, digest in self._hashes.items()}

    def all_digests(self) -> np.ndarray:
        """Content digests of the rows written, [rows] uint64."""
        return np.concatenate([np.empty(0, np.uint64), *self.digests])

    def first_line(self, digests: np.ndarray) -> tuple[int, int]:
        """(line, digest) of the first row that has one of `digests`."""
        index = int(np.flatnonzero(np.isin(self.all_digests(), digests))[0])
        return int(np.concatenate(self.lines)[index]), int(self.all_digests()[index])


class Rows:
    """Encoded rows in a memory-mapped Arrow file. `lengths`: tokens of each row, [rows]."""

    def __init__(self, path: Path) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        parts = [np.diff(batch.column("input_ids").offsets.to_numpy()) for batch in self._batches]
        self.lengths: np.ndarray = np.concatenate([np.empty(0, np.int32), *parts])

    def row(self, index: int) -> tuple[int, np.ndarray, np.ndarray]:
        """(line, input_ids [tokens], labels [tokens]) of one row, read from the map."""
        batch_index = int(np.searchsorted(self._starts, index, side="right")) - 1
        batch, inside = self._batches[batch_index], index - self._starts[batch_index]
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
