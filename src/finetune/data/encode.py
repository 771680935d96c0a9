"""Encode lines of JSONL into arrays of tokens, in chunks; torch and transformers are not needed."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from finetune.data.certificate import Certificate, Certifier
from finetune.data.digests import ROW_HASH_BYTES, content_digest, folded_digests, row_hash
from finetune.data.jsonl import BadRow, parse_row
from finetune.data.template import Encoded, Messages, carries_loss
from finetune.data.tokenizer import load_chat

Lines = list[tuple[int, bytes]]  # (number, line)
TrainOn = Literal["all", "last"]


@dataclass(frozen=True)
class Recipe:
    """Everything besides a file's content that decides which tokens a row becomes."""

    tokenizer_folder: str | None
    system_prompt: str | None
    max_seq_length: int
    truncation: bool
    certificate: Certificate
    train_on: TrainOn = "all"


@dataclass(frozen=True)
class Chunk:
    """The valid rows of some lines, before truncation.

    [rows]: `lines`; digests of the content (`digests`), of the folded content (`normalized`), and of the system and
    first user message (`openings`); `literal` (has a control token as text), `compared` (by the certificate), `lengths`
    and `turns` (those that carry loss). [rows, ROW_HASH_BYTES]: `line_hashes`, `ids_hashes` and `labels_hashes`.
    Flat, [turns]: `turn_ends`, the row's length up to the end of each turn that carries loss. Flat, [tokens]:
    `input_ids` and `labels`. `other_keys` are each row's keys besides "messages".
    """

    lines: np.ndarray
    line_hashes: np.ndarray
    digests: np.ndarray
    normalized: np.ndarray
    openings: np.ndarray
    literal: np.ndarray
    compared: np.ndarray
    lengths: np.ndarray
    turns: np.ndarray
    ids_hashes: np.ndarray
    labels_hashes: np.ndarray
    turn_ends: np.ndarray
    input_ids: np.ndarray
    labels: np.ndarray
    other_keys: list[list[str]]

    def kept(self, max_seq_length: int) -> np.ndarray:
        """How many tokens of each row `truncate` keeps, 0 if no turn with loss fits, [rows]."""
        ends = np.where(self.turn_ends <= max_seq_length, self.turn_ends, 0)
        last = np.zeros(len(self.lines), np.int32)
        np.maximum.at(last, np.repeat(np.arange(len(self.lines)), self.turns), ends)
        return np.where((self.lengths <= max_seq_length) & (self.turns > 0), self.lengths, last)


class Outcome(NamedTuple):
    """The result of encoding some lines: valid rows, bad rows (line, problem), and the first certificate mismatch."""

    rows: Chunk
    bad: list[tuple[int, str]]
    mismatch: str | None


class Row(NamedTuple):
    """A valid line, parsed but not yet encoded; `Chunk` explains the fields."""

    line: int
    line_hash: bytes
    messages: Messages
    digest: int
    normalized: int
    opening: int
    literal: bool
    keys: list[str]


class Encoder:
    """Turns lines into a `Chunk`; each worker process has one."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.chat = load_chat(Path(recipe.tokenizer_folder) if recipe.tokenizer_folder else None)
        self.certifier = Certifier(self.chat, recipe.certificate)
        self.control_tokens = self.chat.format.control_tokens()

    def encode(self, lines: Lines) -> Outcome:
        """Parse, encode and certify lines; bad rows are collected, not raised."""
        rows: list[Row] = []
        bad: list[tuple[int, str]] = []
        for number, line in lines:
            try:
                rows.append(self._parse(number, line))
            except BadRow as problem:
                bad.append((number, str(problem)))
        prompted = [as_trained(row.messages, self.recipe.system_prompt, self.recipe.train_on) for row in rows]
        encoded = self.chat.encode(prompted)
        compared = [self.certifier.selects(row.messages, row.digest, row.literal) for row in rows]
        selected = [
            (rows[at].line, prompted[at], encoded[at]) for at, is_compared in enumerate(compared) if is_compared
        ]
        return Outcome(make_chunk(rows, encoded, compared), bad, self.certifier.mismatch(selected))

    def _parse(self, number: int, line: bytes) -> Row:
        keys: Counter[str] = Counter()
        messages = parse_row(line, keys)
        literal = any(token in message["content"] for message in messages for token in self.control_tokens)
        digests = content_digest(messages), *folded_digests(messages)
        return Row(number, row_hash(line), messages, *digests, literal, list(keys))


def make_chunk(rows: list[Row], encoded: list[Encoded], compared: list[bool]) -> Chunk:
    """Join rows, their encodings and which of them were compared, all [rows], into arrays."""
    lengths = [len(row.input_ids) for row in encoded]
    input_ids, labels = _flat(row.input_ids for row in encoded), _flat(row.labels for row in encoded)
    return Chunk(
        lines=np.array([row.line for row in rows], np.int32),
        line_hashes=_hash_rows(row.line_hash for row in rows),
        digests=np.array([row.digest for row in rows], np.uint64),
        normalized=np.array([row.normalized for row in rows], np.uint64),
        openings=np.array([row.opening for row in rows], np.uint64),
        literal=np.array([row.literal for row in rows], bool),
        compared=np.array(compared, bool),
        lengths=np.array(lengths, np.int32),
        turns=np.array([len(row.turn_ends) for row in encoded], np.int32),
        ids_hashes=_hash_slices(input_ids, lengths),
        labels_hashes=_hash_slices(labels, lengths),
        turn_ends=_flat(row.turn_ends for row in encoded),
        input_ids=input_ids,
        labels=labels,
        other_keys=[row.keys for row in rows],
    )


def _flat(rows: Iterable[list[int]]) -> np.ndarray:
    values = array("i")  # reads a list in half the time NumPy needs
    for row in rows:
        values.fromlist(row)
    return np.frombuffer(values, np.int32)


def _hash_slices(values: np.ndarray, lengths: list[int]) -> np.ndarray:
    """Hash each row's int32 values, [rows, ROW_HASH_BYTES]."""
    data, bounds = memoryview(values.tobytes()), [0, *accumulate(values.itemsize * length for length in lengths)]
    return _hash_rows(row_hash(data[start:end]) for start, end in pairwise(bounds))


def _hash_rows(hashes: Iterable[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, ROW_HASH_BYTES)


def with_system_prompt(messages: Messages, system_prompt: str | None) -> Messages:
    """Put the config's system prompt before `messages`, unless they have their own."""
    if system_prompt is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def as_trained(messages: Messages, system_prompt: str | None, train_on: TrainOn) -> Messages:
    """Add the config's system prompt and, to train on the last answer only, give earlier answers weight 0."""
    if train_on == "last":
        earlier = [message | {"weight": 0} if carries_loss(message) else message for message in messages[:-1]]
        messages = [*earlier, messages[-1]]
    return with_system_prompt(messages, system_prompt)


def truncate(encoded: Encoded, max_seq_length: int) -> Encoded | None:
    """Cut a long row after the last turn with loss that fits; None if no such turn fits."""
    ends = [end for end in encoded.turn_ends if end <= max_seq_length]
    if not ends or len(encoded.input_ids) <= max_seq_length:
        return encoded if ends else None
    return Encoded(encoded.input_ids[: ends[-1]], encoded.labels[: ends[-1]], ends)
