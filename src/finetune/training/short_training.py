"""A short training on the largest batches: measures time and memory, and that its checkpoint loads back."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import recursively_apply
from peft import PeftModel
from transformers import TrainerCallback
from trl import SFTConfig

from finetune.config.schema import Config
from finetune.data.batches import Load, example_lengths
from finetune.errors import CheckFailed, DiskFull, Diverged, OutOfResource
from finetune.files import read_seal, seal
from finetune.machine.device import (
    forget_memory,
    memory_errors_explained,
    paged_gib,
    peak_held_gib,
    peak_memory_gib,
    synchronize,
)
from finetune.machine.platforms import Platform
from finetune.model.lora import install_fused
from finetune.plan.memory import checkpointed_layers
from finetune.training.arguments import training_arguments
from finetune.training.job import Job
from finetune.training.restore import put_back
from finetune.training.trainer import Examples, Trainer, make_trainer

STEPS = 2  # the first warms up allocator and kernels and creates the optimizer state; the second is measured


class MemoryEnds(Exception):
    """Out of memory; `peak_gib` if it is known."""

    def __init__(self, found: str, peak_gib: float | None) -> None:
        self.found, self.peak_gib = found, peak_gib
        super().__init__(found)


@contextmanager
def _memory_ends() -> Iterator[None]:
    """Turn a memory error of device or host into MemoryEnds."""
    try:
        with memory_errors_explained(""):
            yield
    except DiskFull:
        raise
    except OutOfResource as error:
        raise MemoryEnds(error.found, None) from None
    except MemoryError:
        raise MemoryEnds("out of memory", None) from None


def zero_gradients(model: PeftModel) -> None:
    """Allocate a zero gradient for each trainable weight, as an earlier micro-batch would have."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


class Stopwatch(TrainerCallback):  # type: ignore[misc]
    """Times the last step, its evaluation and its save; seals the checkpoint and keeps its contents to compare.

    With `accumulated`, gradients are allocated before a step begins, as for every micro-batch but a step's first.
    """

    def __init__(self, platform: Platform, checkpoints: Path, accumulated: bool) -> None:
        self.platform, self.checkpoints, self.accumulated = platform, checkpoints, accumulated
        self.micro_batch_seconds = self.optimizer_seconds = self.evaluation_seconds = self.save_seconds = 0.0
        self.saved: Any = None
        self._last = 0.0

    def _lap(self) -> float:
        synchronize(self.platform)
        before, self._last = self._last, time.monotonic()
        return self._last - before

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.accumulated:
            zero_gradients(kwargs["model"])
        self._lap()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.micro_batch_seconds = self._lap()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.optimizer_seconds = self._lap()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluation_seconds = self._lap()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seal(self.checkpoints / f"checkpoint-{state.global_step}", {"step": state.global_step})
        self.save_seconds = self._lap()
        trained = _trained(kwargs["model"], kwargs["optimizer"], kwargs["lr_scheduler"])
        self.saved = recursively_apply(lambda tensor: tensor.detach().to("cpu", copy=True), trained)


@dataclass(frozen=True)
class Trial:
    """The result of one training of a rehearsal.

    `before_gib` is the earlier peak if the platform cannot reset it, `held_gib` the peak that the driver saw. Both
    include `paged_gib` of optimizer state, which stays unused in unified memory until the process ends.
    """

    watch: Stopwatch
    before_gib: float
    peak_gib: float
    held_gib: float
    paged_gib: float

    def within(self, capacity_gib: float) -> Trial:
        """Return self. Raises MemoryEnds if the peak exceeds the capacity."""
        if (
            self.peak_gib > capacity_gib and self.peak_gib > self.before_gib
        ):  # the loading of the model may have had a higher peak
            raise MemoryEnds(f"peak {self.peak_gib:.1f} GiB", self.peak_gib)
        return self


@dataclass(frozen=True)
class Stage:
    """Everything that the trainers of a rehearsal need."""

    job: Job
    load: Load
    held_out: Load
    capacity_gib: float

    @property
    def config(self) -> Config:
        """The config being tried, with `auto` replaced."""
        return self.job.config

    @property
    def layers(self) -> int:
        """The number of checkpointed layers."""
        return checkpointed_layers(self.config, self.job.geometry)

    @property
    def tokens(self) -> int:
        """The tokens of the largest micro-batch, without padding."""
        return int(example_lengths(self.job.prepared)[self.load.worst].sum())

    def of(self, config: Config) -> Stage:
        """Return the same stage with another config."""
        return dataclasses.replace(self, job=dataclasses.replace(self.job, config=config))

    def train(self) -> Trial:
        """Train, evaluate and save. Raises MemoryEnds."""
        platform, training = self.job.platform, self.config.training
        forget_memory(platform)  # the memory used for loading does not count
        before = peak_memory_gib(platform)
        watch = Stopwatch(platform, self.job.run.checkpoints, training.gradient_accumulation_steps > 1)
        with self.putting_back():
            trainer = self.trainer(STEPS)
            trainer.add_callback(watch)
            trainer.train()
            return Trial(watch, before, peak_memory_gib(platform), peak_held_gib(platform), paged_gib(platform))

    @contextmanager
    def putting_back(self) -> Iterator[None]:
        """Let the block train, then restore the model. Raises MemoryEnds, and Diverged and DiskFull with a prefix."""
        with put_back(self.job.model, self.job.platform):
            try:
                with _memory_ends():
                    yield
            except (Diverged, DiskFull) as error:
                raise type(error)(f"rehearsal: {error.found}", error.fix) from None

    def load_back(self, watch: Stopwatch) -> None:
        """Resume from the checkpoint and compare the trainer's state with what was saved."""
        folder = self.job.run.checkpoints / f"checkpoint-{STEPS}"
        with self.putting_back():
            try:
                read_seal(folder)
            except (ValueError, OSError) as error:
                raise CheckFailed(
                    f"rehearsal: a checkpoint saved in {self.job.run.folder.parent} is damaged: {error}"
                ) from None
            trainer = self.trainer(STEPS)
            trainer.train(resume_from_checkpoint=str(folder))
            loaded = _trained(trainer.model, trainer.optimizer, trainer.lr_scheduler)
            wrong = next((name for name, saved in watch.saved.items() if not _equal(saved, loaded[name])), None)
        if wrong:
            raise CheckFailed(f"rehearsal: a checkpoint does not load back as it was saved: {wrong} differ")

    def trainer(self, steps: int) -> Trainer:
        """Return the run's trainer for the largest batches and `steps` steps of one micro-batch each."""
        rows = self.job.examples()
        worst = rows.train.select(self.load.worst * steps), rows.validation.select(self.held_out.worst)
        install_fused(self.job.model, self.config.training)
        examples = Examples(*worst)
        return make_trainer(self.job.model, self.job.tokenizer, examples, self._arguments(steps), self.layers)

    def _arguments(self, steps: int) -> SFTConfig:
        trial = self.config.changed(
            "training",
            max_steps=steps,
            per_device_train_batch_size=len(self.load.worst),
            gradient_accumulation_steps=1,
            logging_steps=steps,
            eval_steps=steps,
            save_steps=steps,
        )
        sft = training_arguments(trial.training, self.job.run, self.job.platform, evaluate_first=False)
        sft.train_sampling_strategy = "sequential"
        return sft


def _trained(model: PeftModel, optimizer: Any, scheduler: Any) -> dict[str, Any]:
    """Return what a checkpoint must restore, by the name used in messages."""
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {
        "the adapter's weights": weights,
        "the optimizer's states": optimizer.state_dict(),
        "the learning rate's states": scheduler.state_dict(),
    }


def _equal(these: Any, those: Any) -> bool:
    if isinstance(these, torch.Tensor):
        return torch.equal(these, those.detach().to(these.device))
    if isinstance(these, dict):
        return these.keys() == those.keys() and all(_equal(these[name], those[name]) for name in these)
    if isinstance(these, list):
        return len(these) == len(those) and all(map(_equal, these, those))
    return bool(these == those)
