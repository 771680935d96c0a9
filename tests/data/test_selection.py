"""A share of the rows is selected by digest: groups stay together, and small sets give exactly the share."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.data.selection import first_copies, held_out


def digests(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


def test_a_small_set_holds_out_the_rows_with_the_lowest_digests() -> None:
    openings = digests(7, 2**63, 3, 2**64 - 1, 9, 5)
    assert held_out(openings, 0.5).tolist() == [True, False, True, False, False, True]


@pytest.mark.parametrize(
    ("openings", "wanted"),
    [
        ([1, 1, 1, 1, 2, 3, 4, 5, 6, 7], {2}),  # four are too many
        ([4, 1, 1, 2, 2, 3], {1, 3}),
        ([1, 1, 1, 2, 2, 2, 2], {1}),
    ],
    ids=["too large", "too large for the rest", "nothing fits into the rest"],
)
def test_a_group_that_no_longer_fits_is_skipped(openings: list[int], wanted: set[int]) -> None:
    share = 0.1 if len(openings) == 10 else 0.5
    found = held_out(digests(*openings), share)
    assert set(np.array(openings)[found].tolist()) == wanted
    assert found.tolist() == [opening in wanted for opening in openings]


def test_if_no_group_fits_the_smallest_is_held_out() -> None:
    assert held_out(digests(1, 1, 1, 2, 2, 3, 3, 3), 0.1).tolist() == [False] * 3 + [True] * 2 + [False] * 3


def test_a_single_group_is_never_split() -> None:
    assert held_out(digests(5, 5, 5), 0.5).tolist() == [False] * 3
    assert held_out(digests(), 0.5).tolist() == []


@pytest.mark.parametrize(("groups", "wanted"), [(999, 500), (1000, 1000)])
def test_with_a_thousand_groups_a_fixed_limit_decides_so_no_row_moves_another(groups: int, wanted: int) -> None:
    openings = np.arange(groups, dtype=np.uint64)  # all far below the limit
    assert held_out(openings, 0.5).sum() == wanted


def test_the_first_row_with_a_digest_is_not_a_copy() -> None:
    assert first_copies(digests(4, 2, 4, 4, 1, 2)).tolist() == [True, True, False, False, True, False]
    assert first_copies(digests()).tolist() == []
