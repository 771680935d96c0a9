"""Checks in the terminal: a line per result, and how many there are of each status."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from finetune.checks.runner import Result
from finetune.terminal import Terminal
from finetune.wording import clean, counted

STATUSES = {"pass": ("pass", "green"), "warn": ("WARN", "yellow"), "fail": ("FAIL", "red"), "skip": ("skip", "dim")}
DETAIL_COLUMN = 33  # where what a check found begins


def show_result(terminal: Terminal, result: Result) -> None:
    """A check's status in a word, what was found, and what to type where something is wrong."""
    word, colour = STATUSES[result.status]
    detail = _indented(result.detail, DETAIL_COLUMN)
    terminal.say(f"  {terminal.paint(word, colour)}  {result.id:<{DETAIL_COLUMN - 9}} {detail}")
    if result.fix:
        fix = _indented(result.fix, DETAIL_COLUMN + 3)
        terminal.say(" " * DETAIL_COLUMN + terminal.paint("-> ", colour) + fix)


def _indented(text: str, columns: int) -> str:
    """`text` as it follows `columns` characters of a line."""
    return clean(text).replace("\n", "\n" + " " * columns)


def tally(results: Iterable[Result]) -> str:
    """`34 passed, 1 warning, 0 failed, 6 skipped`."""
    counts = Counter(result.status for result in results)
    warnings = counted(counts["warn"], "warning")
    return f"{counts['pass']} passed, {warnings}, {counts['fail']} failed, {counts['skip']} skipped"
