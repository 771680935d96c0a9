"""How long a run takes at measured speeds, and whether its time budget is enough."""

from __future__ import annotations

import dataclasses
import math
import time
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from finetune.errors import OutOfResource
from finetune.wording import duration

if TYPE_CHECKING:
    from finetune.config.schema import TrainingConfig

# Measurements vary a little, and the next start must not refuse what this one suggested.
MARGIN = 1.05


def seconds_since_start() -> float:
    """Wall time since this process started, including imports and loading."""
    return max(0.0, time.time() - psutil.Process().create_time())


@dataclass(frozen=True)
class Pace:
    """Seconds per step, per evaluation over all validation rows, and per save; 0 if not measured."""

    step: float = 0.0
    evaluation: float = 0.0
    save: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """The rest of a run of `steps` optimizer steps, `done` of them done.

    It evaluates before the first step; it evaluates and saves at multiples of `eval_steps` and `save_steps`, and at the
    last step.
    """

    done: int
    steps: int
    steps_per_epoch: int
    eval_steps: int
    save_steps: int

    def seconds(self, pace: Pace, step: int) -> float:
        """Time from now until `step` is done, evaluated if due, and saved."""
        evaluations = step // self.eval_steps - self.done // self.eval_steps + (self.done == 0)
        evaluations += step == self.steps and step % self.eval_steps > 0
        saves = step // self.save_steps - self.done // self.save_steps + (step % self.save_steps > 0)
        return (step - self.done) * pace.step + evaluations * pace.evaluation + saves * pace.save

    def reach(self, pace: Pace, seconds: float) -> int:
        """The last step that is done and saved within `seconds`, or `done`."""
        after = range(self.done + 1, self.steps + 1)
        return self.done + bisect_right(after, seconds, key=lambda step: self.seconds(pace, step))

    def longest(self, pace: Pace, seconds: float) -> int:
        """The most steps a run can have to finish within `seconds`, including its last evaluation."""

        def needed(steps: int) -> float:
            return dataclasses.replace(self, steps=steps).seconds(pace, steps)

        return bisect_right(range(1, self.steps + 1), seconds, key=needed)


def check_budget(training: TrainingConfig, schedule: Schedule, pace: Pace, elapsed: float) -> str | None:
    """None if the rest of the run fits into the time budget, or there is none; else how far a partial run gets.

    `elapsed`: seconds of the budget used so far. Raises OutOfResource with what would fit, if the run does not and a
    partial run is not allowed (time_budget_partial) or not possible.
    """
    if training.time_budget_hours is None:
        return None
    left = 3600 * training.time_budget_hours - elapsed
    if schedule.seconds(pace, schedule.steps) <= left:
        return None
    last = schedule.reach(pace, left)
    if training.time_budget_partial and last > schedule.done:
        return f"enough until about step {last:,} of {schedule.steps:,}; the same command then resumes from there"
    choices = _advice(training, schedule, pace, elapsed)
    raise OutOfResource(_found(training, schedule, pace, left), "\n  ".join(choices), between="\n  ")


def _found(training: TrainingConfig, schedule: Schedule, pace: Pace, left: float) -> str:
    needed = duration(schedule.seconds(pace, schedule.steps))
    over = f"{duration(left)} left" if left > 0 else "nothing left"
    steps = f"steps {schedule.done + 1:,} to {schedule.steps:,} take {needed}"
    return (
        f"time budget: {steps}, training.time_budget_hours {training.time_budget_hours:g} has {over}; what would fit:"
    )


def _advice(training: TrainingConfig, schedule: Schedule, pace: Pace, elapsed: float) -> list[str]:
    """Settings that would each fit, one per line."""
    assert training.time_budget_hours is not None
    hours = (MARGIN * schedule.seconds(pace, schedule.steps) + elapsed) / 3600
    lines = [f"--set training.time_budget_hours={_rounded_up(hours):g}"]
    left = 3600 * training.time_budget_hours - elapsed
    steps = schedule.longest(pace, left / MARGIN)
    if schedule.done == 0 and steps > 0:  # a started run keeps its length, since the learning rate depends on it
        lines += _shorter(training, steps, schedule.steps_per_epoch)
    last = schedule.reach(pace, left / MARGIN)
    if last > schedule.done:
        stop = f"stops at about step {last:,}; the same command then resumes from there"
        lines.append(f"--set training.time_budget_partial=true  ({stop})")
    return lines


def _shorter(training: TrainingConfig, steps: int, steps_per_epoch: int) -> list[str]:
    if training.max_steps > 0:
        return [f"--set training.max_steps={steps}"]
    hundredths = 100 * steps // steps_per_epoch
    while math.ceil(hundredths / 100 * steps_per_epoch) > steps:  # as the steps are counted, with the same rounding
        hundredths -= 1
    return [f"--set training.num_train_epochs={hundredths / 100:g}"] if hundredths else []


def _rounded_up(hours: float) -> float:
    """To two digits."""
    unit = 10.0 ** (math.floor(math.log10(hours)) - 1)
    return math.ceil(hours / unit) * unit
