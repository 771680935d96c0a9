"""The rows of a split (train or validation), their statistics, and the rows two splits have in common."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from finetune.data.encode import Chunk
from finetune.data.store import EncodedFiles, Place, Rows
from finetune.data.template import IGNORED

MOST_BARS = 30
WIDTHS = [round(digit * 10**power) for power in range(9) for digit in (1, 2, 5)]  # tokens per bar of a histogram
# The numbers a split keeps of each row; the first three are columns of `Chunk`.
KEPT = {
    "digests": np.uint64,
    "normalized": np.uint64,
    "openings": np.uint64,
    "full_lengths": np.int32,
    "indices": np.int64,
    "kept_lengths": np.int32,
}


@dataclass
class Statistics:
    """Counts of the rows of one file or split.

    `tokens` and `supervised_tokens` are counted after truncation; `p50`, `p95` and `longest` are tokens of the kept
    rows before it, and so is `histogram` (see `histogram` below). `dropped_without_loss` rows have no turn that carries
    loss; in `dropped_long` rows no such turn fits. Of the `encoded` rows, including both, `certified` were compared
    with mistral-common and the saved tokenizer. `control_tokens` rows contain a control token of the chat format as
    text. `normalized_leaks` validation rows differ from a training row only in whitespace and case; `opening_leaks`
    others have a training row's opening; the first of each is given as places (train, validation). `duplicates` are
    copies that were kept. Because of their file's weight, `repeated` rows are used again and `left_out` are not used.
    `bad` lists (place, problem); `other_keys` counts rows by their keys besides "messages".
    Dropped and bad rows belong to no split and are counted where their file is read: without a validation file, in
    train.
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


class Split:
    """The rows of one split: how many tokens of each are kept, statistics, and hashes of token ids and labels.

    They are rows of `encoded`; a row added twice counts twice.
    """

    def __init__(self, encoded: EncodedFiles) -> None:
        self._encoded = encoded
        self.statistics = Statistics()
        self._kept = {name: [np.empty(0, dtype)] for name, dtype in KEPT.items()}
        self._dropped_digests = [np.empty(0, np.uint64)]
        self._hashes = {"input_ids": hashlib.sha256(), "labels": hashlib.sha256()}
        self._whole_hashes = {"input_ids": hashlib.sha256(), "labels": hashlib.sha256()}

    def add(self, first: int, chunk: Chunk, kept: np.ndarray, selected: np.ndarray) -> None:
        """Add the rows of `chunk` selected by a mask, except those of which no token is kept.

        `selected` and `kept` (tokens kept of each row) are [rows]; `first` is the number of the chunk's first row in
        `encoded`.
        """
        self._whole_hashes["input_ids"].update(chunk.ids_hashes[selected].tobytes())
        self._whole_hashes["labels"].update(chunk.labels_hashes[selected].tobytes())
        mine = selected & (kept > 0)
        self._dropped_digests.append(chunk.digests[selected & ~mine])
        indices = np.arange(first, first + len(kept))
        computed = {"indices": indices, "kept_lengths": kept, "full_lengths": chunk.lengths}
        for name, arrays in self._kept.items():
            arrays.append((computed[name] if name in computed else getattr(chunk, name))[mine])
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
        """Finish the statistics; return the sha256 of all token ids and of all labels, int32 in file order."""
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
        """What does not depend on max_seq_length: rows before truncation, including those too long to keep.

        `rows`, and three sha256: `content` (of the conversations, in any order), `input_ids` and `labels` (of each
        row's hashes, in file order).
        """
        digests = np.concatenate([self.kept("digests"), *self._dropped_digests])
        content = hashlib.sha256(np.sort(digests).astype(">u8").tobytes()).hexdigest()
        hashes = {name: digest.hexdigest() for name, digest in self._whole_hashes.items()}
        return {"rows": len(digests), "content": content, **hashes}

    def kept(self, name: str) -> np.ndarray:
        """One of the numbers in KEPT, of each row, [rows]."""
        return np.concatenate(self._kept[name])

    def place(self, number: int) -> Place:
        """Where the row added as the `number`th was read."""
        return self._encoded.place(int(self.kept("indices")[number]))

    def rows(self, most: int | None = None) -> Rows:
        """All rows, or at most `most` of them, evenly spaced."""
        indices = self.kept("indices")
        count = min(len(indices), len(indices) if most is None else most)
        chosen = np.arange(count) * len(indices) // max(1, count)
        return Rows(self._encoded, indices[chosen], self.kept("kept_lengths")[chosen])


def _kept_tokens(lengths: np.ndarray, kept: np.ndarray) -> np.ndarray | slice:
    """Mask of the tokens among the first `kept` [rows] of their row, [tokens]; rows have `lengths` [rows] tokens."""
    if (lengths == kept).all():
        return slice(None)  # all tokens, without a copy
    positions = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    mask: np.ndarray = positions < np.repeat(kept, lengths)
    return mask


def histogram(lengths: np.ndarray, p95: int) -> dict[str, list[int]]:
    """Count rows by length: `counts[i]` of `lengths` [rows] are from `edges[i]` to `edges[i + 1] - 1` tokens.

    Bars are equally wide, at most MOST_BARS, up to 1.25 times `p95`; the last one includes all longer rows, so one very
    long row does not squeeze the others into one bar.
    """
    reach = min(p95 + p95 // 4, int(lengths.max()))
    width = next(width for width in WIDTHS if width * MOST_BARS > reach)
    edges = np.arange(lengths.min() // width, reach // width + 2) * width
    edges[-1] = max(edges[-1], lengths.max() + 1)
    return {"edges": edges.tolist(), "counts": np.histogram(lengths, edges)[0].tolist()}


def count_leaks(train: Split, validation: Split) -> None:
    """Count the validation rows that resemble a training row; expects that none is an exact copy."""
    statistics = validation.statistics
    leaks = np.isin(validation.kept("normalized"), train.kept("normalized"))
    statistics.normalized_leaks, statistics.first_leak = int(leaks.sum()), first_pair(train, validation, "normalized")
    others = np.isin(validation.kept("openings"), train.kept("openings")) & ~leaks
    statistics.opening_leaks = int(others.sum())
    statistics.first_opening = first_pair(train, validation, "openings", others)


def first_pair(
    train: Split, validation: Split, name: str, among: np.ndarray | slice = slice(None)
) -> tuple[Place, Place] | None:
    """Places (train, validation) of the first training row that shares its `name` (of KEPT) with a validation row.

    Only the validation rows in the mask `among` [rows] are compared.
    """
    ours, theirs = train.kept(name), validation.kept(name)
    candidates = np.arange(len(theirs))[among]
    shared = np.flatnonzero(np.isin(ours, theirs[candidates]))
    if not len(shared):
        return None
    other = candidates[theirs[candidates] == ours[shared[0]]][0]
    return train.place(int(shared[0])), validation.place(int(other))
