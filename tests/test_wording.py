"""Pieces of wording: lists with a count, first lines, leaves of a tree, and nothing that the data wrote steers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from finetune.wording import clean, clock, first_line, leaves, lines, listed


def test_a_long_list_ends_in_a_count() -> None:
    assert [listed(["a", 2, "c"], most) for most in (1, 2, 3, 4)] == [
        "a and 2 more",
        "a, 2 and 1 more",
        *["a, 2, c"] * 2,
    ]
    assert lines(["a", 2, "c"], 2) == "  a\n  2\n  ... and 1 more"
    assert lines(["a", 2, "c"], 3) == "  a\n  2\n  c"


def test_a_time_names_its_zone_and_a_near_one_leaves_out_what_is_clear() -> None:
    zone = timezone(timedelta(hours=1), "CET")
    now = datetime(2026, 12, 24, 14, 5, tzinfo=zone)
    later = [now + timedelta(hours=hours) for hours in (2, 11, 24 * 6)]
    assert [clock(time, now) for time in later] == ["16:05 CET", "Fri 01:05 CET", "30 Dec 14:05 CET"]
    assert (clock(now), clock(now.astimezone(UTC))) == ("2026-12-24 14:05 CET", "2026-12-24 13:05 UTC")


@pytest.mark.parametrize(
    ("error", "line"),
    [(OSError("\n it broke\nhere"), "it broke"), (MemoryError(), "MemoryError"), (KeyError(" "), "' '")],
)
def test_an_error_is_named_in_one_line(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_the_leaves_of_a_tree_have_dotted_paths() -> None:
    tree = {"a": 1, "b": {"c": {"d": [2], "e": None}, "f": {}}}
    assert leaves(tree) == {"a": 1, "b.c.d": [2], "b.c.e": None, "b.f": {}}


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("\033[31m", "\\x1b[31m"),
        ("\a", "\\x07"),
        ("\r", "\\r"),
        ("\b", "\\x08"),
        ("\t", "\\t"),
        ("\0", "\\x00"),
        ("\x7f", "\\x7f"),
        ("\x9b31m", "\\x9b31m"),  # CSI in one character
        ("\u202e", "\\u202e"),  # right-to-left override
        ("\u2066", "\\u2066"),  # isolate
        ("\u200b", "\\u200b"),  # zero width
        ("\u2028", "\\u2028"),  # line separator
        ("\ufeff", "\\ufeff"),
        ("\ud800", "\\ud800"),  # half a surrogate pair
        ("\U000e0041", "\\U000e0041"),  # tag
    ],
)
def test_a_character_that_could_steer_the_terminal_is_escaped(text: str, escaped: str) -> None:
    assert clean(f"a{text}b") == f"a{escaped}b"


@pytest.mark.parametrize(
    "text", ["", "plain text", "two\nlines\n", "naïve café", "日本語", "Привет", "שלום", "🙂", "a\\b"]
)
def test_ordinary_text_and_line_ends_stay_as_they_are(text: str) -> None:
    assert clean(text) == text
