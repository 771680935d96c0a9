"""Checks in the terminal: run before training, one line per result, and a count for each status."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from finetune import checks
from finetune.checks.preflight import Preflight
from finetune.checks.runner import Result, run
from finetune.errors import CheckFailed
from finetune.terminal import Terminal
from finetune.wording import clean, counted

STATUSES = {"pass": ("pass", "green"), "warn": ("WARN", "yellow"), "fail": ("FAIL", "red"), "skip": ("skip", "dim")}
DETAIL_COLUMN = 33  # where the detail of a check begins


def require_checks(preflight: Preflight, skipped: frozenset[str], dry_run: bool, terminal: Terminal) -> list[Result]:
    """Run the checks of `scripts/validate_environment.py` (a dry run: those of data and tokens) and show warnings.

    Raises CheckFailed listing every failure.
    """
    only = ("data", "tokens") if dry_run else ()
    chosen = checks.select(preflight.config.platform, only, skipped | {*checks.TRAINING_DOES})
    results: list[Result] = []
    for result in run(chosen, preflight):
        results.append(result)
        if result.status == "warn" and not _in_plan(result, preflight):
            show_result(terminal, result)
        following = [check.id for check in chosen[len(results) :]]
        terminal.status(f"checks: {len(results)} of {len(chosen)}", *following[:1])
    terminal.decision("checks", tally(results))
    failed = [result for result in results if result.status == "fail"]
    if failed:
        lines = (f"  {result.id}: {result.detail}\n    {result.fix}" for result in failed)
        them = "it" if len(failed) == 1 else "them"
        fix = f"fix {them}, or skip {them} with --skip {','.join(result.id for result in failed)}"
        raise CheckFailed("\n".join([f"checks: {len(failed)} failed", *lines]), fix, between="\n")
    return results


def _in_plan(result: Result, preflight: Preflight) -> bool:
    """Whether the plan, which is printed before the checks, has the same warning."""
    if not result.id.startswith("plan."):
        return False
    return any(f"{result.detail}; {result.fix}".endswith(problem) for problem in preflight.plan.problems)


def show_result(terminal: Terminal, result: Result) -> None:
    """Print a check's status, what it found, and the fix if something is wrong."""
    word, color = STATUSES[result.status]
    detail = _indented(result.detail, DETAIL_COLUMN)
    terminal.say(f"  {terminal.paint(word, color)}  {result.id:<{DETAIL_COLUMN - 9}} {detail}")
    if result.fix:
        fix = _indented(result.fix, DETAIL_COLUMN + 3)
        terminal.say(" " * DETAIL_COLUMN + terminal.paint("-> ", color) + fix)


def _indented(text: str, columns: int) -> str:
    """`text` with its later lines indented by `columns`."""
    return clean(text).replace("\n", "\n" + " " * columns)


def tally(results: Iterable[Result]) -> str:
    """`34 passed, 1 warning, 0 failed, 6 skipped`."""
    counts = Counter(result.status for result in results)
    warnings = counted(counts["warn"], "warning")
    return f"{counts['pass']} passed, {warnings}, {counts['fail']} failed, {counts['skip']} skipped"
