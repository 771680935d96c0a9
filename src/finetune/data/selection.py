"""Which rows are held out, chosen by their content: the same on every machine, wherever a row stands in its file."""

from __future__ import annotations

import numpy as np

FEW = 100  # groups below which the share is exact; from there on, rows that are added never move others
DIGESTS = 2**64


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
    left = max(1, round(share * len(digests)))
    taken = np.zeros(len(values), bool)
    for place, size in enumerate(sizes.tolist()):
        if size <= left:
            taken[place], left = True, left - size
    if len(values) and not taken.any():
        taken[np.argmin(sizes)] = True
    chosen: np.ndarray = taken[group]
    return chosen


def first_copies(digests: np.ndarray) -> np.ndarray:
    """Which rows are the first with their digest, [rows]."""
    first = np.zeros(len(digests), bool)
    first[np.unique(digests, return_index=True)[1]] = True
    return first
