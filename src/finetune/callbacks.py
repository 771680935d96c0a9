"""What happens beside the steps: checkpoints sealed, the best adapter kept, metrics written, progress shown."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback

from finetune.errors import OutOfResource, Stopped
from finetune.files import write_text
from finetune.plan.schedule import Pace, Schedule, seconds_since_start
from finetune.runs.checkpoints import BEST, read_seal, replace_best, room_for, saved, seal, thin_out
from finetune.runs.folder import Run
from finetune.terminal import Terminal
from finetune.wording import clock, duration


def adapter_bytes(model: PeftModel) -> int:
    """Of the trainable weights in fp32."""
    return 4 * sum(int(parameter.numel()) for parameter in model.parameters() if parameter.requires_grad)


class Keeper(TrainerCallback):  # type: ignore[misc]
    """Seals each checkpoint, keeps the best adapter, writes metrics.jsonl, evaluates and saves at the end."""

    def __init__(self, run: Run, fingerprint: dict[str, Any], keep: int, save_minutes: float | None = None) -> None:
        self.run, self.fingerprint, self.keep = run, fingerprint, keep
        self.save_seconds = math.inf if save_minutes is None else 60 * save_minutes
        self._saved = 0.0
        self.eval_losses: dict[int, float] = {}
        folder = run.checkpoints / BEST
        self.best: dict[str, Any] | None = read_seal(folder) if folder.is_dir() else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved = time.monotonic()
        # Steps after the checkpoint are done again, so what they logged goes.
        metrics = self.run.folder / "metrics.jsonl"
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.is_file() else []
        write_text(metrics, "".join(line for line in lines if line.endswith("\n") and self._stays(line, state)))

    def _stays(self, line: str, state: Any) -> bool:
        entry = json.loads(line)
        made = "eval_loss" not in entry or entry["step"] in self.eval_losses  # else it is made now
        return made and 0 < state.global_step >= entry["step"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = control.should_log = True
        if time.monotonic() - self._saved >= self.save_seconds:
            control.should_save = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        loss = metrics["eval_loss"]
        self.eval_losses[state.global_step] = loss
        control.should_save = control.should_save or control.should_training_stop
        folder = self._folder(state)
        if folder.is_dir():  # saved where a signal cut this evaluation short; retention goes by the loss
            seal(folder, {**read_seal(folder), "eval_loss": loss})
        if self.best is None or loss < self.best["eval_loss"]:
            self.best = {"step": state.global_step, "eval_loss": loss, "fingerprint": self.fingerprint}
            self._keep_best(kwargs["model"], self.best)

    def _keep_best(self, model: PeftModel, facts: dict[str, Any]) -> None:
        partial = self.run.checkpoints / f"{BEST}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        with room_for(self.run.checkpoints, adapter_bytes(model)):
            model.save_pretrained(partial, save_embedding_layers=False)
            seal(partial, facts)
            replace_best(self.run.checkpoints, partial)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        facts = {"step": state.global_step, "eval_loss": self.eval_losses.get(state.global_step)}
        seal(self._folder(state), {**facts, "fingerprint": self.fingerprint})
        self._saved = time.monotonic()
        thin_out(self.run.checkpoints, self.keep)

    def _folder(self, state: Any) -> Path:
        return self.run.checkpoints / f"checkpoint-{state.global_step}"

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "train_runtime" in logs:
            return  # transformers' closing summary, of this invocation only
        entry = {"step": state.global_step, "time": round(time.time(), 3), **logs}
        with (self.run.folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")


class Checkpointing(TrainerCallback):  # type: ignore[misc]
    """Only the first `layers` decoder layers are computed again in the backward pass; the others keep everything.

    Here, since transformers marks every layer each time that a training begins. The last ones are kept whole: their
    backward comes first, and so they are gone before the first layer is computed again.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for index, layer in enumerate(kwargs["model"].get_base_model().model.layers):
            layer.gradient_checkpointing = index < self.layers


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
    """Ends the run after the step at hand, with a checkpoint: at the end of the time budget, and where a signal came.

    Within `with`, SIGINT and SIGTERM are heard; a second one ends the run at once. An evaluation ends within a batch of
    the signal, by EvaluationStopped.
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
        text = f"{signal.Signals(signal_number).name}: stopping as soon as the step is done; once more leaves at once\n"
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
            raise Stopped(exit_code, f"{what} at step {step}; the same command {goes_on}")


class Progress(TrainerCallback):  # type: ignore[misc]
    """One line that lives on a terminal, plain lines elsewhere: step, loss, speed, time left and end, cost, memory.

    Counts tokens and seconds of the run's training steps only: evaluation and saves are not in `tokens_per_second`, but
    in the time left, as long as the rehearsal's `pace` says. The cost is that of this start, all of its wall time.
    """

    def __init__(
        self,
        terminal: Terminal,
        pace: Pace | None = None,
        cost_per_hour: float | None = None,
        peak_gib: Callable[[], float] | None = None,
    ) -> None:
        self.terminal, self.pace = terminal, pace or Pace()
        self.cost_per_hour, self._peak_gib = cost_per_hour, peak_gib
        self.step_seconds, self.tokens = 0.0, 0
        self._first_step, self._seconds_before, self._step_started = 0, 0.0, 0.0
        self._lap = (0, 0.0)
        self._loss = self._eval = ""

    @property
    def tokens_per_second(self) -> float:
        """0 before the first log."""
        return self.tokens / self.step_seconds if self.step_seconds > 0 else 0.0

    def lap(self, tokens: int) -> float:
        """Tokens a second since the last call, or this start's first step; `tokens` are the whole run's."""
        tokens_before, seconds_before = self._lap
        self._lap = (tokens, self.step_seconds)
        seconds = self.step_seconds - seconds_before
        return (tokens - tokens_before) / seconds if seconds > 0 else 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._lap = (self.tokens, self.step_seconds)
        self._first_step, self._seconds_before = state.global_step, self.step_seconds
        self.terminal.status(f"step {state.global_step}/{state.max_steps}")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_seconds += time.monotonic() - self._step_started
        self._show(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        self.tokens = int(logs.get("num_tokens", self.tokens))
        if "loss" in logs:
            self._loss = f"loss {logs['loss']:.3f}, {self.tokens_per_second:,.0f} tokens/s"
            if not self.terminal.live:
                self.terminal.say(", ".join(self._parts(state)))
        elif "eval_loss" in logs:
            self._eval = f"eval_loss {logs['eval_loss']:.4f}"
            self.terminal.say(f"step {state.global_step}/{state.max_steps}: {self._eval}")
        self._show(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.terminal.clear()

    def _show(self, state: Any) -> None:
        if self.terminal.live:
            step, *others = self._parts(state)
            self.terminal.status(step, *others[:2], *filter(None, [self._eval]), *others[2:])

    def _parts(self, state: Any) -> list[str]:
        """What is known at this step, the most important first."""
        parts = [f"step {state.global_step}/{state.max_steps}" + (f": {self._loss}" if self._loss else "")]
        left = self._seconds_left(state)
        if left is not None:
            now = datetime.now()
            parts += [f"{duration(left)} left", f"ends about {clock(now + timedelta(seconds=left), now)}"]
            if self.cost_per_hour is not None:
                spent = seconds_since_start()
                so_far, whole = (seconds / 3600 * self.cost_per_hour for seconds in (spent, spent + left))
                parts.append(f"cost {so_far:,.2f} of {whole:,.2f}")
        return parts if self._peak_gib is None else [*parts, f"peak {self._peak_gib():.1f} GiB"]

    def _seconds_left(self, state: Any) -> float | None:
        done = state.global_step - self._first_step
        if done <= 0:
            return None
        seconds = self.step_seconds - self._seconds_before  # of this start: another may have had another machine
        schedule = Schedule(state.global_step, state.max_steps, 1, state.eval_steps, state.save_steps)
        return schedule.seconds(replace(self.pace, step=seconds / done), state.max_steps)
