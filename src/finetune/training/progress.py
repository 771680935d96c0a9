"""The callback that prints progress: step, loss, speed, time left, cost, memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from transformers import TrainerCallback

from finetune.plan.schedule import Pace, Schedule, seconds_since_start
from finetune.terminal import Terminal
from finetune.wording import clock, duration

# Micro-batches that take this long are printed: by arithmetic a minute each on an M4, seconds on an H100.
SLOW_SECONDS = 10.0


class Progress(TrainerCallback):  # type: ignore[misc]
    """Updates one line on a terminal, prints plain lines elsewhere: step, loss, speed, time left, end, cost, memory.

    `tokens_per_second` covers training steps only. The time left includes evaluations and saves, at the rehearsal's
    `pace`. The cost is that of this start's wall time.
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
        self._micro_batch, self._step_so_far = 0, 0.0  # done in the current step, and their seconds
        self._loss = self._speed = self._eval = ""

    @property
    def tokens_per_second(self) -> float:
        """0 before the first log."""
        return self.tokens / self.step_seconds if self.step_seconds > 0 else 0.0

    def lap(self, tokens: int) -> float:
        """Return tokens per second since the last call or this start's first step; `tokens` is the run's total."""
        tokens_before, seconds_before = self._lap
        self._lap = (tokens, self.step_seconds)
        seconds = self.step_seconds - seconds_before
        return (tokens - tokens_before) / seconds if seconds > 0 else 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._lap = (self.tokens, self.step_seconds)
        self._first_step, self._seconds_before = state.global_step, self.step_seconds
        self.terminal.status(f"step {state.global_step}/{state.max_steps}")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_started, self._micro_batch = time.monotonic(), 0

    def micro_batch(self, state: Any, count: int, tokens: int) -> None:
        """Count a micro-batch (of `count`, except the last) and print it if slow; `tokens` of the step so far."""
        self._micro_batch += 1
        self._step_so_far = time.monotonic() - self._step_started
        if self._step_so_far < SLOW_SECONDS * self._micro_batch:
            return
        speed = f"{tokens / self._step_so_far:,.0f} tokens/s"
        text = f"step {state.global_step + 1}/{state.max_steps}: micro-batch {self._micro_batch} of {count}, {speed}"
        if self.terminal.live:
            _, *others = self._parts(state)
            self.terminal.status(text, *others[:2], *filter(None, [self._loss, self._eval]), *others[2:])
        else:
            self.terminal.say(text)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_seconds += time.monotonic() - self._step_started
        self._step_so_far = 0.0
        self._show(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        self.tokens = int(logs.get("num_tokens", self.tokens))
        if "loss" in logs:
            self._loss, self._speed = f"loss {logs['loss']:.3f}", f", {self.tokens_per_second:,.0f} tokens/s"
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
        """Return the parts of the progress line, the most important first."""
        parts = [f"step {state.global_step}/{state.max_steps}" + (f": {self._loss}{self._speed}" if self._loss else "")]
        left = self._seconds_left(state)
        if left is not None:
            now = datetime.now().astimezone()
            parts += [f"{duration(left)} left", f"ends about {clock(now + timedelta(seconds=left), now)}"]
            if self.cost_per_hour is not None:
                spent = seconds_since_start()
                so_far, total = (seconds / 3600 * self.cost_per_hour for seconds in (spent, spent + left))
                parts.append(f"cost {so_far:,.2f} of {total:,.2f}")
        return parts if self._peak_gib is None else [*parts, f"peak {self._peak_gib():.1f} GiB"]

    def _seconds_left(self, state: Any) -> float | None:
        done = state.global_step - self._first_step
        if done <= 0:
            return None
        seconds = (
            self.step_seconds - self._seconds_before
        )  # of this start only: an earlier one may have run on another machine
        schedule = Schedule(state.global_step, state.max_steps, 1, state.eval_steps, state.save_steps)
        left = schedule.seconds(replace(self.pace, step=seconds / done), state.max_steps)
        return max(0.0, left - self._step_so_far)
