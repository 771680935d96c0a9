"""A training as it is shown while it runs."""

from __future__ import annotations

from datetime import UTC, datetime
from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerState

from finetune.plan.schedule import Pace
from finetune.terminal import Terminal
from finetune.training import progress as progress_module
from finetune.training.progress import Progress
from support.pseudo_terminal import Tty


@pytest.fixture
def at_noon(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is noon, and this process was started two minutes ago."""

    class Noon(datetime):
        @classmethod
        def now(cls, _: Any = None) -> Any:
            return SimpleNamespace(astimezone=lambda: datetime(2024, 1, 31, 12, tzinfo=UTC))

    monkeypatch.setattr(progress_module, "datetime", Noon)
    monkeypatch.setattr(progress_module, "seconds_since_start", lambda: 120.0)


def progressed(progress: Progress, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of 30 s of 100, each logged, then an evaluation."""
    clock = iter([0.0, 30.0, 100.0, 130.0])
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    state = TrainerState(global_step=0, max_steps=100, eval_steps=10, save_steps=50)
    progress.on_train_begin(None, state, None)
    for step in (1, 2):
        progress.on_step_begin(None, state, None)
        state.global_step = step
        progress.on_step_end(None, state, None)
        progress.on_log(None, state, None, {"loss": 3.25, "num_tokens": 60_000.0 * step})
    progress.on_log(None, state, None, {"eval_loss": 2.5})
    progress.on_log(None, state, None, {"train_runtime": 1.0})


@pytest.mark.usefixtures("at_noon")
def test_a_plain_progress_line_says_when_it_ends_and_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = StringIO()
    progress = Progress(Terminal(stream=stream), Pace(1.0, 60.0, 12.0), 3.0, lambda: 12.94)
    progressed(progress, monkeypatch)
    progress.on_train_end(None, TrainerState(), None)
    # 99 steps of 30 s, 10 evaluations of 60 s, 2 saves of 12 s: 3,594 s; with the 120 s since the start 3,714 s
    assert stream.getvalue() == (
        "step 1/100: loss 3.250, 2,000 tokens/s, 60 min left, ends about 12:59 UTC, cost 0.10 of 3.10, peak 12.9 GiB\n"
        "step 2/100: loss 3.250, 2,000 tokens/s, 59 min left, ends about 12:59 UTC, cost 0.10 of 3.07, peak 12.9 GiB\n"
        "step 2/100: eval_loss 2.5000\n"
    )


@pytest.mark.usefixtures("at_noon")
def test_on_a_terminal_one_line_holds_the_last_of_everything_and_evaluations_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    screen = Tty()
    progress = Progress(Terminal(stream=screen), Pace(1.0, 60.0, 12.0), 3.0, lambda: 12.94)
    progressed(progress, monkeypatch)
    shown = screen.getvalue().split("\r")
    ending = "59 min left, ends about 12:59 UTC, eval_loss 2.5000, cost 0.10 of 3.07"
    assert shown[-1] == f"step 2/100: loss 3.250, 2,000 tokens/s, {ending}, peak 12.9 GiB"
    assert [part for part in shown if "\n" in part] == ["step 2/100: eval_loss 2.5000\n"]
    progress.on_train_end(None, TrainerState(), None)
    assert screen.getvalue().endswith(f"\r{' ' * len(shown[-1])}\r")


def micro_batched(progress: Progress, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Two steps of four micro-batches of 2,048 tokens and `seconds` each; the first is logged."""
    clock = iter(seconds * number for number in (0, 1, 2, 3, 4, 4, 5, 6, 7))
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    state = TrainerState(global_step=0, max_steps=3, eval_steps=3, save_steps=3)
    progress.on_train_begin(None, state, None)
    for step in (1, 2):
        progress.on_step_begin(None, state, None)
        for number in (1, 2, 3):
            progress.micro_batch(state, 4, 2048 * number)
        if step == 1:
            state.global_step = step
            progress.on_step_end(None, state, None)
            progress.on_log(None, state, None, {"loss": 3.25, "num_tokens": 8192.0})


@pytest.mark.usefixtures("at_noon")
def test_a_log_has_a_line_for_each_slow_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = StringIO()
    micro_batched(Progress(Terminal(stream=stream)), monkeypatch, 50)
    assert stream.getvalue() == (
        "step 1/3: micro-batch 1 of 4, 41 tokens/s\n"
        "step 1/3: micro-batch 2 of 4, 41 tokens/s\n"
        "step 1/3: micro-batch 3 of 4, 41 tokens/s\n"
        "step 1/3: loss 3.250, 41 tokens/s, 7 min left, ends about 12:06 UTC\n"
        "step 2/3: micro-batch 1 of 4, 41 tokens/s\n"
        "step 2/3: micro-batch 2 of 4, 41 tokens/s\n"
        "step 2/3: micro-batch 3 of 4, 41 tokens/s\n"
    )


@pytest.mark.usefixtures("at_noon")
def test_where_a_micro_batch_takes_seconds_there_is_a_line_for_each_step_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (StringIO(), Tty()):
        micro_batched(Progress(Terminal(stream=stream)), monkeypatch, 9.9)
        assert "micro-batch" not in stream.getvalue()
        assert "step 1/3: loss 3.250" in stream.getvalue()


@pytest.mark.usefixtures("at_noon")
def test_a_terminal_shows_a_slow_micro_batch_with_the_last_loss_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    screen = Tty()
    micro_batched(Progress(Terminal(stream=screen)), monkeypatch, 50)
    shown = [part for part in screen.getvalue().split("\r") if "micro-batch" in part]
    assert shown[0] == "step 1/3: micro-batch 1 of 4, 41 tokens/s"
    # two steps of 200 s are left after the first, of which 150 s are over
    assert shown[-1] == "step 2/3: micro-batch 3 of 4, 41 tokens/s, 4 min left, ends about 12:04 UTC, loss 3.250"
    assert "\n" not in screen.getvalue()
