"""The callbacks that write a run to disk: sealed checkpoints, the best adapter, metrics.jsonl, and a copy elsewhere."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback

from finetune.files import read_json_lines, read_seal, seal, write_json_lines
from finetune.runs.checkpoints import BEST, replace_best, room_for, thin_out
from finetune.runs.copies import Copies
from finetune.runs.folder import METRICS, Run


def adapter_bytes(model: PeftModel) -> int:
    """Return the size of the trainable weights in fp32."""
    return 4 * sum(int(parameter.numel()) for parameter in model.parameters() if parameter.requires_grad)


class Keeper(TrainerCallback):  # type: ignore[misc]
    """Seals each checkpoint, keeps the best adapter, writes metrics.jsonl, evaluates and saves at the end."""

    def __init__(self, run: Run, facts: dict[str, Any], keep: int, save_minutes: float | None = None) -> None:
        """`facts` go into every seal: the run's fingerprint, and what replaces `auto`."""
        self.run, self.facts, self.keep = run, facts, keep
        self.save_seconds = math.inf if save_minutes is None else 60 * save_minutes
        self.describe: Callable[[Path, dict[str, Any]], dict[str, str]] | None = None  # export.describe_best
        self._saved = 0.0
        self.eval_losses: dict[int, float] = {}
        folder = run.checkpoints / BEST
        self.best: dict[str, Any] | None = read_seal(folder) if folder.is_dir() else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved = time.monotonic()
        # Steps after the checkpoint will be repeated, so their log entries are removed.
        metrics = self.run.folder / METRICS
        write_json_lines(metrics, [entry for entry in read_json_lines(metrics) if self._stays(entry, state)])

    def _stays(self, entry: dict[str, Any], state: Any) -> bool:
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
            self.best = {"step": state.global_step, "eval_loss": loss, **self.facts}
            self._keep_best(kwargs["model"], self.best)

    def _keep_best(self, model: PeftModel, facts: dict[str, Any]) -> None:
        partial = self.run.checkpoints / f"{BEST}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        with room_for(self.run.checkpoints, adapter_bytes(model)):
            model.save_pretrained(partial, save_embedding_layers=False)
            hashed = {} if self.describe is None else self.describe(partial, facts)
            seal(partial, facts, hashed)
            replace_best(self.run.checkpoints, partial)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        facts = {"step": state.global_step, "eval_loss": self.eval_losses.get(state.global_step)}
        seal(self._folder(state), {**facts, **self.facts})
        self._saved = time.monotonic()
        thin_out(self.run.checkpoints, self.keep)

    def _folder(self, state: Any) -> Path:
        return self.run.checkpoints / f"checkpoint-{state.global_step}"

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "train_runtime" in logs:
            return  # transformers' closing summary, of this invocation only
        entry = {"step": state.global_step, "time": round(time.time(), 3), **logs}
        with (self.run.folder / METRICS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")


class Copier(TrainerCallback):  # type: ignore[misc]
    """Begins a copy at each new best, and at each save if checkpoints are copied too; comes after `keeper`."""

    def __init__(self, copies: Copies, keeper: Keeper) -> None:
        self.copies, self.keeper = copies, keeper

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.keeper.best is not None and self.keeper.best["step"] == state.global_step:
            self.copies.begin()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.copies.checkpoints:
            self.copies.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.copies.poll()
