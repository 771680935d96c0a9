"""A tiny training through the real code, which the tests of the trainer, its callbacks and its levers share."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.data.cache import Cache
from finetune.data.encode import Recipe
from finetune.data.prepare import Prepared, prepare
from finetune.machine.platforms import PLATFORMS
from finetune.model.load import adapt, load_base
from finetune.plan.memory import checkpointed_layers
from finetune.plan.model_shape import read_geometry
from finetune.runs.checkpoints import saved
from finetune.runs.folder import Run
from finetune.runs.outcome import Outcome
from finetune.terminal import Terminal
from finetune.training.arguments import training_arguments
from finetune.training.keeper import Keeper
from finetune.training.progress import Progress
from finetune.training.recovery import Recovery
from finetune.training.stopper import Stopper
from finetune.training.trainer import Examples, Trainer, Watchers, evaluates_first, make_trainer, train

QUICK = (
    "model.max_seq_length=64",
    "dataset.validation_split=0.25",
    "training.gradient_accumulation_steps=1",
    "training.gradient_checkpointing=false",
    "training.max_steps=4",
)
FINGERPRINT = {"config": {"lr": 0.1}}
FACTS: dict[str, Any] = {
    "fingerprint": FINGERPRINT,
    "used": {"fused_kernels": False, "fused_lora": False, "checkpointed_layers": 0},
}


class Case:
    """A tiny model, 40 conversations and a run folder. Each `trainer` begins as a new process would, from the seed."""

    def __init__(self, base: Path, train_file: Path, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.folder, self.tokenizer, self.train_file, self.base = folder, tokenizer, str(train_file), base
        self.run = Run(folder / "run", False, None)
        self.run.checkpoints.mkdir(parents=True)
        self.ran_out: list[tuple[int, str]] = []  # what a recovery recorded: layers checkpointed then, and a sentence

    def config(self, *settings: str) -> Config:
        files = (f"model.name={self.base}", f"dataset.train_file={self.train_file}")
        return load_config("cpu", [*files, *QUICK, *settings])[0]

    def data(self, config: Config) -> Prepared:
        recipe = Recipe(None, None, config.model.max_seq_length, True, False)
        return prepare(config.dataset, recipe, config.training.packing, Cache(self.folder / "cache"), workers=0)

    def trainer(self, *settings: str, first: bool = True, change: Callable[[Any], None] | None = None) -> Trainer:
        config = self.config(*settings)
        base = load_base(config.model, config.quantization, "cpu")
        if change:
            change(base)
        model = adapt(base, config)
        data = self.data(config)
        rows, validation = data.train.dataset(data.sequences), data.validation.dataset(None)
        sft = training_arguments(config.training, self.run, PLATFORMS["cpu"], first)
        layers = checkpointed_layers(config, read_geometry(config))
        examples = Examples(rows, validation)
        return make_trainer(model, self.tokenizer, examples, sft, layers)

    def train(self, *settings: str, checkpoint: Path | None = None) -> tuple[Outcome, Any, str]:
        """(outcome, model, what was printed) of a whole training."""
        config = self.config(*settings)
        trainer = self.trainer(*settings, first=evaluates_first(checkpoint))
        stream = StringIO()
        facts = copy.deepcopy(FACTS)
        keeper = Keeper(self.run, facts, config.training.save_total_limit, config.training.save_minutes)
        steps = trainer.args.max_steps
        terminal = Terminal(stream=stream)
        watchers = Watchers(keeper, Stopper(self.run), Progress(terminal))
        trainer.recovery = Recovery(trainer, terminal, lambda *recorded: self.ran_out.append(recorded), facts["used"])
        outcome = train(trainer, config.training, watchers, steps, checkpoint)
        return outcome, trainer.model, stream.getvalue()

    def checkpoints(self) -> list[str]:
        return [folder.name for folder in saved(self.run.checkpoints)]

    def metrics(self) -> list[dict[str, Any]]:
        lines = (self.run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def adapter_weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def same(these: dict[str, torch.Tensor], those: dict[str, torch.Tensor]) -> bool:
    return these.keys() == those.keys() and all(torch.equal(these[name], those[name]) for name in these)
