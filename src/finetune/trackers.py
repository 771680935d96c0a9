"""TensorBoard and wandb: what the trainer is told, and that neither of them ever ends a training."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from typing import Any

from transformers.integrations import WandbCallback

from finetune.hub import PROBE_SECONDS
from finetune.machine import shown, wandb_sync
from finetune.report import Terminal
from finetune.runs import Run
from finetune.schema import TrackingConfig
from finetune.tracking import wandb_offline_reason


def make_trackers(tracking: TrackingConfig, run: Run, terminal: Terminal) -> tuple[list[str], Wandb | None]:
    """transformers' report_to, and wandb's callback where it is wanted. Sets the variables that both read."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.folder / "tensorboard")
    if tracking.report_to != "wandb":
        return ([] if tracking.report_to == "none" else ["tensorboard"]), None
    os.environ["WANDB_PROJECT"] = tracking.project
    os.environ["WANDB_DIR"] = str(run.folder)
    os.environ["WANDB_SILENT"] = "true"
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it would wait 20 s for a server that does not answer
    reason = wandb_offline_reason()
    if reason is not None:
        os.environ.setdefault("WANDB_MODE", "offline")  # before wandb is imported: it would ask a question
    return ["tensorboard"], Wandb(run, terminal, reason)


class Wandb(WandbCallback):  # type: ignore[misc]
    """transformers' own, but what fails in it is told once, and the training goes on.

    `offline`: why it does not log online, or None. A run that goes on is the same run on the server too.
    """

    def __init__(self, run: Run, terminal: Terminal, offline: str | None) -> None:
        super().__init__()
        self.run, self.terminal, self.offline = run, terminal, offline
        self.given_up = False
        if offline:
            terminal.decision("tracking", self.later())

    def later(self) -> str:
        """Why it is offline, and what sends what it wrote."""
        return f"wandb is offline ({self.offline}); later: {wandb_sync(shown(self.run.folder))}"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.offline is None:
            self._try(self._start_online)
        self._try(super().on_train_begin, args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._try(super().on_log, args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._try(super().on_train_end, args, state, control, **kwargs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._try(super().on_save, args, state, control, **kwargs)

    def _start_online(self) -> None:
        """Join this run on the server, or start one offline where the server does not let us in time."""
        import wandb

        try:
            settings = wandb.Settings(init_timeout=PROBE_SECONDS, login_timeout=PROBE_SECONDS)
            wandb.init(name=self.run.name, id=self._id(), resume="allow", settings=settings)
        except wandb.errors.Error as error:
            self.offline = str(error).splitlines()[0]
            self.terminal.decision("tracking", self.later())
            wandb.init(name=self.run.name, mode="offline")

    def _id(self) -> str:
        """wandb's name of this run, the same after each resume."""
        path = self.run.folder / "wandb" / "id"
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            path.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        return path.read_text(encoding="utf-8").strip()

    def _try(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        if self.given_up:
            return
        try:
            call(*arguments, **named)
        except Exception as error:  # noqa: BLE001  # whatever breaks in a tracker, the hours are worth more
            self.given_up = True
            first = (str(error) or type(error).__name__).splitlines()[0]
            self.terminal.warn(f"wandb has failed and is left out from here ({first}); metrics.jsonl goes on")
