"""Encode one data file into a cache entry: complete rows, independent of max_seq_length and split."""

from __future__ import annotations

import hashlib
import json
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
from finetune.data.certificate import Certificate
from finetune.data.digests import row_hash
from finetune.data.encode import Lines, Recipe
from finetune.data.formats import foreign
from finetune.data.jsonl import read_lines, unpacked
from finetune.data.store import SCHEMA, EncodedFile, KnownLines, merged, to_arrow
from finetune.data.tokenizer import Chat
from finetune.data.workers import encode_batches, worker_count
from finetune.errors import CheckFailed, DataError
from finetune.files import HashedFile, sha256, shown
from finetune.wording import Report, duration

ROWS = "rows.arrow"
CODE = (
    "template",
    "tokenizer",
    "jsonl",
    "digests",
    "certificate",
    "encode",
    "store",
)  # decide its content
CHUNK_LINES = 256
LIBRARIES = ("mistral-common", "sentencepiece", "tokenizers")
STRICTNESS: list[Certificate] = [False, True, "every_row"]
MOST_KEYS = 100  # different keys besides "messages" that are counted; a file may have a new one in each row
PARALLEL_FROM_BYTES = 4_000_000  # below this, starting worker processes takes longer than the work


class Source(NamedTuple):
    """A data file, its split (train or validation), the sha256 of its content, and how many of its rows are read."""

    split: str
    path: Path
    sha256: str
    max_rows: int | None


@dataclass(frozen=True)
class Encoding:
    """How to make the cache entry of one data file."""

    source: Source
    recipe: Recipe
    workers: int | None
    cache: Cache
    recipe_key: str

    def key(self) -> str:
        """The entry's key; it starts with the recipe's key, shared by all entries whose rows can be reused."""
        content = _short_hash([self.source.sha256, self.source.max_rows, self.recipe.certificate])
        return f"{self.recipe_key}-{content}"

    def fill(self, folder: Path) -> dict[str, Any]:
        """Write the rows into `folder`, in file order; return the certificate, the bad rows and the other keys."""
        foreign.refuse(self.source.path, self.source.split)
        bad: list[tuple[int, str]] = []
        keys: dict[str, int] = {}
        with (folder / ROWS).open("wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            for batch in self._batches(bad):
                writer.write_batch(batch)
                count_keys(keys, Counter(key for row in batch.column("other_keys").to_pylist() for key in row))
        return {"certificate": self.recipe.certificate, "bad": bad, "other_keys": keys}

    def _known(self) -> KnownLines:
        """Rows of the entries whose certificate is at least as strict."""
        strictness = STRICTNESS.index(self.recipe.certificate)
        entries = self.cache.undamaged(self.recipe_key)
        strict = [folder for folder, facts in entries if STRICTNESS.index(facts["certificate"]) >= strictness]
        return KnownLines([EncodedFile(folder / ROWS) for folder in strict])

    def _batches(self, bad: list[tuple[int, str]]) -> Iterator[pa.RecordBatch]:
        """Yield the file's rows; collect the bad ones in `bad`. Lines found in another entry are not encoded again.

        Raises DataError if the file no longer has its sha256, CheckFailed if a row fails the certificate.
        """
        _, path, sha256, max_rows = self.source
        size = path.stat().st_size
        workers = self.workers if self.workers is not None else worker_count() if size >= PARALLEL_FROM_BYTES else 0
        pace, known = _Pace(path, size, max_rows, self.cache.report), self._known()
        waiting: deque[pa.RecordBatch] = deque()

        def unknown(lines: Lines) -> Lines:
            numbers = known.find([row_hash(line) for _, line in lines])
            found = numbers >= 0
            waiting.append(known.take(numbers[found], np.array([number for number, _ in lines])[found]))
            return [line for line, is_known in zip(lines, found, strict=True) if not is_known]

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
                pace.report(batch.num_rows, file.bytes_read)
            if file.sha256() != sha256:
                raise DataError(f"data: {path} changed while it was read", "try again when nothing writes to it")


def recipe_key(recipe: Recipe, chat: Chat) -> str:
    """Hash everything that decides which tokens a line becomes: template, tokenizer, libraries and CODE."""
    code = [sha256(Path(__file__).with_name(f"{name}.py")) for name in CODE]
    return _short_hash([chat.fingerprint, recipe.system_prompt, recipe.train_on, list(map(version, LIBRARIES)), code])


def _short_hash(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


class _Pace:
    """Reports the progress of encoding a file: rows, rows per second and time left."""

    def __init__(self, path: Path, size: int, max_rows: int | None, report: Report) -> None:
        self._path, self._size, self._max_rows, self._report = path, size, max_rows, report
        self._rows = 0
        self._started = self._reported = time.monotonic()

    def report(self, rows: int, bytes_read: int) -> None:
        """Add `rows` encoded rows, read from the first `bytes_read` bytes; report at most once a second."""
        self._rows += rows
        now = time.monotonic()
        if now - self._reported < 1:
            return
        self._reported, seconds = now, now - self._started
        done = max(bytes_read / self._size, self._rows / self._max_rows if self._max_rows else 0)
        left = duration(seconds * (1 / done - 1))
        rate = f"{self._rows:,} rows, {self._rows / seconds:,.0f} rows/s, {left} left"
        self._report.progress(f"encoding {shown(self._path)}: {rate}")


def count_keys(counts: dict[str, int], more: dict[str, int]) -> None:
    """Add `more` to `counts`, up to MOST_KEYS different keys."""
    for key, count in more.items():
        if key in counts or len(counts) < MOST_KEYS:
            counts[key] = counts.get(key, 0) + count
