"""Count the tokens, with padding, of a run's largest batch and of all its batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from finetune.data.prepare import Prepared


@dataclass(frozen=True)
class Load:
    """The tokens in the batches of one split.

    `worst` are the example indices of the largest batch and `worst_tokens` its tokens; `tokens` are those of all
    batches of an epoch, on average if examples are drawn at random.
    """

    worst: list[int]
    worst_tokens: int
    tokens: float


def example_lengths(prepared: Prepared) -> np.ndarray:
    """Tokens of each training example (a packed sequence or a row), [examples]."""
    lengths = prepared.train.lengths
    if prepared.sequences is None:
        return lengths
    return np.array([lengths[rows].sum() for rows in prepared.sequences])


def train_load(lengths: np.ndarray, batch_size: int, flat: bool) -> Load:
    """The load of batches drawn at random from examples of `lengths` tokens, concatenated if `flat`, else padded.

    A padded batch of b rows has b times the tokens of its longest. Of n rows in ascending order, the longest of the
    batch is among the first i with probability C(i, b) / C(n, b), because then all b are.
    """
    worst = _longest(lengths, batch_size)
    if flat:
        return Load(worst, int(lengths[worst].sum()), float(lengths.sum()))
    rows = np.arange(len(lengths) + 1)
    among = np.ones(len(rows))
    for drawn in range(len(worst)):
        among *= np.maximum(rows - drawn, 0) / (len(lengths) - drawn)
    return Load(worst, _padded(lengths[worst]), float(np.sort(lengths) @ np.diff(among) * len(lengths)))


def validation_load(lengths: np.ndarray, batch_size: int) -> Load:
    """The load of padded batches in row order."""
    worst = _longest(lengths, batch_size)
    batches = (lengths[first : first + batch_size] for first in range(0, len(lengths), batch_size))
    return Load(worst, _padded(lengths[worst]), sum(map(_padded, batches)))


def _longest(lengths: np.ndarray, count: int) -> list[int]:
    return [int(index) for index in np.argsort(-lengths, kind="stable")[:count]]


def _padded(lengths: np.ndarray) -> int:
    return int(lengths.max()) * len(lengths)
