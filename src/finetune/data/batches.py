"""How heavy the batches of a run are: the worst one, and all of them together. Tokens are counted with padding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from finetune.data.prepare import Prepared


@dataclass(frozen=True)
class Load:
    """One split's examples as the trainer batches them.

    `worst` are the indices of the heaviest batch and `worst_tokens` what it holds; `tokens` is what all batches of an
    epoch hold, on average where they are drawn at random.
    """

    worst: list[int]
    worst_tokens: int
    tokens: float


def example_lengths(prepared: Prepared) -> np.ndarray:
    """Tokens of each training example, [examples]: of a packed sequence, or of a row."""
    lengths = prepared.train.lengths
    if prepared.sequences is None:
        return lengths
    return np.array([lengths[rows].sum() for rows in prepared.sequences])


def train_load(lengths: np.ndarray, batch_size: int, flat: bool) -> Load:
    """Batches drawn at random from examples of `lengths` tokens, laid end to end where `flat`, else padded.

    A padded batch of b rows has b times the tokens of its longest. Of n rows in ascending order that one is among the
    first i with probability C(i, b) / C(n, b): then all b are.
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
    """Padded batches in the order of the rows."""
    worst = _longest(lengths, batch_size)
    batches = (lengths[first : first + batch_size] for first in range(0, len(lengths), batch_size))
    return Load(worst, _padded(lengths[worst]), sum(map(_padded, batches)))


def _longest(lengths: np.ndarray, count: int) -> list[int]:
    return [int(index) for index in np.argsort(-lengths, kind="stable")[:count]]


def _padded(lengths: np.ndarray) -> int:
    return int(lengths.max()) * len(lengths)
