"""Trains the largest batches before a run: whether it fits, how fast it is, whether a checkpoint loads back."""

from __future__ import annotations

import dataclasses
import gc
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from finetune.config.schema import Config
from finetune.data.batches import example_lengths, train_load, validation_load
from finetune.errors import OutOfResource
from finetune.files import make_folder
from finetune.machine.device import capacity_gib
from finetune.machine.platforms import AUTO_SHARE, PLATFORMS, lays_flat
from finetune.plan.automatic import FUSED, PLAIN, in_words, left_open, settled, used
from finetune.plan.checkpointed_layers import Choice, by_formula, by_trials
from finetune.plan.describe import cost_text
from finetune.plan.fit import what_would_fit
from finetune.plan.model_shape import Geometry, read_geometry
from finetune.plan.plan import count_steps
from finetune.plan.schedule import Pace, Schedule, check_budget, seconds_since_start
from finetune.runs.folder import Run
from finetune.runs.resume import Decision
from finetune.terminal import Terminal
from finetune.training.autotune import Variant, choose, tried, variant
from finetune.training.job import Job
from finetune.training.short_training import MemoryEnds, Stage, Trial
from finetune.training.trainer import is_over
from finetune.wording import clock, counted, duration


@dataclass(frozen=True)
class Rehearsal:
    """The measurements, and what they mean for the remaining steps.

    `peak_gib` includes the paged optimizer state; `left_gib` is that state of all trials, which stays until the process
    ends (see `put_back`) and is not part of the run's peak. `pace` is for steps with the run's average tokens.
    `tokens_per_second` excludes padding, evaluations and saves. `checkpointed` is the number of layers used for all
    measurements, `config` the config without `auto`, `variants` everything that was tried.
    """

    peak_gib: float
    left_gib: float
    capacity_gib: float
    pace: Pace
    tokens_per_second: float
    schedule: Schedule
    checkpointed: Choice
    config: Config
    variants: tuple[Variant, ...]

    @property
    def hours(self) -> float:
        """The hours of the remaining steps, with their evaluations and saves."""
        return self.schedule.seconds(self.pace, self.schedule.steps) / 3600

    def as_dict(self) -> dict[str, Any]:
        """Return the manifest's entry: GiB, hours of the remaining steps, tokens/s of steps alone, variants."""
        return {
            "peak_memory_gib": round(self.peak_gib, 3),
            "left_gib": round(self.left_gib, 3),
            "capacity_gib": round(self.capacity_gib, 3),
            "hours": round(self.hours, 4),
            "tokens_per_second": round(self.tokens_per_second, 1),
            "variants": [asdict(variant) for variant in self.variants],
        }

    def sentence(self, now: datetime) -> str:
        """Return the summary for the terminal; `now` is local time with its zone."""
        end, step = now + timedelta(hours=self.hours), self.pace.step
        memory = f"peak {self.peak_gib:.1f} of {self.capacity_gib:.1f} GiB"
        speed = f"{step:.1f} s a step" if step >= 1 else f"{step:.2g} s a step"
        steps = self.schedule.steps - self.schedule.done
        took = f"{duration(3600 * self.hours)} for {counted(steps, 'step')}"
        return f"{memory}, {speed}, {took}, finished about {clock(end, now)}"


@dataclass(frozen=True)
class Outlook:
    """What is known before the first step: durations, what replaces `auto`, and the measurements.

    `over`: no steps remain. Then, and if the rehearsal was skipped, nothing was measured.
    """

    pace: Pace
    job: Job
    rehearsal: Rehearsal | None = None
    over: bool = False

    @property
    def used(self) -> dict[str, Any]:
        """The values for manifest and checkpoints; a run without remaining steps checkpoints no layers."""
        found = used(self.job.config, self.job.geometry)
        return found | {"checkpointed_layers": None} if self.over else found

    @property
    def measured(self) -> dict[str, Any] | None:
        """The manifest's entry."""
        return None if self.rehearsal is None else self.rehearsal.as_dict()


def look_ahead(job: Job, decision: Decision, steps: int, left_out: bool, terminal: Terminal) -> Outlook:
    """Rehearse the steps that remain after `decision`, of `steps` in total, unless `left_out`; print the result."""
    capacity, before = capacity_gib(job.platform), decision.used
    if before and left_open(job.config):
        terminal.decision("fused paths", f"{in_words(before)}, as before in this run")
    over = decision.checkpoint is not None and is_over(job.config.training, steps, decision.checkpoint)
    if over or left_out:
        config = _unrehearsed(settled(job.config, before or {}), job.geometry, capacity, None if over else terminal)
        return Outlook(Pace(), dataclasses.replace(job, config=config), None, over)
    terminal.phase("rehearsing the largest batches")
    found = rehearse(job, job.run.folder / "rehearsal", capacity, decision.step, decision.used)
    _say(found, terminal)
    return Outlook(found.pace, dataclasses.replace(job, config=found.config), found)


def _unrehearsed(config: Config, geometry: Geometry, capacity_gib: float, terminal: Terminal | None) -> Config:
    """Replace `auto` by the formula's layers and nothing fused; say so on `terminal`, if given."""
    why = "the rehearsal is skipped"
    choice = by_formula(config, geometry, capacity_gib, why)
    if terminal and left_open(config):
        terminal.decision("fused paths", "none; the rehearsal, which would try them, is skipped")
    if terminal and choice.reason:
        terminal.decision("checkpointed layers", choice.reason)
    return settled(config, {**PLAIN, "checkpointed_layers": choice.layers})


def _say(found: Rehearsal, terminal: Terminal) -> None:
    """Print the result with cost and time budget. Raises OutOfResource if the budget is not enough."""
    config = found.config
    if len(found.variants) > 1:
        terminal.table("speed and memory, on the largest batch", [variant.row() for variant in found.variants])
    if found.checkpointed.reason:
        terminal.decision("checkpointed layers", found.checkpointed.reason)
    terminal.decision("rehearsal", found.sentence(datetime.now().astimezone()))
    price = config.tracking.cost_per_hour
    if price is not None:
        terminal.decision("cost", cost_text(found.hours * price, price))
    budget = check_budget(config.training, found.schedule, found.pace, seconds_since_start())
    if budget:
        terminal.decision("time budget", budget)


def rehearse(
    job: Job, folder: Path, capacity_gib: float, done: int = 0, before: dict[str, Any] | None = None
) -> Rehearsal:
    """Train the largest batches, evaluate, save and load in `folder`, then delete it and restore the model.

    After `done` steps, made with `before` in place of `auto`, the same values are kept as far as memory allows; else
    the choices for `auto` are tried. Raises OutOfResource if memory or disk is not enough, CheckFailed if a checkpoint
    cannot be saved or does not load back unchanged, and Diverged.
    """
    config, prepared = job.config, job.prepared
    lengths = example_lengths(prepared)
    flat = prepared.sequences is not None and lays_flat(config.model.attn_implementation)
    load = train_load(lengths, config.training.per_device_train_batch_size, flat)
    held_out = validation_load(prepared.validation.lengths, config.training.per_device_eval_batch_size)
    stage = Stage(dataclasses.replace(job, run=Run(folder, False, None)), load, held_out, capacity_gib)
    shutil.rmtree(folder, ignore_errors=True)  # a killed rehearsal may have left one
    make_folder(folder)
    try:
        with _advice_where_memory_ends(config, capacity_gib):
            tuned, variants = choose(stage.of(settled(config, {key: before[key] for key in FUSED} if before else {})))
            trials = Trials(stage.of(tuned))
            choice = _settle(trials, before["checkpointed_layers"] if before else None)
            job.report.progress("rehearsing a resume from its checkpoint")
            trials.stage.load_back(trials.last.watch)
    finally:
        shutil.rmtree(folder, ignore_errors=True)

    trial = trials.made[choice.layers]
    watch = trial.watch
    steps_per_epoch, steps = count_steps(config, len(lengths))
    step_seconds = watch.micro_batch_seconds / load.worst_tokens * load.tokens / steps_per_epoch
    step_seconds += watch.optimizer_seconds
    evaluation_seconds = watch.evaluation_seconds / held_out.worst_tokens * held_out.tokens
    return Rehearsal(
        peak_gib=trial.peak_gib,
        left_gib=sum(tried.paged_gib for tried in trials.made.values()),
        capacity_gib=capacity_gib,
        pace=Pace(step_seconds, evaluation_seconds, watch.save_seconds),
        tokens_per_second=float(lengths.sum()) / steps_per_epoch / step_seconds,
        schedule=Schedule(done, steps, steps_per_epoch, config.training.eval_steps, config.training.save_steps),
        checkpointed=choice,
        config=settled(tuned, {"checkpointed_layers": choice.layers}),
        variants=tuple(_table(variants, trials.variants(choice.layers))),
    )


class Trials:
    """Short trainings with different numbers of checkpointed layers; the last one's checkpoint is on disk."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.made = stage, dict[int, Trial]()
        self.ended: list[int] = []  # the numbers that ran out of memory

    @property
    def last(self) -> Trial:
        """The latest trial."""
        return list(self.made.values())[-1]

    def require(self, layers: int) -> Trial:
        """Train with that many layers checkpointed. Raises MemoryEnds."""
        trial = tried(self._of(layers), Stage.train)
        for earlier in self.made.values():
            earlier.watch.saved = None  # frees host memory; its checkpoint was overwritten
        self.made[layers] = trial
        return trial.within(self.stage.capacity_gib)

    def measure(self, layers: int) -> float | None:
        """Return the peak held, in GiB; None if out of memory. Raises MemoryEnds if all layers are checkpointed."""
        if layers in self.ended:
            return None
        try:
            return self.require(layers).held_gib
        except MemoryEnds:
            if layers == self.stage.job.geometry.num_hidden_layers:
                raise
        gc.collect()  # put_back's own came while the error still kept the memory
        self.ended.append(layers)
        return None

    def variants(self, chosen: int) -> list[Variant]:
        """Return the rows of the table, `chosen` last."""
        most = AUTO_SHARE * self.stage.capacity_gib
        rows = [variant(self._of(layers), None, None, "out of memory") for layers in self.ended]
        fitting = ((layers, trial) for layers, trial in self.made.items() if layers not in self.ended)
        for layers, trial in sorted(fitting, key=lambda made: made[0] == chosen):
            fits = "fits" if trial.held_gib <= most else f"more than {most:.1f} GiB"
            seconds, verdict = trial.watch.micro_batch_seconds, "used" if layers == chosen else fits
            rows.append(variant(self._of(layers), seconds, trial.peak_gib, verdict))
        return rows

    def _of(self, layers: int) -> Stage:
        return self.stage.of(settled(self.stage.config, {"checkpointed_layers": layers}))


def _settle(trials: Trials, before: int | None) -> Choice:
    """Choose how many layers to checkpoint: `before` if it fits, else as few as possible."""
    config, geometry, capacity = trials.stage.config, trials.stage.job.geometry, trials.stage.capacity_gib
    total = geometry.num_hidden_layers
    found = by_formula(config, geometry, capacity, "the resident peak of a process cannot be measured twice")
    if found.reason is None:
        trials.require(found.layers)
        return found
    if before is not None:
        if trials.measure(before) is not None:
            return Choice(before, f"{before} of {total}, as before in this run")
        found = Choice(total)
    if PLATFORMS[config.platform].peak_begins_anew:
        found = by_trials(config, geometry, capacity, trials.measure)
    elif trials.measure(found.layers) is None:
        trials.require(total)
        found = Choice(total, f"{total} of {total}: out of memory with the {found.layers} of the formula")
    if before is not None:
        why = f"out of memory with the {before} used before; the results stay the same"
        found = Choice(found.layers, f"{found.reason or f'{total} of {total}'}; {why}")
    return found


def _table(tuned: list[Variant], with_layers: list[Variant]) -> list[Variant]:
    """Merge both lists; a row in both keeps the speed of `tuned`, which is the fastest of several passes."""
    rows = {row.name: row for row in tuned}
    for row in with_layers:
        if old := rows.get(row.name):
            row = dataclasses.replace(
                row, tokens_per_second=old.tokens_per_second, verdict=f"{old.verdict}; {row.verdict}"
            )
        rows[row.name] = row
    return list(rows.values())


@contextmanager
def _advice_where_memory_ends(config: Config, capacity_gib: float) -> Iterator[None]:
    """Turn MemoryEnds into OutOfResource with the smallest config change that would fit."""
    try:
        yield
    except MemoryEnds as end:
        advice = what_would_fit(config, read_geometry(config), capacity_gib, end.peak_gib)
        raise OutOfResource(f"rehearsal: {end.found}, and there are {capacity_gib:.1f} GiB", advice) from None
