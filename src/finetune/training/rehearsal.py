"""The worst batches through the real trainer before a run: does it fit, how fast is it, does a checkpoint load back."""

from __future__ import annotations

import dataclasses
import gc
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from finetune.config.schema import Config
from finetune.data.batches import example_lengths, train_load, validation_load
from finetune.errors import OutOfResource
from finetune.files import make_folder
from finetune.machine.device import capacity_gib
from finetune.machine.platforms import PLATFORMS, lays_flat
from finetune.plan.checkpointed_layers import Choice, by_formula, by_trials, with_layers
from finetune.plan.describe import cost_text
from finetune.plan.fit import what_would_fit
from finetune.plan.model_shape import read_geometry
from finetune.plan.plan import count_steps
from finetune.plan.schedule import Pace, Schedule, check_budget, seconds_since_start
from finetune.runs.folder import Run
from finetune.runs.resume import Decision
from finetune.terminal import Terminal
from finetune.training.job import Job
from finetune.training.short_training import MemoryEnds, Stage, Trial
from finetune.training.trainer import is_over
from finetune.wording import clock, counted, duration


@dataclass(frozen=True)
class Rehearsal:
    """What was measured, and what it means for the steps that remain.

    `peak_gib` has the paged optimizer state in it; `left_gib` is that of all trials, which stays until the process ends
    (see `put_back`) and is no part of the run's peak. `pace` is of steps with as many tokens as the run's have on
    average. `tokens_per_second` counts no padding, no evaluation and no save. `checkpointed` is the number of layers
    with which all of it was measured.
    """

    peak_gib: float
    left_gib: float
    capacity_gib: float
    pace: Pace
    tokens_per_second: float
    schedule: Schedule
    checkpointed: Choice

    @property
    def hours(self) -> float:
        """Of the steps that remain, with their evaluations and saves."""
        return self.schedule.seconds(self.pace, self.schedule.steps) / 3600

    def as_dict(self) -> dict[str, float]:
        """For the manifest: GiB, hours of the steps that remain, and tokens/s of the steps alone."""
        return {
            "peak_memory_gib": round(self.peak_gib, 3),
            "left_gib": round(self.left_gib, 3),
            "capacity_gib": round(self.capacity_gib, 3),
            "hours": round(self.hours, 4),
            "tokens_per_second": round(self.tokens_per_second, 1),
        }

    def sentence(self, now: datetime) -> str:
        """For the terminal; `now` in local time, with its zone."""
        end, step = now + timedelta(hours=self.hours), self.pace.step
        memory = f"peak {self.peak_gib:.1f} of {self.capacity_gib:.1f} GiB"
        speed = f"{step:.1f} s a step" if step >= 1 else f"{step:.2g} s a step"
        steps = self.schedule.steps - self.schedule.done
        took = f"{duration(3600 * self.hours)} for {counted(steps, 'step')}"
        return f"{memory}, {speed}, {took}, finished about {clock(end, now)}"


@dataclass(frozen=True)
class Outlook:
    """What is known before the first step: how long things take, how many layers are checkpointed, what was measured.

    `over` where no step is left to make; then, and where the rehearsal was left out, nothing was measured.
    """

    pace: Pace
    choice: Choice
    rehearsal: Rehearsal | None = None
    over: bool = False

    @property
    def layers(self) -> int | None:
        """For the manifest: after its last step a run computes no layer again."""
        return None if self.over else self.choice.layers

    @property
    def measured(self) -> dict[str, float] | None:
        """For the manifest."""
        return None if self.rehearsal is None else self.rehearsal.as_dict()


def look_ahead(job: Job, decision: Decision, steps: int, left_out: bool, terminal: Terminal) -> Outlook:
    """Rehearse the steps after `decision`, of `steps` in all, unless that is `left_out` or none remains; say it."""
    capacity = capacity_gib(job.platform)
    over = decision.checkpoint is not None and is_over(job.config.training, steps, decision.checkpoint)
    if over or left_out:
        choice = by_formula(job.config, job.geometry, capacity, "the rehearsal is left out")
        if choice.reason and not over:
            terminal.decision("checkpointed layers", choice.reason)
        return Outlook(Pace(), choice, None, over)
    terminal.status("rehearsing the largest batches")
    found = rehearse(job, job.run.folder / "rehearsal", capacity, decision.step)
    _say(found, job.config, terminal)
    return Outlook(found.pace, found.checkpointed, found)


def _say(found: Rehearsal, config: Config, terminal: Terminal) -> None:
    """With cost and time budget. Raises OutOfResource where that is not enough."""
    if found.checkpointed.reason:
        terminal.decision("checkpointed layers", found.checkpointed.reason)
    terminal.decision("rehearsal", found.sentence(datetime.now().astimezone()))
    price = config.tracking.cost_per_hour
    if price is not None:
        terminal.decision("cost", cost_text(found.hours * price, price))
    budget = check_budget(config.training, found.schedule, found.pace, seconds_since_start())
    if budget:
        terminal.decision("time budget", budget)


def rehearse(job: Job, folder: Path, capacity_gib: float, done: int = 0) -> Rehearsal:
    """Train the heaviest batches, evaluate, save and load, in `folder`, which is gone afterwards; put all back.

    `done` steps of the run are behind it. Where `training.checkpointed_layers` is auto, several numbers of layers are
    tried. Raises OutOfResource where memory or disk is not enough, CheckFailed where a checkpoint cannot be saved or
    does not load back as it was saved, and Diverged.
    """
    config, prepared = job.config, job.prepared
    lengths = example_lengths(prepared)
    flat = prepared.sequences is not None and lays_flat(config.model.attn_implementation)
    load = train_load(lengths, config.training.per_device_train_batch_size, flat)
    held_out = validation_load(prepared.validation.lengths, config.training.per_device_eval_batch_size)
    stage = Stage(dataclasses.replace(job, run=Run(folder, False, None)), load, held_out, capacity_gib)
    shutil.rmtree(folder, ignore_errors=True)  # a killed rehearsal may have left it
    make_folder(folder)
    try:
        with _advice_where_memory_ends(config, capacity_gib):
            trials, choice = _settle(stage)
            stage.load_back(list(trials.values())[-1].watch)
    finally:
        shutil.rmtree(folder, ignore_errors=True)

    trial = trials[choice.layers]
    watch = trial.watch
    steps_per_epoch, steps = count_steps(config, len(lengths))
    step_seconds = watch.micro_batch_seconds / load.worst_tokens * load.tokens / steps_per_epoch
    step_seconds += watch.optimizer_seconds
    evaluation_seconds = watch.evaluation_seconds / held_out.worst_tokens * held_out.tokens
    return Rehearsal(
        peak_gib=trial.peak_gib,
        left_gib=sum(tried.paged_gib for tried in trials.values()),
        capacity_gib=capacity_gib,
        pace=Pace(step_seconds, evaluation_seconds, watch.save_seconds),
        tokens_per_second=float(lengths.sum()) / steps_per_epoch / step_seconds,
        schedule=Schedule(done, steps, steps_per_epoch, config.training.eval_steps, config.training.save_steps),
        checkpointed=choice,
    )


def _settle(stage: Stage) -> tuple[dict[int, Trial], Choice]:
    """The trials by their number of checkpointed layers, and the choice, which is one of them.

    The last one's checkpoint is on the disk. Raises MemoryEnds.
    """
    config, capacity, geometry = stage.config, stage.capacity_gib, stage.job.geometry
    total = geometry.num_hidden_layers
    found = by_formula(config, geometry, capacity, "the resident peak of a process cannot be measured twice")
    if found.reason is None:
        return {found.layers: stage.train().within(capacity)}, found
    trials: dict[int, Trial] = {}

    def measure(layers: int) -> float | None:
        try:
            tried = dataclasses.replace(stage.job, config=with_layers(config, layers))
            trial = dataclasses.replace(stage, job=tried).train()
            for earlier in trials.values():
                earlier.watch.saved = None  # an adapter and its moments, in host memory; another is on the disk now
            trials[layers] = trial
            return trial.within(capacity).held_gib
        except MemoryEnds:
            if layers == total:
                raise
        gc.collect()  # put_back's own came while the error still held all that had filled the memory
        return None

    if PLATFORMS[config.platform].peak_begins_anew:
        found = by_trials(config, geometry, capacity, measure)
    elif measure(found.layers) is None:
        measure(total)
        found = Choice(total, f"{total} of {total}: out of memory with the {found.layers} of the formula")
    return trials, found


@contextmanager
def _advice_where_memory_ends(config: Config, capacity_gib: float) -> Iterator[None]:
    """Raise OutOfResource with the smallest change of the config that would fit."""
    try:
        yield
    except MemoryEnds as end:
        advice = what_would_fit(config, read_geometry(config), capacity_gib, end.peak_gib)
        raise OutOfResource(f"rehearsal: {end.found}, and there are {capacity_gib:.1f} GiB", advice) from None
