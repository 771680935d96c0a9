"""A run that is killed anywhere, and started again by the same command, ends with the same bits as one that was not."""

from __future__ import annotations

import random
import re
import shutil
import signal
from pathlib import Path

import pytest

from support.harness import COUNTS, NIGHTLY, Command, Warm, Whole, differences, share

SEEDS = 50 if NIGHTLY else 8
STOPS = 20 if NIGHTLY else 4
SPREAD = 8


@pytest.mark.slow
def test_a_run_in_a_forked_program_is_to_the_bit_the_run_of_a_real_start(whole: Whole, tmp_path: Path) -> None:
    command = whole.command.at(tmp_path / "output")
    done = command.really()
    assert done.returncode == 0, done.stderr
    assert differences(command, whole.result) == []


def test_every_file_that_a_run_leaves_was_written_at_a_point_where_it_can_be_killed(whole: Whole) -> None:
    made: set[str] = set()
    for what, path, *target in whole.points:
        if what == "write":
            made.add(path)
        if what == "rename":
            made = {target[0] + name.removeprefix(path) if Path(name).is_relative_to(path) else name for name in made}
    output = whole.command.output
    assert {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()} - made == set()


def moments(whole: Whole) -> list[tuple[int, str]]:
    """Before each point of a run, and once more within each file that it writes."""
    numbered = list(enumerate(whole.points, 1))
    within = [(number, "within") for number, (what, *_) in numbered if what == "write"]
    return sorted([(number, "before") for number, _ in numbered] + within)


def goes_wrong_after(warm: Warm, whole: Whole, command: Command) -> list[str]:
    """Start a killed run again; what it then lost: the newest whole checkpoint, or bits of its end."""
    sealed = {path.parent.name for path in command.checkpoints.glob("checkpoint-*/sha256.json")}
    done = warm(command)
    if done.code != 0:
        return [f"exit {done.code}: {done.text[-300:]}"]
    used = {line.split()[2].rstrip(",") for line in done.text.splitlines() if line.startswith("resume: from ")}
    unused = sealed and used != {max(sealed)} and "is finished; --fresh" not in done.text  # killed after its last file
    lost = [f"{max(sealed)} was there and not used"] if unused else []
    lost += differences(command, whole.result)
    if not lost:
        shutil.rmtree(command.output)
    return lost


@pytest.mark.slow
def test_a_run_killed_at_any_point_of_its_files_and_started_again_loses_nothing(
    warm: Warm, whole: Whole, tmp_path: Path
) -> None:
    every = moments(whole)
    chosen = share(every) if NIGHTLY else every[len(every) // 16 :: len(every) // SPREAD]
    lost = {}
    for number, how in chosen:
        command = whole.command.at(tmp_path / f"{number}-{how}")
        ended = warm(command, point=number, how=how)
        COUNTS["kills"] += 1
        wrong = goes_wrong_after(warm, whole, command) if ended.code < 0 else [f"not killed: exit {ended.code}"]
        if wrong:
            lost[number, how, *whole.points[number - 1]] = wrong
    COUNTS["lost"] += len(lost)
    assert lost == {}


@pytest.mark.slow
def test_a_run_killed_at_random_moments_and_started_again_each_time_loses_nothing(
    warm: Warm, whole: Whole, tmp_path: Path
) -> None:
    lost = {}
    for seed in share(list(range(SEEDS))):
        chance = random.Random(seed)
        command = whole.command.at(tmp_path / str(seed))
        for _ in range(chance.choice((1, 1, 2, 3))):
            ended = warm(command, kill_after=chance.uniform(0, whole.seconds))
            COUNTS["kills"] += ended.code < 0
        if (command.folder / "adapter_model.safetensors").exists() and ended.code == 0:
            wrong = differences(command, whole.result)
        else:
            wrong = goes_wrong_after(warm, whole, command)
        if wrong:
            lost[seed] = wrong
    COUNTS["lost"] += len(lost)
    assert lost == {}


STOPPED = re.compile(r"stopped by SIGTERM at step (\d); the same command resumes from checkpoint-(\d)")


@pytest.mark.slow
def test_a_run_stopped_at_random_moments_loses_nothing(warm: Warm, whole: Whole, tmp_path: Path) -> None:
    lost = {}
    for seed in share(list(range(STOPS))):
        chance = random.Random(1000 + seed)
        command, wrong = whole.command.at(tmp_path / str(seed)), []
        for _ in range(chance.choice((1, 2, 3))):
            ended = warm(command, kill_after=chance.uniform(0, whole.seconds), number=signal.SIGTERM)
            COUNTS["stops"] += ended.code == 143
            saved = STOPPED.search(ended.text)
            if ended.code not in (0, 143, -signal.SIGTERM) or (saved and saved[1] != saved[2]):
                wrong.append(f"exit {ended.code}: {ended.text[-300:]}")
        wrong += goes_wrong_after(warm, whole, command)
        if wrong:
            lost[seed] = wrong
    COUNTS["lost"] += len(lost)
    assert lost == {}
