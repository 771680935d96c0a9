"""Settings and comparisons of whole trainings."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from transformers.trainer_utils import EvalLoopOutput

from finetune.files import read_seal
from finetune.runs.checkpoints import saved
from finetune.runs.outcome import Outcome
from finetune.training.trainer import Trainer
from support.training import Case, adapter_weights

BETWEEN = ("training.eval_steps=4", "training.save_steps=4", "lora.lora_dropout=0.2")


def scripted(monkeypatch: pytest.MonkeyPatch, losses: Iterable[float]) -> dict[int, dict[str, torch.Tensor]]:
    """Evaluations give `losses` by step, the rest of them 100; returns the adapter's weights by step as it goes."""
    by_step = dict(enumerate(losses))
    weights: dict[int, dict[str, torch.Tensor]] = {}

    def evaluation_loop(self: Trainer, *_args: Any, **_kwargs: Any) -> EvalLoopOutput:
        weights[self.state.global_step] = adapter_weights(self.model)
        loss = by_step.get(self.state.global_step, 100.0)
        return EvalLoopOutput(predictions=None, label_ids=None, metrics={"eval_loss": loss}, num_samples=1)

    monkeypatch.setattr(Trainer, "evaluation_loop", evaluation_loop)
    return weights


EVERY_STEP = ("training.max_steps=10", "training.eval_steps=1", "training.save_steps=10")
UNEVEN = (9.0, 8.0, 5.0, 6.0, 7.0, 6.5)  # the best is at step 2, between two saves


def ended(case: Case, outcome: Outcome, model: Any) -> dict[str, Any]:
    """All of a finished training that a stop must not change, so no times and speeds.

    Of the memory only that it was logged: on a CPU it is the peak of the tests' whole process.
    """
    last = saved(case.run.checkpoints)[-1]
    state = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))
    logged = [{key: entry[key] for key in entry if not re.search("time|second", key)} for entry in case.metrics()]
    for entry in logged:
        if "memory_gib" in entry:
            entry["memory_gib"] = entry["memory_gib"] > 0
    folders = {"last": last, "best": case.run.checkpoints / "best"}
    files = {
        name: sorted(path for path in folder.iterdir() if path.suffix in WEIGHTS) for name, folder in folders.items()
    }
    return {
        "files": {f"{name}/{path.name}": path.read_bytes() for name in files for path in files[name]},
        "metrics": logged,
        "outcome": dataclasses.replace(outcome, seconds=0, tokens_per_second=0),
        "step": (state["global_step"], read_seal(last)["eval_loss"]),
        "weights": {name: value.tolist() for name, value in adapter_weights(model).items()},
    }


WEIGHTS = (".safetensors", ".pt", ".pth")
