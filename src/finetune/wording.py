"""Wording that all messages share: counts, durations, values, and text that is safe for a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any


def _silent(*_: str) -> None:
    pass


@dataclass(frozen=True)
class Report:
    """Where long work reports to: nowhere by default, or to methods of a Terminal."""

    progress: Callable[[str], None] = _silent  # how much is done
    decision: Callable[[str, str], None] = _silent  # what, and its reason
    warn: Callable[[str], None] = _silent


SILENT = Report()


def duration(seconds: float) -> str:
    """`45 s`, `12 min` or `3.4 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def clock(time: datetime, now: datetime | None = None) -> str:
    """`2026-12-24 14:05 CET`; relative to `now`: `14:05 CET`, `Tue 14:05 CET`, `24 Dec 14:05 CET`. Both have zones."""
    if now is None:
        return f"{time:%Y-%m-%d %H:%M %Z}"
    day = "" if time.date() == now.date() else f"{time:%a} " if time - now < timedelta(days=6) else f"{time:%d %b} "
    return f"{day}{time:%H:%M %Z}"


def clean(text: str) -> str:
    """Escape control and direction characters in `text`, so that data cannot write escape sequences to a terminal."""
    hidden = ("Cc", "Cf", "Cs", "Zl", "Zp")
    joiners = "\n\u200c\u200d"  # the last two join letters and emoji
    return "".join(
        character.encode("unicode_escape", "surrogatepass").decode()
        if unicodedata.category(character) in hidden and character not in joiners
        else character
        for character in text
    )


def counted(count: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(items: Sequence[object], most: int) -> str:
    """`a, b and 3 more`: the first `most` of `items`, and how many were left out."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more


def lines(items: Sequence[object], most: int) -> str:
    """The first `most` of `items`, indented, one per line, then how many were left out."""
    more = [f"... and {len(items) - most} more"] if len(items) > most else []
    return "\n".join(f"  {item}" for item in [*items[:most], *more])


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def leaves(tree: dict[str, Any]) -> dict[str, Any]:
    """Every leaf of nested sections by its dotted path; an empty section is a leaf."""
    return dict(_leaves(tree, ""))


def _leaves(tree: dict[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def show(value: Any) -> str:
    """A value as messages quote it, such as `'fast' (text)`: shortened, control characters escaped."""
    names = {str: "text", bool: "true/false", int: "whole number", float: "number", dict: "section", list: "list"}
    if value is None:
        return "null"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({names.get(type(value), type(value).__name__)})"


def one_line(text: str) -> str:
    """`text` as one line for a terminal."""
    return clean(text).replace("\n", "\\n")
