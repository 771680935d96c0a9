"""Lines of JSONL -> token arrays, in chunks, in this process or in several; torch and transformers are not needed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from finetune.chat import IGNORED, Messages, Reference, load_chat, truncate
from finetune.errors import OutOfResource
from finetune.jsonl import BadRow, open_lines, parse_row, read_lines

CHUNK_LINES = 256


@dataclass(frozen=True)
class Recipe:
    """Everything beside the file's own content that decides which tokens a row becomes."""

    tokenizer_folder: str | None
    system_prompt: str | None
    max_seq_length: int
    truncation: bool
    certificate: bool


@dataclass
class Statistics:
    """What became of the rows of one file or split; counted here and nowhere else.

    `tokens` and `supervised_tokens` are after truncation; `longest` is the longest kept row's before. `certified`
    rows were compared with mistral-common. `bad` lists (line, what was wrong). Rows that belong to no split (dropped,
    bad) count where their file is read: without a validation file, at train.
    """

    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0
    truncated: int = 0
    dropped_long: int = 0
    dropped_bad: int = 0
    duplicates: int = 0
    certified: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Chunk:
    """The rows of some lines. `lines`, `digests`, `lengths` and `full_lengths` (before truncation): [rows];
    `input_ids` and `labels`: [tokens], flat. `statistics` holds only what no array tells."""

    lines: np.ndarray
    digests: np.ndarray
    lengths: np.ndarray
    full_lengths: np.ndarray
    input_ids: np.ndarray
    labels: np.ndarray
    statistics: Statistics
    mismatch: str | None


class Encoder:
    """Turns lines into a `Chunk`; one lives in each worker process."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.chat = load_chat(Path(recipe.tokenizer_folder) if recipe.tokenizer_folder else None)
        self.reference = Reference() if recipe.certificate and self.chat.certifiable else None

    def encode(self, lines: list[tuple[int, bytes]]) -> Chunk:
        """Parse, encode, certify and truncate; bad rows are gathered, not raised."""
        statistics = Statistics()
        rows: list[tuple[int, int, Messages]] = []
        for number, line in lines:
            try:
                messages = parse_row(line)
            except BadRow as bad:
                statistics.bad.append((number, str(bad)))
                continue
            rows.append((number, _digest(messages), with_system_prompt(messages, self.recipe.system_prompt)))
        kept, mismatch = [], None
        for (number, digest, messages), encoded in zip(rows, self.chat.encode([row[2] for row in rows]), strict=True):
            if self.reference and mismatch is None:
                mismatch = self._compare(number, messages, encoded.input_ids, encoded.labels)
                statistics.certified += 1
            cut = truncate(encoded, self.recipe.max_seq_length)
            if cut is not encoded and not self.recipe.truncation:
                long = f"{len(encoded.input_ids)} tokens, model.max_seq_length is {self.recipe.max_seq_length}"
                statistics.bad.append((number, f"{long}, and dataset.truncation is false"))
            elif cut is None:
                statistics.dropped_long += 1
            else:
                kept.append((number, digest, len(encoded.input_ids), cut.input_ids, cut.labels))
        statistics.bad.sort()
        return _chunk(kept, statistics, mismatch)

    def _compare(self, number: int, messages: Messages, input_ids: list[int], labels: list[int]) -> str | None:
        assert self.reference is not None
        wanted_ids, wanted_labels = self.reference.encode(messages)
        if input_ids == wanted_ids and labels == wanted_labels:
            return None
        found = list(zip(input_ids, labels, strict=True))
        wanted = list(zip(wanted_ids, wanted_labels, strict=True))
        places = (index for index, (ours, theirs) in enumerate(zip(found, wanted, strict=False)) if ours != theirs)
        place = next(places, min(len(found), len(wanted)))
        return f"{number}: token {place} is {_ids(found, place)}, mistral-common says {_ids(wanted, place)}"


def _ids(tokens: list[tuple[int, int]], place: int) -> str:
    """The next three ids, each with a + where it carries loss."""
    return (
        " ".join(f"{token}{'' if label == IGNORED else '+'}" for token, label in tokens[place : place + 3]) or "the end"
    )


def _chunk(
    kept: list[tuple[int, int, int, list[int], list[int]]], statistics: Statistics, mismatch: str | None
) -> Chunk:
    return Chunk(
        lines=np.array([row[0] for row in kept], np.int32),
        digests=np.array([row[1] for row in kept], np.uint64),
        lengths=np.array([len(row[3]) for row in kept], np.int32),
        full_lengths=np.array([row[2] for row in kept], np.int32),
        input_ids=np.array([token for row in kept for token in row[3]], np.int32),
        labels=np.array([label for row in kept for label in row[4]], np.int32),
        statistics=statistics,
        mismatch=mismatch,
    )


def _digest(messages: Messages) -> int:
    """64 bits of the content's hash: the same conversation has the same digest in every file, on every machine."""
    text = json.dumps(messages, ensure_ascii=False)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def with_system_prompt(messages: Messages, system_prompt: str | None) -> Messages:
    """`messages`, led by the config's system prompt where they bring none of their own."""
    if system_prompt is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def chunks(path: Path, recipe: Recipe, workers: int) -> Iterator[Chunk]:
    """The chunks of a file in its order; `workers` 0 works in this process, else at most 2 chunks a worker wait."""
    with open_lines(path) as stream:
        lines = read_lines(stream)
        batches = iter(lambda: list(islice(lines, CHUNK_LINES)), [])
        if workers == 0:
            yield from map(Encoder(recipe).encode, batches)
            return
        context = get_context("spawn")
        with ProcessPoolExecutor(workers, context, _start_worker, (recipe,)) as pool:
            running: deque[Future[Chunk]] = deque()
            try:
                for batch in batches:
                    running.append(pool.submit(_work, batch))
                    if len(running) >= 2 * workers:
                        yield running.popleft().result()
                while running:
                    yield running.popleft().result()
            except BrokenProcessPool:
                killed = "a process that encodes it was killed, probably for want of memory; free some and try again"
                raise OutOfResource(f"{path}: {killed}") from None


_encoder: Encoder


def _start_worker(recipe: Recipe) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the first process ends this one
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _encoder = Encoder(recipe)


def _work(lines: list[tuple[int, bytes]]) -> Chunk:
    return _encoder.encode(lines)
