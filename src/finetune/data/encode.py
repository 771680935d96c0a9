"""Lines of JSONL -> token arrays, in chunks, in this process or in several; torch and transformers are not needed."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
import threading
import unicodedata
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from finetune.data.jsonl import BadRow, parse_row
from finetune.data.template import IGNORED, ChatFormat, Encoded, Messages, carries_loss
from finetune.data.tokenizer import Reference, load_chat
from finetune.errors import OutOfResource
from finetune.files import shown

Certificate = Literal["every_row"] | bool
TrainOn = Literal["all", "last"]

CHUNK_LINES = 256
SAMPLED_ONE_IN = 20  # of the rows without anything unusual, where the certificate does not compare every row
ROW_HASH_BYTES = 16
FOLDED = bytes(ord(" ") if chr(byte).isspace() else ord(chr(byte).lower()) for byte in range(128)) + bytes(128)
ANSWER = " \0assistant\0"  # where the first answer of a folded conversation begins
as_json = json.JSONEncoder(ensure_ascii=False).encode


@dataclass(frozen=True)
class Recipe:
    """Everything beside the file's own content that decides which tokens a row becomes."""

    tokenizer_folder: str | None
    system_prompt: str | None
    max_seq_length: int
    truncation: bool
    certificate: Certificate
    train_on: TrainOn = "all"


class Place(NamedTuple):
    """Where a row is read: a file's path, and a line."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def shown(self) -> str:
        """As it is typed in the project's root."""
        return f"{shown(Path(self.file))}:{self.line}"


@dataclass
class Statistics:
    """What became of the rows of one file or split; counted here and nowhere else.

    `tokens` and `supervised_tokens` are after truncation; `p50`, `p95` and `longest` are of the kept rows' tokens
    before. In `dropped_without_loss` rows no turn carries loss; in `dropped_long` ones none that does fits. Of the
    `encoded` rows, both of these included, `certified` were compared with mistral-common and with the saved tokenizer.
    `control_tokens` rows hold one of the chat format's control tokens as literal text, the first at
    `first_control_token`. `normalized_leaks` validation rows are a training row's copies but for whitespace and case,
    the first with places (train, validation) `first_leak`; `opening_leaks` others have a training row's opening, the
    first with places `first_opening`. `duplicates` rows are copies of others, the first at `first_copy`;
    `dropped_duplicates` were left out instead. Of several files' rows `repeated` are there again, and `left_out` are
    not, for the weight of their file. `bad` lists (place, what was wrong), `histogram` is as in store.py, `other_keys`
    counts the rows with a key besides "messages", by its name.
    Rows that belong to no split (dropped, bad) count where their file is read: without a validation file, at train.
    """

    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0
    p50: int = 0
    p95: int = 0
    truncated: int = 0
    dropped_long: int = 0
    dropped_without_loss: int = 0
    dropped_bad: int = 0
    duplicates: int = 0
    first_copy: Place | None = None
    dropped_duplicates: int = 0
    repeated: int = 0
    left_out: int = 0
    encoded: int = 0
    certified: int = 0
    control_tokens: int = 0
    first_control_token: Place | None = None
    normalized_leaks: int = 0
    first_leak: tuple[Place, Place] | None = None
    opening_leaks: int = 0
    first_opening: tuple[Place, Place] | None = None
    histogram: dict[str, list[int]] = field(default_factory=dict)
    bad: list[tuple[Place, str]] = field(default_factory=list)
    other_keys: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Chunk:
    """The good rows of some lines, whole.

    [rows]: `lines`, `digests` of the content, `normalized` digests, those of the `openings` (system and first user
    message), `literal` (holds a control token as text), `compared` (by the certificate), `lengths` and `turns` (those
    that carry loss). [rows, ROW_HASH_BYTES]: `line_hashes` of the line's bytes, `ids_hashes` and `labels_hashes`.
    [turns], flat: `turn_ends`, the length of the row up to the end of each turn that carries loss. [tokens], flat:
    `input_ids` and `labels`. `other_keys` are those of each row beside "messages".
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
        """How many tokens of each row are kept, [rows]: as `truncate` does it, 0 where no turn with loss fits."""
        ends = np.where(self.turn_ends <= max_seq_length, self.turn_ends, 0)
        last = np.zeros(len(self.lines), np.int32)
        np.maximum.at(last, np.repeat(np.arange(len(self.lines)), self.turns), ends)
        return np.where((self.lengths <= max_seq_length) & (self.turns > 0), self.lengths, last)


@dataclass(frozen=True)
class Outcome:
    """What became of some lines: the rows of the good ones, the `bad` ones (line, what was wrong), and the first of
    which mistral-common or the saved tokenizer says other ids.
    """

    rows: Chunk
    bad: list[tuple[int, str]]
    mismatch: str | None


class Facts(NamedTuple):
    """What is known of a row without encoding it; each is explained in `Chunk`."""

    digest: int
    normalized: int
    opening: int
    literal: bool


class Row(NamedTuple):
    """A good line, and what is known of it before it is encoded; `keys` are those beside "messages"."""

    line: int
    line_hash: bytes
    messages: Messages
    facts: Facts
    keys: list[str]


class Encoder:
    """Turns lines into a `Chunk`; one lives in each worker process."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.chat = load_chat(Path(recipe.tokenizer_folder) if recipe.tokenizer_folder else None)
        self.reference = Reference() if recipe.certificate and self.chat.certifiable else None
        self.control_tokens = control_tokens(self.chat.format)

    def encode(self, lines: list[tuple[int, bytes]]) -> Outcome:
        """Parse, encode and certify; bad rows are gathered, not raised."""
        rows: list[Row] = []
        bad: list[tuple[int, str]] = []
        for number, line in lines:
            keys: Counter[str] = Counter()
            try:
                messages = parse_row(line, keys)
            except BadRow as wrong:
                bad.append((number, str(wrong)))
            else:
                rows.append(Row(number, row_hash(line), messages, self._facts(messages), list(keys)))
        prompted = [as_trained(row.messages, self.recipe.system_prompt, self.recipe.train_on) for row in rows]
        encoded = self.chat.encode(prompted)
        compared = [self._compares(row) for row in rows]
        chosen = [index for index, it_is in enumerate(compared) if it_is]
        mismatch = self._mismatch([(rows[index].line, prompted[index], encoded[index]) for index in chosen])
        return Outcome(_chunk(rows, encoded, compared), bad, mismatch)

    def _facts(self, messages: Messages) -> Facts:
        literal = any(token in message["content"] for message in messages for token in self.control_tokens)
        return Facts(_digest(messages), *_folded_digests(messages), literal)

    def _compares(self, row: Row) -> bool:
        """Whether the certificate compares a row: all, or what is unusual for a tokenizer and a sample of the rest.

        The sample is chosen by content, so it is the same in every file and on every machine. It takes the digest's
        last bits, because its first choose the rows that a file's weight takes.
        """
        if self.reference is None or self.recipe.certificate == "every_row":
            return self.reference is not None
        return row.facts.literal or is_unusual(row.messages) or row.facts.digest % SAMPLED_ONE_IN == 0

    def _mismatch(self, rows: list[tuple[int, Messages, Encoded]]) -> str | None:
        """The first of `rows` (line, messages, ours) of which mistral-common or the saved tokenizer says other ids."""
        saved = self.chat.encode_as_saved([messages for _, messages, _ in rows]) if rows else []
        for (number, messages, ours), of_saved in zip(rows, saved, strict=True):
            assert self.reference is not None
            others = {"mistral-common": self.reference.encode(messages), "the saved tokenizer": of_saved[:2]}
            for name, (input_ids, labels) in others.items():
                if (ours.input_ids, ours.labels) != (input_ids, labels):
                    return f"{number}: {_difference(ours, name, Encoded(input_ids, labels, []))}"
        return None


def is_unusual(messages: Messages) -> bool:
    """Whether tokenizers might part on it: a system message, or spaces in a run or at an end (▁ is SentencePiece's)."""
    texts = (f" {message['content']} ".replace("▁", " ") for message in messages)
    return messages[0]["role"] == "system" or any("  " in text for text in texts)


def _difference(ours: Encoded, name: str, theirs: Encoded) -> str:
    found = list(zip(ours.input_ids, ours.labels, strict=True))
    wanted = list(zip(theirs.input_ids, theirs.labels, strict=True))
    places = (index for index, (one, other) in enumerate(zip(found, wanted, strict=False)) if one != other)
    place = next(places, min(len(found), len(wanted)))
    return f"token {place} is {_ids(found, place)}, {name} says {_ids(wanted, place)}"


def _ids(tokens: list[tuple[int, int]], place: int) -> str:
    """The next three ids, each with a + where it carries loss."""
    return (
        " ".join(f"{token}{'' if label == IGNORED else '+'}" for token, label in tokens[place : place + 3]) or "the end"
    )


def control_tokens(chat_format: ChatFormat) -> tuple[str, ...]:
    """What the format writes round messages: its control tokens, and Mistral's [INST], which its tokenizer has as text.

    They are found by writing a conversation without text: roles' names are words, the rest is in brackets.
    """
    turns: Messages = [{"role": role, "content": ""} for role in ("user", "assistant")]
    written = {word for piece in chat_format.pieces(turns) for word in piece.text.split() if not word.isalpha()}
    named = {token for token in (chat_format.bos, chat_format.end, chat_format.pad) if token}
    return tuple(sorted(written | named))


def _chunk(rows: list[Row], encoded: list[Encoded], compared: list[bool]) -> Chunk:
    lengths = [len(row.input_ids) for row in encoded]
    input_ids, labels = _flat(row.input_ids for row in encoded), _flat(row.labels for row in encoded)
    return Chunk(
        lines=np.array([row.line for row in rows], np.int32),
        line_hashes=_hash_rows([row.line_hash for row in rows]),
        digests=np.array([row.facts.digest for row in rows], np.uint64),
        normalized=np.array([row.facts.normalized for row in rows], np.uint64),
        openings=np.array([row.facts.opening for row in rows], np.uint64),
        literal=np.array([row.facts.literal for row in rows], bool),
        compared=np.array(compared, bool),
        lengths=np.array(lengths, np.int32),
        turns=np.array([len(row.turn_ends) for row in encoded], np.int32),
        ids_hashes=_row_hashes(input_ids, lengths),
        labels_hashes=_row_hashes(labels, lengths),
        turn_ends=_flat(row.turn_ends for row in encoded),
        input_ids=input_ids,
        labels=labels,
        other_keys=[row.keys for row in rows],
    )


def _flat(rows: Iterable[list[int]]) -> np.ndarray:
    values = array("i")  # takes a list in half the time that NumPy does
    for row in rows:
        values.fromlist(row)
    return np.frombuffer(values, np.int32)


def _row_hashes(values: np.ndarray, lengths: list[int]) -> np.ndarray:
    """The hash of each row's int32 values, [rows, ROW_HASH_BYTES] bytes."""
    data, end, hashes = memoryview(values.tobytes()), 0, []
    for length in lengths:
        start, end = end, end + values.itemsize * length
        hashes.append(row_hash(data[start:end]))
    return _hash_rows(hashes)


def _hash_rows(hashes: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, ROW_HASH_BYTES)


def row_hash(data: bytes | memoryview) -> bytes:
    """ROW_HASH_BYTES of a line's bytes, or of the ids or labels of a row."""
    return hashlib.blake2b(data, digest_size=ROW_HASH_BYTES).digest()


def _digest(messages: Messages) -> int:
    """64 bits of the content's hash: the same conversation has the same digest in every file, on every machine.

    Rows that differ in weights only are copies of each other, so that no answer is on both sides of a split.
    """
    content = [{"role": message["role"], "content": message["content"]} for message in messages]
    return _hash64(as_json(content).encode())


def _folded_digests(messages: Messages) -> tuple[int, int]:
    """Of a conversation, and of its opening: up to the first answer.

    The first is the same for all conversations that differ only in runs of whitespace, at the ends of messages, or in
    case; the second also where openings differ in the form of characters (NFKC). Rows with the same first have the same
    second.
    """
    text = "".join(f" \0{message['role']}\0 {message['content']}" for message in messages)
    if not text.isascii():
        whole = " ".join(text.split()).casefold()
        opening = unicodedata.normalize("NFKC", whole.partition(ANSWER)[0]).casefold()
        return _hash64(whole.encode()), _hash64(" ".join(opening.split()).encode())
    folded = text.encode().translate(FOLDED)  # comes to the same, faster
    while b"  " in folded:
        folded = folded.replace(b"  ", b" ")
    folded = folded.strip()
    return _hash64(folded), _hash64(folded.partition(ANSWER.encode())[0])


def _hash64(text: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def with_system_prompt(messages: Messages, system_prompt: str | None) -> Messages:
    """`messages`, led by the config's system prompt where they bring none of their own."""
    if system_prompt is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def as_trained(messages: Messages, system_prompt: str | None, train_on: TrainOn) -> Messages:
    """`messages` with the config's system prompt; where `train_on` is last, all answers but the last get weight 0."""
    if train_on == "last":
        earlier = [message | {"weight": 0} if carries_loss(message) else message for message in messages[:-1]]
        messages = [*earlier, messages[-1]]
    return with_system_prompt(messages, system_prompt)


NOTHING = Outcome(_chunk([], [], []), [], None)
Lines = list[tuple[int, bytes]]


def encode_batches(batches: Iterator[Lines], recipe: Recipe, workers: int) -> Iterator[Outcome]:
    """The outcome of each batch of numbered lines, in their order.

    `workers` 0 works in this process, else at most 2 batches a worker wait. A batch without lines costs nothing.
    """
    if workers == 0:
        encoder = functools.cache(Encoder)
        yield from (encoder(recipe).encode(batch) if batch else NOTHING for batch in batches)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (recipe,)) as pool:
        running: deque[Future[Outcome]] = deque()
        try:
            for batch in batches:
                running.append(pool.submit(_work, batch) if batch else _done(NOTHING))
                if len(running) >= 2 * workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        except BrokenProcessPool:
            killed = "a process that encodes rows was killed, probably out of memory"
            raise OutOfResource(killed, "free some memory and try again") from None


_encoder: Encoder


def _start_worker(recipe: Recipe) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the first process ends this one
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = Encoder(recipe)


def _end_with_parent() -> None:
    """A first process that is killed cannot end this one, which would wait for work for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _done(outcome: Outcome) -> Future[Outcome]:
    future: Future[Outcome] = Future()
    future.set_result(outcome)
    return future


def _work(lines: Lines) -> Outcome:
    return _encoder.encode(lines)


def truncate(encoded: Encoded, max_seq_length: int) -> Encoded | None:
    """The conversation, a long one up to the last whole turn with loss that fits; None where there is no such turn."""
    ends = [end for end in encoded.turn_ends if end <= max_seq_length]
    if not ends or len(encoded.input_ids) <= max_seq_length:
        return encoded if ends else None
    return Encoded(encoded.input_ids[: ends[-1]], encoded.labels[: ends[-1]], ends)
