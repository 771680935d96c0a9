"""Checks in the terminal: their lines, their color, and nothing that was found steers it."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.checks import show
from finetune.checks.runner import Result
from finetune.checks.show import show_result, tally
from finetune.errors import CheckFailed
from finetune.terminal import Terminal
from support.pseudo_terminal import Tty


@pytest.fixture(autouse=True)
def color_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)


def result(id_: str, status: str, detail: str = "found", fix: str = "") -> Result:
    return Result(id_, status, detail, fix, 0.1)


RESULTS = (
    result("gpu.driver", "pass", "driver 550.90.07"),
    result("gpu.processes", "warn", "1 other program", "kill 4711\nor wait"),
    result("data.rows", "fail", "data: 1 bad row\n  train.jsonl:7: not JSON", "fix it"),
    result("model.access", "skip", "a local folder needs no Hub"),
)


def checked(stream: io.StringIO, *results: Result) -> str:
    terminal = Terminal(stream=stream)
    terminal.header("validate")
    for one in results:
        show_result(terminal, one)
    return stream.getvalue()


def test_checks_stand_under_their_title_each_with_its_status_in_a_word() -> None:
    assert checked(io.StringIO(), *RESULTS) == (
        "validate\n"
        "  pass  gpu.driver               driver 550.90.07\n"
        "  WARN  gpu.processes            1 other program\n"
        "                                 -> kill 4711\n"
        "                                    or wait\n"
        "  FAIL  data.rows                data: 1 bad row\n"
        "                                   train.jsonl:7: not JSON\n"
        "                                 -> fix it\n"
        "  skip  model.access             a local folder needs no Hub\n"
    )


def test_on_a_terminal_the_status_and_the_arrow_have_its_color() -> None:
    assert checked(Tty(), *RESULTS[:2], RESULTS[3]) == (
        "\033[1mvalidate\033[0m\n"
        "  \033[32mpass\033[0m  gpu.driver               driver 550.90.07\n"
        "  \033[33mWARN\033[0m  gpu.processes            1 other program\n"
        "                                 \033[33m-> \033[0mkill 4711\n"
        "                                    or wait\n"
        "  \033[2mskip\033[0m  model.access             a local folder needs no Hub\n"
    )
    assert checked(Tty(), result("a", "fail")).splitlines()[1].startswith("  \033[31mFAIL\033[0m  a ")


def test_what_a_check_found_cannot_steer_the_terminal() -> None:
    assert checked(io.StringIO(), result("a", "warn", "\033[2J", "\033]0;x\a")) == (
        "validate\n  WARN  a                        \\x1b[2J\n                                 -> \\x1b]0;x\\x07\n"
    )


def test_every_id_leaves_room_before_what_was_found() -> None:
    from finetune.checks import CHECKS

    lines = checked(io.StringIO(), *(result(check.id, "pass") for check in CHECKS)).splitlines()[1:]
    assert {line.index(" found") for line in lines} == {32}


def test_the_tally_counts_each_status() -> None:
    assert tally(RESULTS) == "1 passed, 1 warning, 1 failed, 1 skipped"
    assert tally([]) == "0 passed, 0 warnings, 0 failed, 0 skipped"


def test_a_warning_that_the_plan_has_shown_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings = [
        result("plan.steps", "warn", "10 steps of 2; too few steps", "--set a=1"),
        result("plan.hours", "warn", "too long", "--set b=2"),
        result("gpu.processes", "warn", "1 other program", "kill 4711"),
    ]
    monkeypatch.setattr(show, "run", lambda *_: iter(warnings))
    plan = SimpleNamespace(problems=["too few steps; --set a=1", "rows are padded; --set c=3"])
    preflight: Any = SimpleNamespace(config=SimpleNamespace(platform="cpu"), plan=plan)
    stream = io.StringIO()
    show.require_checks(preflight, frozenset(), False, Terminal(stream=stream))
    assert stream.getvalue() == (
        "  WARN  plan.hours               too long\n                                 -> --set b=2\n"
        "  WARN  gpu.processes            1 other program\n                                 -> kill 4711\n"
        "checks: 0 passed, 3 warnings, 0 failed, 0 skipped\n"
    )


@pytest.mark.parametrize(
    ("ids", "end"),
    [(["a.b"], "fix it, or skip it with --skip a.b"), (["a.b", "c.d"], "fix them, or skip them with --skip a.b,c.d")],
)
def test_a_start_is_refused_with_all_failures_and_the_command_that_skips_them(
    monkeypatch: pytest.MonkeyPatch, ids: list[str], end: str
) -> None:
    failures = [result(id_, "fail", "wrong", "type this") for id_ in ids]
    monkeypatch.setattr(show, "run", lambda *_: iter(failures))
    preflight: Any = SimpleNamespace(config=SimpleNamespace(platform="cpu"))
    with pytest.raises(CheckFailed) as refused:
        show.require_checks(preflight, frozenset(), False, Terminal(stream=io.StringIO()))
    found = "".join(f"  {id_}: wrong\n    type this\n" for id_ in ids)
    assert str(refused.value) == f"checks: {len(ids)} failed\n{found}{end}"
