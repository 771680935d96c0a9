"""The callbacks that end a run cleanly: after a signal, and before its time budget is used up."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from finetune.errors import OutOfResource, Stopped
from finetune.plan.schedule import Pace
from finetune.runs.checkpoints import saved, step_of
from finetune.runs.folder import Run


class TimeBudget(TrainerCallback):  # type: ignore[misc]
    """Sets `used_up` when another step, with its evaluation and a save, would exceed the time budget.

    Each is assumed to take as long as the longest so far, starting from the rehearsal's `pace`. `elapsed` returns the
    seconds of the budget already used.
    """

    def __init__(self, hours: float, pace: Pace, elapsed: Callable[[], float]) -> None:
        self.hours, self._elapsed = hours, elapsed
        self.used_up = False
        self._step, self._evaluation, self._save = pace.step, pace.evaluation, pace.save
        self._last = 0.0

    def _lap(self) -> float:
        """Return the seconds since the last call."""
        before, self._last = self._last, self._elapsed()
        return self._last - before

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._lap()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._evaluation = max(self._evaluation, self._lap())

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._save = max(self._save, self._lap())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step = max(self._step, self._lap())
        after = state.global_step + 1
        evaluated = after % state.eval_steps == 0 or after == state.max_steps
        needed = control.should_evaluate * self._evaluation + control.should_save * self._save
        needed += self._step + evaluated * self._evaluation + self._save
        self.used_up = after <= state.max_steps and self._last + needed > 3600 * self.hours


class EvaluationStopped(Exception):
    """A signal arrived during an evaluation."""


class Stopper(TrainerCallback):  # type: ignore[misc]
    """Ends the run with a checkpoint: after the last step of the time budget, or after the micro-batch of a signal.

    Within `with`, SIGINT and SIGTERM are caught; a second one exits at once. An unfinished step is discarded: the
    checkpoint is that of the previous step, whose state Sums restores. An evaluation ends after the current batch, by
    EvaluationStopped.
    """

    def __init__(self, run: Run, budget: TimeBudget | None = None) -> None:
        self.run, self.budget = run, budget
        self.signal_number: int | None = None

    def __enter__(self) -> Stopper:
        # A signal that the shell made this process ignore, as for a script's background job, stays ignored.
        heard = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._take) for number in heard}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, signal_number: int, _frame: FrameType | None) -> None:
        if self.signal_number is not None:
            raise SystemExit(128 + signal_number)
        self.signal_number = signal_number
        again = "press Ctrl-C again" if signal_number == signal.SIGINT else "send it again"
        name = signal.Signals(signal_number).name
        text = f"{name}: stopping after this micro-batch; {again} to quit now\n"
        below_the_status = "\n" if os.isatty(2) else ""
        os.write(2, (below_the_status + text).encode())  # not print, which the handler may interrupt

    def _reason(self) -> tuple[int, str] | None:
        """Return (exit code, reason) if the run should end, else None."""
        if self.signal_number is not None:
            return 128 + self.signal_number, f"stopped by {signal.Signals(self.signal_number).name}"
        if self.budget is not None and self.budget.used_up:
            return OutOfResource.exit_code, f"time budget of {self.budget.hours:g} h used up"
        return None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._reason() is not None:
            control.should_save = control.should_training_stop = True

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.signalled():
            control.should_training_stop = True
            control.should_save = state.global_step not in (0, *map(step_of, saved(self.run.checkpoints)))

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.signalled():
            raise EvaluationStopped

    def signalled(self) -> bool:
        """Whether a signal has arrived."""
        return self.signal_number is not None

    def leave(self, step: int) -> None:
        """Raise Stopped if the run was ended, saying from where the same command resumes."""
        reason = self._reason()
        if reason is not None:
            exit_code, what = reason
            checkpoints = saved(self.run.checkpoints)
            goes_on = f"resumes from {checkpoints[-1].name}" if checkpoints else "starts again (no checkpoint yet)"
            again = "the same command without --fresh" if self.run.fresh else "the same command"
            raise Stopped(exit_code, f"{what} at step {step}", f"{again} {goes_on}")
