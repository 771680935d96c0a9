"""Totals (time, tokens, loss) saved in each checkpoint and restored on resume."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState
from trl import SFTTrainer

from finetune.training.progress import Progress
from finetune.training.restore import keep_random_states

# Attributes that the trainer changes during each micro-batch, and after it.
COUNTED_WITHIN = ("_total_train_tokens", "_metrics", "step_lines", "step_losses")
COUNTED_AFTER = ("_tr_loss", "current_flos")


class Sums(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Totals of the run, saved in each checkpoint with transformers' own state, for log and manifest.

    They are wall time, tokens and seconds of steps since the run's start, and the losses since the last log. They
    exclude the time between two starts and work that was lost when a start was killed.
    """

    def __init__(self, trainer: SFTTrainer, progress: Progress) -> None:
        self.trainer, self.progress = trainer, progress
        self._seconds_before, self._started = 0.0, time.monotonic()
        self._since_log: dict[str, Any] | None = None
        self._tokens_before = 0  # at the start of the current step

    @property
    def seconds(self) -> float:
        """The wall time of all starts."""
        return self._seconds_before + time.monotonic() - self._started

    def state(self) -> dict[str, Any]:
        """Return the totals for trainer_state.json."""
        attributes = {
            "seconds": self.seconds,
            "step_seconds": self.progress.step_seconds,
            "tokens": self.trainer._total_train_tokens,
            "loss_sum": float(self.trainer._tr_loss),
            "logged_step": self.trainer._globalstep_last_logged,
            "metrics": dict(self.trainer._metrics["train"]),
        }
        return {"args": {}, "attributes": attributes}

    def recall(self, state: TrainerState) -> None:
        """Restore the totals of a checkpoint."""
        saved = state.stateful_callbacks[type(self).__name__]["attributes"]
        self._seconds_before, self._since_log = saved["seconds"], saved
        self.progress.step_seconds, self.progress.tokens = saved["step_seconds"], saved["tokens"]
        self.trainer._total_train_tokens = saved["tokens"]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._since_log is not None:  # only now: transformers sets the sum to 0 when training begins
            self.trainer._tr_loss += self._since_log["loss_sum"]
            self.trainer._globalstep_last_logged = self._since_log["logged_step"]
            self.trainer._metrics["train"].update(self._since_log["metrics"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tokens_before = self.trainer._total_train_tokens

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tokens = int(self.trainer._total_train_tokens - self._tokens_before)
        self.progress.micro_batch(state, self.trainer.current_gradient_accumulation_steps, tokens)
        if control.should_save:  # by the Stopper, which ends the run within this step
            self.trainer.undo_step()


def keep_counted(trainer: SFTTrainer, names: Sequence[str] = (*COUNTED_WITHIN, *COUNTED_AFTER)) -> Callable[[], None]:
    """Return a function that undoes what an unfinished step changed: counts and random states.

    It can be called repeatedly. Weights, optimizer, learning rate and position change only at the end of a step.
    """
    counted = copy.deepcopy({name: getattr(trainer, name) for name in names})
    put_random_states_back = keep_random_states(trainer.platform)

    def undo() -> None:
        vars(trainer).update(copy.deepcopy(counted))
        put_random_states_back()

    return undo
