"""TensorBoard and wandb as trainer callbacks that never fail a training."""

from __future__ import annotations

import functools
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.integrations import TensorBoardCallback, WandbCallback

from finetune.config.schema import Config
from finetune.files import shown
from finetune.model.hub import PROBE_SECONDS
from finetune.runs.folder import Run
from finetune.terminal import Terminal
from finetune.training.wandb_access import wandb_offline_reason, wandb_sync
from finetune.wording import first_line

FINISH_SECONDS = 15  # to upload the rest at the end: three tries of wandb; a working server needs a few


@dataclass(frozen=True)
class Trackers:
    """The callbacks that the config asks for."""

    tensorboard: TensorBoard | None
    wandb: Wandb | None

    def all(self) -> list[TensorBoard | Wandb]:
        """Return the trackers in use."""
        return [tracker for tracker in (self.tensorboard, self.wandb) if tracker is not None]

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Finish wandb's run when the block ends or raises; a second signal (SystemExit) skips it."""
        try:
            yield
        except Exception as error:
            if self.wandb:
                self.wandb.close(getattr(error, "exit_code", 1))
            raise
        if self.wandb:
            self.wandb.close(0)


def make_trackers(config: Config, run: Run, terminal: Terminal) -> Trackers:
    """Return TensorBoard for both settings, and wandb if configured. Sets their environment variables."""
    tracking = config.tracking
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.folder / "tensorboard")
    if tracking.report_to == "none":
        return Trackers(None, None)
    if tracking.report_to == "tensorboard":
        return Trackers(TensorBoard(), None)
    os.environ["WANDB_PROJECT"] = tracking.project
    os.environ["WANDB_DIR"] = str(run.folder)
    os.environ["WANDB_SILENT"] = "true"
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it waits 20 s for a server that does not answer
    reason = wandb_offline_reason()
    if reason is not None:
        os.environ.setdefault("WANDB_MODE", "offline")  # before wandb is imported, or it asks a question
    return Trackers(TensorBoard(), Wandb(run, terminal, redacted(config.as_dict()), reason))


def redacted(tree: Any) -> Any:
    """Shorten each absolute path in a config to its last part, because it may name a user or a machine."""
    if isinstance(tree, dict):
        return {key: redacted(value) for key, value in tree.items()}
    if isinstance(tree, str) and tree.startswith(("/", "~")):
        return Path(tree).name
    return tree


class TensorBoard(TensorBoardCallback):  # type: ignore[misc]
    """transformers' callback, plus samples as text."""

    def samples(self, step: int, samples: list[dict[str, str]]) -> None:
        """Write one text per question, with a slider over the steps. After training, opens a new event file.

        The texts are indented, so Markdown shows them unchanged.
        """
        closed = self.tb_writer is None
        if closed:
            self._init_summary_writer(None)
        for number, sample in enumerate(samples, start=1):
            parts = (f"{name}\n\n    " + sample[name].replace("\n", "\n    ") for name in ("prompt", "base", "tuned"))
            self.tb_writer.add_text(f"samples/{number}", "\n\n".join(parts), step)
        self.tb_writer.flush()
        if closed:
            self.on_train_end(None, None, None)


def _guarded(call: Callable[..., None]) -> Callable[..., None]:
    """Wrap a method of Wandb: its first failure is a warning and turns wandb off, so the run continues."""

    @functools.wraps(call)
    def tried(self: Wandb, *arguments: Any, **named: Any) -> None:
        if not self.given_up:
            try:
                call(self, *arguments, **named)
            except Exception as error:  # noqa: BLE001
                self.give_up(error)

    return tried


class Wandb(WandbCallback):  # type: ignore[misc]
    """transformers' callback, but a failure is only a warning and turns it off.

    `offline`: why it logs offline, or None. `unsent`: why an online run is incomplete on the server, or None. A resumed
    run is the same run on the server.
    """

    def __init__(self, run: Run, terminal: Terminal, config: dict[str, Any], offline: str | None) -> None:
        super().__init__()
        self.run, self.terminal, self.config, self.offline = run, terminal, config, offline
        self.given_up = False
        self.unsent: str | None = None
        self.online: str | None = None  # wandb's folder of this start, in RUN/wandb
        self._say_unsent()

    def _say_unsent(self) -> None:
        """Print what was not uploaded and why, and the command that uploads it."""
        folder = shown(self.run.folder)
        if self.offline:
            self.terminal.decision(
                "tracking", f"wandb is offline ({self.offline}); to upload later: {wandb_sync(folder)}"
            )
        elif self.unsent and self.online:
            later = wandb_sync(folder, self.online)
            self.terminal.decision(
                "tracking", f"some wandb data was not uploaded ({self.unsent}); to upload it: {later}"
            )

    def close(self, exit_code: int) -> None:
        """Upload the rest within FINISH_SECONDS, or print the command that does it later."""
        self.terminal.status("uploading the last values to wandb")
        try:
            self._wandb.finish(exit_code)
        except TimeoutError:
            self.unsent = f"no answer for {FINISH_SECONDS} s at the end"
        except Exception as error:  # noqa: BLE001
            self.give_up(error)
            with suppress(Exception):
                self._wandb.teardown()  # else wandb tries again at exit, with a traceback
        self._say_unsent()

    on_train_begin = _guarded(WandbCallback.on_train_begin)
    on_log = _guarded(WandbCallback.on_log)
    on_save = _guarded(WandbCallback.on_save)
    on_train_end = _guarded(WandbCallback.on_train_end)

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        """Start or join this run, with our config in place of transformers' arguments and their paths."""
        self._initialized = True
        if self.offline is None:
            self._start_online()
        else:
            self._start()
        self._wandb.define_metric("train/global_step")
        self._wandb.define_metric("*", step_metric="train/global_step", step_sync=True)

    @_guarded
    def samples(self, step: int, samples: list[dict[str, str]]) -> None:
        """Log a table of the questions and both answers."""
        columns = ["prompt", "base", "tuned"]
        table = self._wandb.Table(columns=columns, data=[[sample[name] for name in columns] for sample in samples])
        self._wandb.log({"samples": table, "train/global_step": step})

    def _start_online(self) -> None:
        """Join this run on the server, or start it offline if the server refuses or is too slow."""
        try:
            self._start(init_timeout=PROBE_SECONDS, login_timeout=PROBE_SECONDS)
        except self._wandb.errors.Error as error:
            self.offline = first_line(error)
            self._say_unsent()
            self._wandb.teardown()  # else its process keeps this run's id
            self._start(mode="offline")

    def _start(self, **settings: Any) -> None:
        """Start wandb with the same id in all starts, so `wandb sync` also merges their files into one run."""
        made = self._wandb.Settings(finish_timeout=FINISH_SECONDS, finish_timeout_raises=True, **settings)
        run = self._wandb.init(name=self.run.name, id=self._id(), resume="allow", config=self.config, settings=made)
        self.online = None if self.offline else Path(run.dir).parent.name
        captured = logging.Logger("wandb")  # gets what wandb would print, since it is silent
        captured.addFilter(self._notice)
        self._wandb.termsetup(run.settings, captured)

    def _notice(self, record: logging.LogRecord) -> bool:
        """Notice the warning that is wandb's only sign that it stopped uploading, for example with a revoked key."""
        if "Fatal error while uploading data" in record.getMessage():
            self.unsent = "it stopped uploading"
        return False

    def _id(self) -> str:
        """Return wandb's id of this run, the same after each resume."""
        path = self.run.folder / "wandb" / "id"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        return path.read_text(encoding="utf-8").strip()

    def give_up(self, error: Exception) -> None:
        """Turn wandb off, and say so once."""
        if not self.given_up:
            self.given_up = True
            why = first_line(error)
            self.terminal.warn(f"wandb failed and is off from now on ({why}); metrics.jsonl is still written")
