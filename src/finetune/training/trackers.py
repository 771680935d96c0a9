"""TensorBoard and wandb: what the trainer is told, and that neither of them ever ends a training."""

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

FINISH_SECONDS = 15  # for what is left at the end: three tries of wandb's, a few seconds where the server is well


@dataclass(frozen=True)
class Trackers:
    """The callbacks that the config wants."""

    tensorboard: TensorBoard | None
    wandb: Wandb | None

    def all(self) -> list[TensorBoard | Wandb]:
        """Those that are there."""
        return [tracker for tracker in (self.tensorboard, self.wandb) if tracker is not None]

    @contextmanager
    def closed(self) -> Iterator[None]:
        """End wandb's run with the block, well or not; a signal that wants it to end at once is obeyed."""
        try:
            yield
        except Exception as error:
            if self.wandb:
                self.wandb.close(getattr(error, "exit_code", 1))
            raise
        if self.wandb:
            self.wandb.close(0)


def make_trackers(config: Config, run: Run, terminal: Terminal) -> Trackers:
    """TensorBoard for both, wandb where it is wanted. Sets the variables that they read."""
    tracking = config.tracking
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.folder / "tensorboard")
    if tracking.report_to == "none":
        return Trackers(None, None)
    if tracking.report_to == "tensorboard":
        return Trackers(TensorBoard(), None)
    os.environ["WANDB_PROJECT"] = tracking.project
    os.environ["WANDB_DIR"] = str(run.folder)
    os.environ["WANDB_SILENT"] = "true"
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it would wait 20 s for a server that does not answer
    reason = wandb_offline_reason()
    if reason is not None:
        os.environ.setdefault("WANDB_MODE", "offline")  # before wandb is imported: it would ask a question
    return Trackers(TensorBoard(), Wandb(run, terminal, redacted(config.as_dict()), reason))


def redacted(tree: Any) -> Any:
    """A config's tree for a server: of an absolute path, which names a user or a machine, its last part only."""
    if isinstance(tree, dict):
        return {key: redacted(value) for key, value in tree.items()}
    if isinstance(tree, str) and tree.startswith(("/", "~")):
        return Path(tree).name
    return tree


class TensorBoard(TensorBoardCallback):  # type: ignore[misc]
    """transformers' own, and samples as text."""

    def samples(self, step: int, samples: list[dict[str, str]]) -> None:
        """One page a question, whose slider goes through the steps. After the training a file of its own is written.

        The texts are indented, so that Markdown takes them as they are.
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
    """`call` of a Wandb, whose first failure is a warning and its last call: the hours are worth more."""

    @functools.wraps(call)
    def tried(self: Wandb, *arguments: Any, **named: Any) -> None:
        if not self.given_up:
            try:
                call(self, *arguments, **named)
            except Exception as error:  # noqa: BLE001
                self.give_up(error)

    return tried


class Wandb(WandbCallback):  # type: ignore[misc]
    """transformers' own, but what fails in it is told once, and the training goes on.

    `offline`: why it does not log online, or None. `unsent`: why a run that began online is not whole on the server, or
    None. A run that goes on is the same run on the server too.
    """

    def __init__(self, run: Run, terminal: Terminal, config: dict[str, Any], offline: str | None) -> None:
        super().__init__()
        self.run, self.terminal, self.config, self.offline = run, terminal, config, offline
        self.given_up = False
        self.unsent: str | None = None
        self.online: str | None = None  # the folder that wandb writes, below its own in the run's
        self._say_later()

    def _say_later(self) -> None:
        """Why the server has not got everything, and what sends it."""
        folder = shown(self.run.folder)
        if self.offline:
            self.terminal.decision("tracking", f"wandb is offline ({self.offline}); later: {wandb_sync(folder)}")
        elif self.unsent and self.online:
            later = wandb_sync(folder, self.online)
            self.terminal.decision("tracking", f"wandb has not got everything ({self.unsent}); later: {later}")

    def close(self, exit_code: int) -> None:
        """Send what is left, for FINISH_SECONDS at most, and say what sends the rest."""
        self.terminal.status("sending the last values to wandb")
        try:
            self._wandb.finish(exit_code)
        except TimeoutError:
            self.unsent = f"no answer for {FINISH_SECONDS} s at the end"
        except Exception as error:  # noqa: BLE001
            self.give_up(error)
            with suppress(Exception):
                self._wandb.teardown()  # else it is tried once more at exit, with a traceback
        self._say_later()

    on_train_begin = _guarded(WandbCallback.on_train_begin)
    on_log = _guarded(WandbCallback.on_log)
    on_save = _guarded(WandbCallback.on_save)
    on_train_end = _guarded(WandbCallback.on_train_end)

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        """Start or join this run, with the project's own config in place of transformers' arguments and their paths."""
        self._initialized = True
        if self.offline is None:
            self._start_online()
        else:
            self._start()
        self._wandb.define_metric("train/global_step")
        self._wandb.define_metric("*", step_metric="train/global_step", step_sync=True)

    @_guarded
    def samples(self, step: int, samples: list[dict[str, str]]) -> None:
        """A table of the questions and both answers."""
        columns = ["prompt", "base", "tuned"]
        table = self._wandb.Table(columns=columns, data=[[sample[name] for name in columns] for sample in samples])
        self._wandb.log({"samples": table, "train/global_step": step})

    def _start_online(self) -> None:
        """Join this run on the server, or start it offline where the server does not let us in time."""
        try:
            self._start(init_timeout=PROBE_SECONDS, login_timeout=PROBE_SECONDS)
        except self._wandb.errors.Error as error:
            self.offline = first_line(error)
            self._say_later()
            self._wandb.teardown()  # its own process still holds this run's id
            self._start(mode="offline")

    def _start(self, **settings: Any) -> None:
        """One id for all starts of this run: `wandb sync`, too, then makes one run of the files of several starts."""
        made = self._wandb.Settings(finish_timeout=FINISH_SECONDS, finish_timeout_raises=True, **settings)
        run = self._wandb.init(name=self.run.name, id=self._id(), resume="allow", config=self.config, settings=made)
        self.online = None if self.offline else Path(run.dir).parent.name
        unheard = logging.Logger("wandb")  # it is silent, and gives to this what it would print
        unheard.addFilter(self._hear)
        self._wandb.termsetup(run.settings, unheard)

    def _hear(self, record: logging.LogRecord) -> bool:
        """wandb says only in a warning that it sends no more, as where its key is no longer valid."""
        if "Fatal error while uploading data" in record.getMessage():
            self.unsent = "it gave up sending"
        return False

    def _id(self) -> str:
        """wandb's name of this run, the same after each resume."""
        path = self.run.folder / "wandb" / "id"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        return path.read_text(encoding="utf-8").strip()

    def give_up(self, error: Exception) -> None:
        """Leave wandb out from here, and say so once."""
        if not self.given_up:
            self.given_up = True
            why = first_line(error)
            self.terminal.warn(f"wandb has failed and is left out from here ({why}); metrics.jsonl goes on")
