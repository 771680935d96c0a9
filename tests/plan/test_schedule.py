"""The time budget: what a schedule takes, what is refused and what would fit, and a run that stops in time."""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl

import train as program
from finetune.config.load import load_config
from finetune.config.schema import TrainingConfig
from finetune.errors import ConfigError, OutOfResource, UserError
from finetune.plan.schedule import MARGIN, Pace, Schedule, check_budget, seconds_since_start
from finetune.runs.folder import Run
from finetune.training import job, rehearsal
from finetune.training.stopper import Stopper, TimeBudget
from finetune.wording import duration

PACE = Pace(step=10.0, evaluation=60.0, save=5.0)


def training(*settings: str) -> TrainingConfig:
    return load_config("h100", [f"training.{setting}" for setting in settings])[0].training


# --- what a schedule takes


def walked(schedule: Schedule, last: int) -> float:
    """The same seconds, step by step."""
    seconds = PACE.evaluation * (schedule.done == 0)
    for step in range(schedule.done + 1, last + 1):
        evaluated = step % schedule.eval_steps == 0 or step == schedule.steps
        saved = step % schedule.save_steps == 0 or step == last
        seconds += PACE.step + evaluated * PACE.evaluation + saved * PACE.save
    return seconds


SCHEDULES = [
    Schedule(done, steps, 10, eval_steps, save_steps)
    for done in (0, 3, 10, 20)
    for steps in (21, 30)
    for eval_steps, save_steps in ((1, 1), (5, 10), (7, 14), (100, 100))
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_the_seconds_of_a_schedule_are_those_of_its_steps_evaluations_and_saves(schedule: Schedule) -> None:
    for last in range(schedule.done + 1, schedule.steps + 1):
        assert schedule.seconds(PACE, last) == walked(schedule, last)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_reach_is_the_last_step_that_is_saved_in_time(schedule: Schedule) -> None:
    for seconds in range(0, 2500, 7):
        steps = range(schedule.done + 1, schedule.steps + 1)
        wanted = max((step for step in steps if walked(schedule, step) <= seconds), default=schedule.done)
        assert schedule.reach(PACE, seconds) == wanted


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (99.4, "99 s"), (100, "2 min"), (5990, "100 min"), (6000, "1.7 h")]
)
def test_a_duration_is_told_in_the_unit_that_suits_it(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_time_since_the_start_of_this_process_counts_its_imports() -> None:
    first = seconds_since_start()
    time.sleep(0.01)
    assert 0 < first < seconds_since_start()


# --- before the first step


def refusal(configured: TrainingConfig, schedule: Schedule, elapsed: float) -> str:
    with pytest.raises(OutOfResource) as refused:
        check_budget(configured, schedule, PACE, elapsed)
    assert refused.value.exit_code == 6
    return str(refused.value)


LONG = Schedule(done=0, steps=1000, steps_per_epoch=400, eval_steps=100, save_steps=500)  # takes 10,670 s


def test_a_run_that_cannot_end_in_time_is_refused_with_all_that_would_fit() -> None:
    configured = training("time_budget_hours=2", "num_train_epochs=2.5")
    assert refusal(configured, LONG, 600) == (
        "time budget: steps 1 to 1,000 take 3.0 h, training.time_budget_hours 2 has 1.8 h left; what would fit:\n"
        "  --set training.time_budget_hours=3.3\n"
        "  --set training.num_train_epochs=1.46\n"
        "  --set training.time_budget_partial=true  (stops at about step 591; the same command then resumes from there)"
    )


def test_a_run_of_so_many_steps_is_told_how_many_would_fit() -> None:
    configured = training("time_budget_hours=2", "max_steps=1000")
    assert refusal(configured, LONG, 600) == (
        "time budget: steps 1 to 1,000 take 3.0 h, training.time_budget_hours 2 has 1.8 h left; what would fit:\n"
        "  --set training.time_budget_hours=3.3\n"
        "  --set training.max_steps=585\n"
        "  --set training.time_budget_partial=true  (stops at about step 591; the same command then resumes from there)"
    )


def test_a_run_that_goes_on_is_not_told_to_be_shorter_since_that_would_be_another_run() -> None:
    schedule = Schedule(done=500, steps=1000, steps_per_epoch=400, eval_steps=100, save_steps=500)
    assert refusal(training("time_budget_hours=1"), schedule, 60) == (
        "time budget: steps 501 to 1,000 take 88 min, training.time_budget_hours 1 has 59 min left; what would fit:\n"
        "  --set training.time_budget_hours=1.6\n"
        "  --set training.time_budget_partial=true  (stops at about step 818; the same command then resumes from there)"
    )


@pytest.mark.parametrize("partial", ["true", "false"])
def test_a_budget_that_is_over_before_the_first_step_is_refused_in_either_case(partial: str) -> None:
    configured = training("time_budget_hours=0.01", f"time_budget_partial={partial}")
    assert refusal(configured, LONG, 40) == (
        "time budget: steps 1 to 1,000 take 3.0 h, training.time_budget_hours 0.01 has nothing left; what would fit:\n"
        "  --set training.time_budget_hours=3.2"
    )


def test_a_part_of_a_run_starts_and_says_how_far_it_comes() -> None:
    configured = training("time_budget_hours=2", "time_budget_partial=true")
    said = "enough until about step 617 of 1,000; the same command then resumes from there"
    assert check_budget(configured, LONG, PACE, 600) == said


@pytest.mark.parametrize("hours", ["null", "3.1"])
def test_a_run_that_fits_and_one_without_a_budget_start_without_a_word(hours: str) -> None:
    assert check_budget(training(f"time_budget_hours={hours}"), LONG, PACE, 480) is None


@pytest.mark.parametrize("steps_per_epoch", [7, 100, 333])
@pytest.mark.parametrize("hours", [0.1, 0.5, 1.3])
def test_what_is_advised_fits_also_where_the_next_measurement_is_a_little_slower(
    steps_per_epoch: int, hours: float
) -> None:
    schedule = Schedule(0, 1000, steps_per_epoch, 100, 500)
    configured = training(f"time_budget_hours={hours}")
    slower = Pace(*(0.999 * MARGIN * seconds for seconds in (PACE.step, PACE.evaluation, PACE.save)))
    advised = re.findall(r"--set training\.(\S+)", refusal(configured, schedule, 60))
    keys = [setting.split("=")[0] for setting in advised]
    assert keys in (
        ["time_budget_hours", "num_train_epochs", "time_budget_partial"],
        ["time_budget_hours", "time_budget_partial"],
    )
    for setting in advised:
        again = training(f"time_budget_hours={hours}", setting)
        epochs = float(setting.split("=")[1]) if setting.startswith("num_train_epochs") else None
        steps = 1000 if epochs is None else int(-(-epochs * steps_per_epoch // 1))
        partial = check_budget(again, Schedule(0, steps, steps_per_epoch, 100, 500), slower, 60)
        assert (partial is None) == (not setting.startswith("time_budget_partial"))


def test_epochs_are_advised_as_they_will_be_counted_rounding_errors_and_all() -> None:
    schedule = Schedule(0, 1000, 100, 100, 500)
    assert math.ceil(0.07 * 100) == 8
    with pytest.raises(OutOfResource) as refused:  # 7 steps fit
        check_budget(training("time_budget_hours=0.021"), schedule, Pace(step=10.0), 0)
    assert "  --set training.num_train_epochs=0.06" in str(refused.value).splitlines()


def test_a_partial_run_without_a_budget_is_a_config_problem() -> None:
    setting = "training.time_budget_partial=true"
    with pytest.raises(ConfigError) as refused:
        load_config("h100", [setting])
    text = "true has no effect without training.time_budget_hours; set those hours, or this to false"
    assert str(refused.value) == f"config: 1 problem\n  --set {setting}  training.time_budget_partial: {text}"


# --- during the run


class Clock:
    """Seconds since the process started, moved on by hand."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def simulated(budget: TimeBudget, clock: Clock, schedule: Schedule, slow: Callable[[int], float]) -> tuple[int, float]:
    """(last step, seconds at its end) of a run whose step n takes 10 s and `slow(n)` more."""
    stopper = Stopper(Run(Path("nowhere"), False, None), budget)
    state = SimpleNamespace(
        global_step=schedule.done, max_steps=schedule.steps, eval_steps=schedule.eval_steps, save_steps=0
    )
    budget.on_train_begin(None, state, None)
    for step in range(schedule.done + 1, schedule.steps + 1):
        state.global_step = step
        clock.seconds += PACE.step + slow(step)
        control = TrainerControl()
        control.should_evaluate = step % schedule.eval_steps == 0 or step == schedule.steps
        control.should_save = step % schedule.save_steps == 0 or step == schedule.steps
        for callback in (budget, stopper):
            callback.on_step_end(None, state, control)
        if control.should_evaluate:
            clock.seconds += PACE.evaluation
            budget.on_evaluate(None, state, control)
        if control.should_save:
            clock.seconds += PACE.save
            budget.on_save(None, state, control)
        if control.should_training_stop:
            return step, clock.seconds
    return schedule.steps, clock.seconds


@pytest.mark.parametrize("done", [0, 37])
@pytest.mark.parametrize("seconds", [200, 205, 270, 538, 1234, 3000, 3210])
def test_a_run_stops_as_late_as_its_last_save_still_ends_within_the_budget(done: int, seconds: int) -> None:
    clock, schedule = Clock(), Schedule(done, 300, 100, 20, 40)
    last, end = simulated(TimeBudget(seconds / 3600, PACE, clock), clock, schedule, lambda _: 0)
    assert last < 300
    assert end <= seconds
    longer = schedule.seconds(PACE, last + 1) - PACE.evaluation * (done == 0)  # the simulation does none at its start
    assert longer > seconds


def test_a_run_that_ends_just_in_time_is_not_stopped() -> None:
    clock, schedule = Clock(), Schedule(0, 30, 100, 20, 40)
    seconds = schedule.seconds(PACE, 30) - PACE.evaluation
    assert simulated(TimeBudget(seconds / 3600, PACE, clock), clock, schedule, lambda _: 0) == (30, seconds)
    clock = Clock()
    budget = TimeBudget((seconds - 1) / 3600, PACE, clock)
    assert simulated(budget, clock, schedule, lambda _: 0)[0] == 29


def test_a_budget_that_the_last_step_overruns_does_not_take_the_finished_run_away() -> None:
    clock, schedule = Clock(), Schedule(0, 30, 100, 20, 40)
    budget = TimeBudget(schedule.seconds(PACE, 30) / 3600, PACE, clock)
    last, end = simulated(budget, clock, schedule, lambda step: 500 * (step == 30))
    assert (last, end > 3600 * budget.hours, budget.used_up) == (30, True, False)


def test_a_step_is_expected_to_last_as_long_as_the_longest_so_far() -> None:
    clock, schedule = Clock(), Schedule(0, 300, 100, 400, 400)
    last, end = simulated(TimeBudget(995 / 3600, Pace(), clock), clock, schedule, lambda step: 90 * (step == 3))
    assert last == 81  # 81 steps of 10 s and 90 s more are over, and another step might take 100 s
    assert end == 905


# --- a whole command


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Command:
    """`train.py` in this process, on a tiny model; `clock` is what it takes for the time since its start."""

    def __init__(self, base: Path, train_file: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.output, self.monkeypatch = output, monkeypatch
        self.settings = [
            f"model.name={base}", f"dataset.train_file={train_file}", "tracking.run_name=run",
            "dataset.sample_prompts=[]", "dataset.validation_split=0.25", "model.max_seq_length=64",
            "lora.lora_dropout=0.1", "training.packing=true", "training.max_steps=6", "training.eval_steps=2",
            "training.save_steps=2", "training.gradient_accumulation_steps=2",
        ]  # fmt: skip

    def __call__(
        self, folder: str, *settings: str, clock: Callable[[], float] = seconds_since_start
    ) -> tuple[int, str]:
        """(exit code, message)."""
        settings = (*self.settings, f"output.dir={self.output / folder}", *settings)
        line = ["train.py", "--config", "cpu", *(word for setting in settings for word in ("--set", setting))]
        self.monkeypatch.setattr(sys, "argv", line)
        for module in (rehearsal, job):
            self.monkeypatch.setattr(module, "seconds_since_start", clock)
        try:
            program.main()
        except UserError as error:
            return error.exit_code, str(error)
        finally:
            gc.collect()  # whatever holds the run holds its lock
        return 0, ""

    def manifest(self, folder: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.output / folder / "run" / "manifest.json").read_text())
        return content

    def metrics(self, folder: str) -> list[dict[str, Any]]:
        lines = (self.output / folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        entries = [json.loads(line) for line in lines]
        kept = ("step", "loss", "eval_loss", "learning_rate", "grad_norm")
        return [{name: entry[name] for name in kept if name in entry} for entry in entries]


@pytest.fixture
def command(
    tiny_mistral: Path, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Command]:
    return Command(tiny_mistral, conversations, tmp_path / "output", monkeypatch)


def ticks() -> Callable[[], float]:
    """A clock on which 100 s pass between two looks."""
    return itertools.count(step=100.0).__next__


@pytest.mark.slow
def test_a_budget_stops_the_run_and_the_same_command_goes_on_to_the_bits_of_one_without(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("whole", clock=ticks()) == (0, "")
    # The evaluation before the first step takes 100 s, as each step, evaluation and save does: 800 s are over after
    # step 4, its evaluation and its save make 1000, and another step and its save would make 1200.
    budget = ("training.time_budget_hours=0.3", "training.time_budget_partial=true")
    stopped = "time budget of 0.3 h used up at step 4; the same command resumes from checkpoint-4"
    assert command("parts", *budget, clock=ticks()) == (6, stopped)
    assert command.manifest("parts")["status"] == "interrupted"
    run = command.output / "parts" / "run"
    assert not (run / "adapter_model.safetensors").exists()
    capsys.readouterr()
    assert command("parts", "training.time_budget_hours=5", clock=ticks()) == (0, "")  # the budget may change
    assert "resume: from checkpoint-4, the newest intact checkpoint" in capsys.readouterr().out.splitlines()
    assert command.metrics("parts") == command.metrics("whole")
    adapters = [command.output / folder / "run" / "adapter_model.safetensors" for folder in ("parts", "whole")]
    assert sha256(adapters[0]) == sha256(adapters[1])
    assert command.manifest("parts")["status"] == "complete"


@pytest.mark.slow
def test_by_the_real_clock_a_run_far_too_long_stops_in_time(command: Command) -> None:
    seconds = 8
    times: list[float] = []

    def clock() -> float:
        times.append(time.monotonic())
        return times[-1] - times[0]

    settings = (
        "training.max_steps=100000",
        "training.eval_steps=10",
        "training.save_steps=10",
        f"training.time_budget_hours={seconds / 3600}",
        "training.time_budget_partial=true",
    )
    code, message = command("long", *settings, clock=clock)
    times.append(time.monotonic())
    longest = max(after - before for before, after in itertools.pairwise(times))
    assert times[-1] - times[0] < seconds + longest  # one step may take longer than any before
    assert code == 6
    assert message.startswith("time budget of 0.00222222 h used up at step ")
    assert command.manifest("long")["status"] == "interrupted"


def test_a_whole_run_that_does_not_fit_is_refused_and_leaves_no_folder(command: Command) -> None:
    code, message = command("none", "training.time_budget_hours=1", clock=lambda: 4000)
    assert code == 6
    assert re.fullmatch(
        r"time budget: steps 1 to 6 take \d+ s, training\.time_budget_hours 1 has nothing left; what would fit:\n"
        r"  --set training\.time_budget_hours=1\.2",
        message,
    )
    assert [path.name for path in (command.output / "none").iterdir()] == [".cache"]
