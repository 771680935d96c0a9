"""The rows of one data file, encoded whole into an entry of the cache, whatever length and split make of them."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from finetune.data.cache import Cache
from finetune.data.encode import CHUNK_LINES, Certificate, Lines, Recipe, encode_batches, row_hash
from finetune.data.formats import foreign
from finetune.data.jsonl import read_lines, unpacked
from finetune.data.store import SCHEMA, EncodedFile, Known, merged, to_arrow
from finetune.data.tokenizer import Chat
from finetune.errors import CheckFailed, DataError
from finetune.files import HashedFile, sha256, shown
from finetune.wording import Report, duration

ROWS = "rows.arrow"
LIBRARIES = ("mistral-common", "sentencepiece", "tokenizers")
STRICTNESS: list[Certificate] = [False, True, "every_row"]
MOST_KEYS = 100  # different keys beside "messages" that are counted; a file may have a new one in each row
PARALLEL_FROM_BYTES = 4_000_000  # below this, starting worker processes takes longer than the work
MOST_WORKERS = 8  # each holds two tokenizers in some 80 MiB, and one process has to write what they send


class Source(NamedTuple):
    """A data file of a split, train or validation; the sum of its content, and how many of its rows are read."""

    split: str
    path: Path
    sha256: str
    max_rows: int | None


@dataclass(frozen=True)
class Encoding:
    """How an entry of the cache is made: the rows of one file, whole, whatever length and split make of them."""

    source: Source
    recipe: Recipe
    workers: int | None
    cache: Cache
    recipe_key: str

    def key(self) -> str:
        """Begins with the recipe, which entries that can lend rows have in common."""
        content = _short_hash([self.source.sha256, self.source.max_rows, self.recipe.certificate])
        return f"{self.recipe_key}-{content}"

    def fill(self, folder: Path) -> dict[str, Any]:
        """Write the rows into `folder`, in file order; returns what is known of the file beside them."""
        foreign.refuse(self.source.path, self.source.split)
        bad: list[tuple[int, str]] = []
        keys: dict[str, int] = {}
        with (folder / ROWS).open("wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            for batch in self._batches(bad):
                writer.write_batch(batch)
                count_keys(keys, Counter(key for row in batch.column("other_keys").to_pylist() for key in row))
        return {"certificate": self.recipe.certificate, "bad": bad, "other_keys": keys}

    def _known(self) -> Known:
        """Rows of other entries, of which the certificate compared as many at least."""
        others = self.cache.whole(self.recipe_key)
        wanted = STRICTNESS.index(self.recipe.certificate)
        lenders = [folder for folder, facts in others if STRICTNESS.index(facts["certificate"]) >= wanted]
        return Known([EncodedFile(folder / ROWS) for folder in lenders])

    def _batches(self, bad: list[tuple[int, str]]) -> Iterator[pa.RecordBatch]:
        """The rows of the file, which must be the bytes that its sum is of, and have mistral-common's tokens.

        A line that an entry of the cache has already is not encoded again. `bad` gets the bad rows.
        """
        _, path, sha256, max_rows = self.source
        size = path.stat().st_size
        workers = self.workers if self.workers is not None else worker_count() if size >= PARALLEL_FROM_BYTES else 0
        pace, known = _Pace(path, size, max_rows, self.cache.report), self._known()
        waiting: deque[pa.RecordBatch] = deque()

        def unknown(lines: Lines) -> Lines:
            numbers = known.find([row_hash(line) for _, line in lines])
            there = numbers >= 0
            waiting.append(known.take(numbers[there], np.array([number for number, _ in lines])[there]))
            return [line for line, is_there in zip(lines, there, strict=True) if not is_there]

        with HashedFile(path) as file, unpacked(file) as stream:
            lines = islice(read_lines(stream), max_rows)
            batches = map(unknown, iter(lambda: list(islice(lines, CHUNK_LINES)), []))
            for outcome in encode_batches(batches, self.recipe, workers):
                if outcome.mismatch:
                    found = f"certificate: {path}:{outcome.mismatch}"
                    raise CheckFailed(found, "Report this row: no run may start on it.", between="\n")
                bad += outcome.bad
                batch = merged([waiting.popleft(), to_arrow(outcome.rows)])
                yield batch
                pace.tell(batch.num_rows, file.bytes_read)
            if file.sha256() != sha256:
                raise DataError(f"data: {path} changed while it was read", "try again when nothing writes to it")


def recipe_key(recipe: Recipe, chat: Chat) -> str:
    """Template, tokenizer, libraries and this code: whatever decides which tokens a line becomes."""
    here = Path(__file__).parent
    code = [sha256(here / f"{name}.py") for name in ("template", "tokenizer", "jsonl", "encode", "store")]
    return _short_hash([chat.fingerprint, recipe.system_prompt, recipe.train_on, list(map(version, LIBRARIES)), code])


def _short_hash(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


class _Pace:
    """Says how far a file is encoded, from its second second on: rows, rows a second, and the time that is left."""

    def __init__(self, path: Path, size: int, max_rows: int | None, report: Report) -> None:
        self._path, self._size, self._max_rows, self._report = path, size, max_rows, report
        self._rows = 0
        self._started = self._told = time.monotonic()

    def tell(self, rows: int, bytes_read: int) -> None:
        """`rows` more are done, of the first `bytes_read` bytes; said at most once a second."""
        self._rows += rows
        now = time.monotonic()
        if now - self._told < 1:
            return
        self._told, seconds = now, now - self._started
        done = max(bytes_read / self._size, self._rows / self._max_rows if self._max_rows else 0)
        left = duration(seconds * (1 / done - 1))
        rate = f"{self._rows:,} rows, {self._rows / seconds:,.0f} rows/s, {left} left"
        self._report.progress(f"encoding {shown(self._path)}: {rate}")


def count_keys(counts: dict[str, int], more: dict[str, int]) -> None:
    """Add `more` to `counts`, which gets no more keys than MOST_KEYS."""
    for key, count in more.items():
        if key in counts or len(counts) < MOST_KEYS:
            counts[key] = counts.get(key, 0) + count


def worker_count() -> int:
    """Processes to encode with: the cores this process may use, at most MOST_WORKERS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)
