"""Which rows are taken, how often, and which are held out, chosen by content: the same on every machine."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from finetune.data.store import EncodedFiles

FEW = 100  # groups below which a share is exact; from there on, rows that are added never move others
DIGESTS = 2**64


class Selection(NamedTuple):
    """What becomes of rows, [rows].

    Where nothing is `learnt`, since no turn carries loss, and of `copies`, none is taken; the others are so many
    `times`, and some of these `held_out`.
    """

    learnt: np.ndarray
    copies: np.ndarray
    times: np.ndarray
    held_out: np.ndarray

    def of(self, rows: slice) -> Selection:
        """What becomes of some of them."""
        return Selection(*(values[rows] for values in self))


def select(files: EncodedFiles, weights: list[float], share: float, drop_copies: bool) -> Selection:
    """Leave copies out where `drop_copies`, then take rows of each file by its weight, then hold a share of them out.

    A share of 0 holds none out.
    """
    digests, learnt = files.column("digests"), files.turns() > 0
    copies, held = np.zeros(len(digests), bool), np.zeros(len(digests), bool)
    if drop_copies:
        copies[learnt] = ~first_copies(digests[learnt])
    times, wanted = np.zeros(len(digests), np.int64), learnt & ~copies
    for start, end, weight in zip(files.starts, files.starts[1:], weights, strict=False):
        rows = np.flatnonzero(wanted[start:end]) + start
        times[rows] = taken(digests[rows], weight)
    if share:
        held[times > 0] = held_out(files.column("openings")[times > 0], share)
    return Selection(learnt, copies, times, held)


def taken(digests: np.ndarray, weight: float) -> np.ndarray:
    """How often each row is taken, [rows]: 1.5 is all of them once and half of them again."""
    whole = int(weight)
    times = np.full(len(digests), whole)
    if weight > whole:
        times += _lowest(digests, weight - whole)
    return times


def held_out(openings: np.ndarray, share: float) -> np.ndarray:
    """Which rows are for validation: about `share` of them, those of one opening together, [rows].

    At least one is, but where all rows have one opening. `openings` are digests, [rows].
    """
    if len(np.unique(openings)) == 1:
        return np.zeros(len(openings), bool)
    return _lowest(openings, share)


def _lowest(digests: np.ndarray, share: float) -> np.ndarray:
    """The rows with the lowest digests, about `share` of them and at least one; equal digests stay together, [rows].

    Of FEW different digests or more those below a limit are taken. Of fewer, as many rows as `share` rounds to: groups
    in the order of their digests, each that still fits; where none does, the smallest.
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
    """Which rows are the first with their digest, [rows]."""
    first = np.zeros(len(digests), bool)
    first[np.unique(digests, return_index=True)[1]] = True
    return first
