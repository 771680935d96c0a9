"""One line that lives on a terminal, plain lines elsewhere: step, loss, tokens/s, time left."""

from __future__ import annotations

import time
from typing import Any, TextIO

from tqdm import tqdm
from transformers import TrainerCallback


class Progress(TrainerCallback):  # type: ignore[misc]
    """Counts tokens and seconds of training steps only: evaluation and saves are not in `tokens_per_second`."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.tokens, self.step_seconds, self.tokens_per_second = 0, 0.0, 0.0
        self._first_step = self._step_started = 0.0
        self._bar: tqdm[Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stream.isatty():
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", file=self.stream, dynamic_ncols=True
            )
        self._first_step = state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_seconds += time.monotonic() - self._step_started
        if self._bar is not None:
            self._bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "num_tokens" in logs and self.step_seconds > 0:
            self.tokens_per_second = logs["num_tokens"] / self.step_seconds
        parts = []
        if "loss" in logs:
            parts = [f"loss {logs['loss']:.3f}", f"{self.tokens_per_second:,.0f} tokens/s"]
        elif "eval_loss" in logs:
            parts = [f"eval_loss {logs['eval_loss']:.4f}"]
        if not parts:
            return
        if self._bar is not None:
            if "loss" in logs:
                self._bar.set_postfix_str(", ".join(parts))
            else:
                tqdm.write(f"step {state.global_step}: {parts[0]}", file=self.stream)
            return
        left = self._seconds_left(state)
        ending = f", {_duration(left)} left" if left is not None and "loss" in logs else ""
        print(f"step {state.global_step}/{state.max_steps}: {', '.join(parts)}{ending}", file=self.stream, flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def _seconds_left(self, state: Any) -> float | None:
        done = state.global_step - self._first_step
        return None if done <= 0 else self.step_seconds / done * (state.max_steps - state.global_step)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
