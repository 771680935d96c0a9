"""Select which rows are used, how often, and which are held out. The choice depends only on content."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from finetune.data.store import EncodedFiles

FEW = 1000  # with fewer groups the share is exact; with more it is within about 10 %, and adding rows moves no others
DIGESTS = 2**64


class Selection(NamedTuple):
    """How each row is used, [rows].

    `learned` rows have a turn with loss, `copies` are dropped duplicates, `times` is how often a row is used (0 for
    copies and for rows without loss), and `held_out` rows go to validation.
    """

    learned: np.ndarray
    copies: np.ndarray
    times: np.ndarray
    held_out: np.ndarray

    def of(self, rows: slice) -> Selection:
        """The selection of some of the rows."""
        return Selection(*(values[rows] for values in self))


def select(files: EncodedFiles, weights: list[float], share: float, drop_copies: bool) -> Selection:
    """Drop copies if `drop_copies`, then apply the weight of each file, then hold out `share` of the rows."""
    digests, learned = files.column("digests"), files.turns() > 0
    copies, held = np.zeros(len(digests), bool), np.zeros(len(digests), bool)
    if drop_copies:
        copies[learned] = ~first_copies(digests[learned])
    times, usable = np.zeros(len(digests), np.int64), learned & ~copies
    for start, end, weight in zip(files.starts, files.starts[1:], weights, strict=False):
        rows = np.flatnonzero(usable[start:end]) + start
        times[rows] = taken(digests[rows], weight)
    if share:
        held[times > 0] = held_out(files.column("openings")[times > 0], share)
    return Selection(learned, copies, times, held)


def taken(digests: np.ndarray, weight: float) -> np.ndarray:
    """How often each row is used, [rows]: a weight of 1.5 uses every row once and half of them twice."""
    whole = int(weight)
    times = np.full(len(digests), whole)
    if weight > whole:
        times += _lowest(digests, weight - whole)
    return times


def held_out(openings: np.ndarray, share: float) -> np.ndarray:
    """Mask of the validation rows, about `share` of all; rows with the same opening stay together, [rows].

    `openings` are digests, [rows]. At least one row is held out, unless all rows have the same opening.
    """
    if len(np.unique(openings)) == 1:
        return np.zeros(len(openings), bool)
    return _lowest(openings, share)


def _lowest(digests: np.ndarray, share: float) -> np.ndarray:
    """Mask of the rows with the lowest digests, about `share` and at least one; equal digests stay together, [rows].

    With FEW or more different digests, those below a limit are selected. With fewer, `share` of the rows, rounded:
    groups in the order of their digests, skipping any that no longer fits; if none fits, the smallest group.
    """
    values, group, sizes = np.unique(digests, return_inverse=True, return_counts=True)
    if len(values) >= FEW:
        return digests < np.uint64(min(round(share * DIGESTS), DIGESTS - 1))
    left = round(share * len(digests))
    lowest = np.zeros(len(values), bool)
    for place, size in enumerate(sizes.tolist()):
        if size <= left:
            lowest[place], left = True, left - size
    if len(values) and not lowest.any():
        lowest[np.argmin(sizes)] = True
    chosen: np.ndarray = lowest[group]
    return chosen


def first_copies(digests: np.ndarray) -> np.ndarray:
    """Mask of the first row with each digest, [rows]."""
    first = np.zeros(len(digests), bool)
    first[np.unique(digests, return_index=True)[1]] = True
    return first
