"""A training job: model, data and config, and the trainer and callbacks made from them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerFast

from finetune.config.schema import Config
from finetune.data.prepare import Prepared
from finetune.machine.device import capacity_gib, memory_errors_explained, peak_memory_gib, prepare_device
from finetune.machine.platforms import PLATFORMS, Platform
from finetune.model import load
from finetune.model.lora import install_fused
from finetune.plan.fit import what_would_fit
from finetune.plan.memory import checkpointed_layers
from finetune.plan.model_shape import Geometry, read_geometry
from finetune.plan.schedule import Pace, seconds_since_start
from finetune.runs.copies import Copies, target_of
from finetune.runs.folder import Run
from finetune.terminal import Terminal
from finetune.training.arguments import training_arguments
from finetune.training.keeper import Copier, Keeper
from finetune.training.progress import Progress
from finetune.training.samples import Sampler, make_questions
from finetune.training.stopper import Stopper, TimeBudget
from finetune.training.trackers import Trackers
from finetune.training.trainer import Examples, Trainer, Watchers, evaluates_first, make_trainer
from finetune.wording import SILENT, Report


@dataclass(frozen=True)
class Job:
    """Everything that one training needs; `report` receives the progress of long work before its first step."""

    run: Run
    config: Config
    prepared: Prepared
    model: PeftModel
    tokenizer: PreTrainedTokenizerFast
    report: Report = SILENT

    @property
    def platform(self) -> Platform:
        """The platform it runs on."""
        return PLATFORMS[self.config.platform]

    @property
    def geometry(self) -> Geometry:
        """The base model's shape."""
        return read_geometry(self.config)

    def examples(self) -> Examples:
        """Return all rows, the training rows packed."""
        prepared = self.prepared
        rows, held_out = prepared.train.dataset(prepared.sequences), prepared.validation.dataset(None)
        return Examples(rows, held_out)

    def memory_explained(self) -> AbstractContextManager[None]:
        """Turn a memory error in the block into OutOfResource with the smallest change that fits.

        It does not suggest more checkpointed layers, which the run has already tried.
        """
        return _memory_explained(self.config.changed("training", checkpointed_layers="all"))

    def trainer(self, checkpoint: Path | None, trackers: Trackers) -> Trainer:
        """Return a trainer that starts at `checkpoint` or from scratch; the config must have no `auto` left.

        Raises CheckFailed if a fused path cannot be compiled.
        """
        first, layers = evaluates_first(checkpoint), checkpointed_layers(self.config, self.geometry)
        arguments = training_arguments(self.config.training, self.run, self.platform, first)
        install_fused(self.model, self.config.training)
        made = make_trainer(self.model, self.tokenizer, self.examples(), arguments, layers)
        for tracker in trackers.all():
            made.add_callback(tracker)
        return made

    def copies(self, terminal: Terminal) -> Copies | None:
        """Return what copies the run off this machine; None if the config wants no copy."""
        target, output = target_of(self.config.output), self.config.output
        return None if target is None else Copies(self.run, target, output.copy_checkpoints, terminal.report())

    def watchers(
        self, facts: dict[str, Any], pace: Pace, trackers: Sequence[Any], copies: Copies | None, terminal: Terminal
    ) -> Watchers:
        """Return the callbacks, with time budget, prompts and prices from the config.

        `facts` go into each seal; `pace` is from the rehearsal.
        """
        training, tracking = self.config.training, self.config.tracking
        hours = training.time_budget_hours
        budget = None if hours is None else TimeBudget(hours, pace, seconds_since_start)
        keeper = Keeper(self.run, facts, training.save_total_limit, training.save_minutes)
        stopper = Stopper(self.run, budget)
        questions = make_questions(self.config, self.prepared)
        sampler = Sampler(questions, keeper, stopper.signalled, terminal, trackers)
        progress = Progress(terminal, pace, tracking.cost_per_hour, partial(peak_memory_gib, self.platform))
        return Watchers(keeper, stopper, progress, sampler, None if copies is None else Copier(copies, keeper))


def load_job(run: Run, config: Config, prepared: Prepared, report: Report = SILENT) -> Job:
    """Load base and tokenizer.

    Raises OutOfResource with the smallest change that fits, and CheckFailed.
    """
    platform = PLATFORMS[config.platform]
    prepare_device(platform)
    with _memory_explained(config):
        model = load.load_model(config, platform.device, report)
    tokenizer = load.make_tokenizer(prepared.chat, config.dataset.padding_side)
    return Job(run, config, prepared, model, tokenizer, report)


def _memory_explained(config: Config) -> AbstractContextManager[None]:
    capacity = capacity_gib(PLATFORMS[config.platform])
    return memory_errors_explained(what_would_fit(config, read_geometry(config), capacity))
