"""The callbacks that end a run in order: after a signal, and before its time budget does."""

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
    """Says when one more step, the evaluation it may be due, and a save would not end before the time budget does.

    Each is taken to last as long as the longest so far; `pace` is what the rehearsal measured. `elapsed` gives the
    seconds of the budget that are over.
    """

    def __init__(self, hours: float, pace: Pace, elapsed: Callable[[], float]) -> None:
        self.hours, self._elapsed = hours, elapsed
        self.used_up = False
        self._step, self._evaluation, self._save = pace.step, pace.evaluation, pace.save
        self._last = 0.0

    def _lap(self) -> float:
        """Seconds since the last call."""
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
    """A signal came before the evaluation at hand was over."""


class Stopper(TrainerCallback):  # type: ignore[misc]
    """Ends the run with a checkpoint: after the step that ends the time budget, after the micro-batch of a signal.

    Within `with`, SIGINT and SIGTERM are heard; a second one ends the run at once. A step that is not finished is
    discarded: the checkpoint is that of the step before, whose state Sums restores. An evaluation ends within a batch
    of the signal, by EvaluationStopped.
    """

    def __init__(self, run: Run, budget: TimeBudget | None = None) -> None:
        self.run, self.budget = run, budget
        self.signal_number: int | None = None

    def __enter__(self) -> Stopper:
        # What a shell made this process ignore, as it does in the background of a script, stays ignored.
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
        os.write(2, (below_the_status + text).encode())  # not print: a handler may run in the middle of one

    def _reason(self) -> tuple[int, str] | None:
        """(exit code, what ended the run); None where nothing has."""
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
        """Whether a signal has come."""
        return self.signal_number is not None

    def leave(self, step: int) -> None:
        """Raise Stopped where something ended the run, saying from where the same command goes on."""
        reason = self._reason()
        if reason is not None:
            exit_code, what = reason
            checkpoints = saved(self.run.checkpoints)
            goes_on = f"goes on from {checkpoints[-1].name}" if checkpoints else "starts again (no checkpoint yet)"
            raise Stopped(exit_code, f"{what} at step {step}", f"the same command {goes_on}")
