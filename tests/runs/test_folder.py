"""Which folder a command means, and that only one process writes it."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune.config import load
from finetune.config.load import ROOT
from finetune.config.schema import Config
from finetune.errors import ConfigError, OutOfResource
from finetune.files import make_folder
from finetune.runs import folder as run_folder
from finetune.runs.folder import Run, open_run

NAME = "my.run"


@pytest.fixture
def settings(tmp_path: Path) -> Config:
    return load.load_config("h100", [f"output.dir={tmp_path}/adapters", f"tracking.run_name={NAME}"])[0]


@pytest.fixture
def opened(settings: Config) -> Iterator[Callable[..., Run]]:
    """Opens the run, as a process of its own would: the locks of earlier ones are given up first."""
    runs: list[Run] = []

    def opening(fresh: bool = False) -> Run:
        for run in runs:
            if run.lock:
                run.lock.close()
        runs.append(open_run(settings, fresh))
        return runs[-1]

    yield opening
    for run in runs:
        if run.lock:
            run.lock.close()


def put(settings: Config, suffix: str, status: str | None) -> Path:
    """A run folder beside the others; `status` None is one without a manifest."""
    folder = settings.run_folder.with_name(NAME + suffix)
    folder.mkdir(parents=True)
    if status:
        (folder / "manifest.json").write_text(json.dumps({"status": status}), encoding="utf-8")
    return folder


# Which folder ---------------------------------------------------------------------------------------------------------


def test_the_first_command_makes_and_locks_the_folder(opened: Callable[..., Run], tmp_path: Path) -> None:
    run = opened()
    assert (run.folder, run.finished, run.name) == (tmp_path / "adapters" / NAME, False, NAME)
    assert run.checkpoints == run.folder / "checkpoints"
    assert run.checkpoints.is_dir()
    assert run.lock is not None
    assert sorted(path.name for path in run.folder.iterdir()) == ["checkpoints", "lock"]


def test_the_lock_file_says_who_holds_it(opened: Callable[..., Run]) -> None:
    text = (opened().folder / "lock").read_text(encoding="utf-8")
    who = re.escape(f"pid {os.getpid()} on {socket.gethostname()}")
    assert re.fullmatch(rf"{who}, started \d{{4}}-\d\d-\d\d \d\d:\d\d \S+\nkill {os.getpid()}\n", text)


@pytest.mark.parametrize("status", [None, "interrupted", "failed"])
def test_the_same_command_goes_on_with_an_unfinished_run(
    settings: Config, opened: Callable[..., Run], status: str | None
) -> None:
    folder = put(settings, "", status)
    run = opened()
    assert (run.folder, run.finished) == (folder, False)
    assert run.lock is not None


def test_a_finished_run_is_returned_as_it_lies_without_a_lock(settings: Config, opened: Callable[..., Run]) -> None:
    folder = put(settings, "", "complete")
    assert opened() == Run(folder, True, None)
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]


def test_the_newest_run_is_the_one_with_the_highest_number(settings: Config, opened: Callable[..., Run]) -> None:
    put(settings, "", "complete")
    for suffix in ("-2", "-9"):
        put(settings, suffix, "complete")
    newest = put(settings, "-10", "interrupted")
    assert opened().folder == newest
    (newest / "manifest.json").write_text('{"status": "complete"}', encoding="utf-8")
    assert opened() == Run(newest, True, None)


def test_fresh_is_the_plain_name_where_there_is_no_run_yet(opened: Callable[..., Run]) -> None:
    run = opened(fresh=True)
    assert (run.name, run.fresh) == (NAME, True)


def test_fresh_counts_on_and_the_plain_command_stays_with_the_newest(opened: Callable[..., Run]) -> None:
    names = [opened().name, opened(fresh=True).name, opened().name, opened(fresh=True).name, opened().name]
    assert names == [NAME, f"{NAME}-2", f"{NAME}-2", f"{NAME}-3", f"{NAME}-3"]


@pytest.mark.parametrize(
    ("there", "name"),
    [
        (["", "-3"], "-4"),  # a gap is not filled: the highest number is the newest
        (["-2"], "-3"),
        (["", "-9", "-10"], "-11"),
    ],
)
def test_fresh_takes_the_number_after_the_highest(
    settings: Config, opened: Callable[..., Run], there: list[str], name: str
) -> None:
    for suffix in there:
        put(settings, suffix, "complete")
    assert opened(fresh=True).name == NAME + name


@pytest.mark.parametrize(
    "neighbor",
    [
        f"{NAME}-extra",
        f"{NAME}-02",
        f"{NAME}-2b",
        f"{NAME}-2.5",
        f"{NAME}-",
        f"{NAME}2",
        f"{NAME}--2",
        f"{NAME}-0",
        f"{NAME}-2-3",
        f"old-{NAME}-7",
        f"{NAME}-2.partial",
        "my-run-2",
        "myXrun-2",  # the dot of the name is a dot
    ],
)
@pytest.mark.parametrize("first", [True, False], ids=["beside-a-run", "alone"])
def test_a_neighbor_with_a_similar_name_is_not_taken_for_a_run(
    settings: Config, opened: Callable[..., Run], neighbor: str, first: bool
) -> None:
    if first:
        put(settings, "", "interrupted")
    other = settings.run_folder.with_name(neighbor)
    other.mkdir(parents=True)
    assert opened().name == NAME
    assert opened(fresh=True).name == f"{NAME}-2"
    assert list(other.iterdir()) == []


def test_a_neighbor_that_ends_in_1_is_not_taken_for_a_run(settings: Config, opened: Callable[..., Run]) -> None:
    put(settings, "-1", None)
    assert opened().name == NAME


def test_a_file_with_a_runs_name_is_not_taken_for_a_run(settings: Config, opened: Callable[..., Run]) -> None:
    put(settings, "", "interrupted")
    settings.run_folder.with_name(f"{NAME}-2").write_text("notes", encoding="utf-8")
    assert opened().name == NAME


# The lock -------------------------------------------------------------------------------------------------------------

HOLDER = """
import sys
import time
from finetune.config.load import load_config
from finetune.runs.folder import open_run
run = open_run(load_config("h100", sys.argv[1:])[0], False)
print(run.folder, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(settings: Config) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the run open and locked, until its stdin ends."""
    wanted = [f"output.dir={settings.output.dir}", f"tracking.run_name={NAME}"]
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, *wanted],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == f"{settings.run_folder}\n"
    yield process
    process.kill()
    process.communicate()


def test_a_run_that_another_process_writes_is_exit_6_and_says_who_it_is(
    settings: Config, holder: subprocess.Popen[str]
) -> None:
    before = (settings.run_folder / "lock").read_text(encoding="utf-8")
    with pytest.raises(OutOfResource) as caught:
        open_run(settings, False)
    started = re.escape(f"{settings.run_folder} is being written by pid {holder.pid} on {socket.gethostname()}")
    time = r", started \d{4}-\d\d-\d\d \d\d:\d\d \S+"
    assert re.fullmatch(rf"{started}{time}; wait for it, or stop it with: kill {holder.pid}", str(caught.value))
    assert caught.value.exit_code == 6
    assert (settings.run_folder / "lock").read_text(encoding="utf-8") == before  # the holder's words stay


@pytest.mark.usefixtures("holder")
def test_a_lock_file_that_says_nothing_is_another_process(settings: Config) -> None:
    (settings.run_folder / "lock").write_text("", encoding="utf-8")
    with pytest.raises(OutOfResource) as caught:
        open_run(settings, False)
    assert str(caught.value) == f"{settings.run_folder} is being written by another process; wait for it"


def test_a_holder_that_has_not_written_its_name_yet_is_waited_for(
    settings: Config, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = settings.run_folder / "lock"
    words = lock.read_text(encoding="utf-8")
    lock.write_text("", encoding="utf-8")
    monkeypatch.setattr(
        run_folder, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: lock.write_text(words))
    )
    with pytest.raises(OutOfResource, match=f"is being written by pid {holder.pid} on"):
        open_run(settings, False)


@pytest.mark.usefixtures("holder")
def test_fresh_starts_beside_a_run_that_another_process_writes(opened: Callable[..., Run]) -> None:
    assert opened(fresh=True).name == f"{NAME}-2"


@pytest.mark.parametrize("how", ["its end", "kill -9"])
def test_the_lock_is_free_once_its_process_has_ended(
    settings: Config, holder: subprocess.Popen[str], opened: Callable[..., Run], how: str
) -> None:
    if how == "kill -9":
        holder.kill()
    holder.communicate(timeout=20)
    assert holder.returncode == (-9 if how == "kill -9" else 0)
    run = opened()
    assert run.folder == settings.run_folder
    assert (run.folder / "lock").read_text(encoding="utf-8").startswith(f"pid {os.getpid()} on ")


def test_a_start_that_was_killed_is_named_to_the_next_one_and_an_orderly_end_is_not(
    holder: subprocess.Popen[str], opened: Callable[..., Run]
) -> None:
    holder.kill()
    holder.communicate(timeout=20)
    after_a_kill = opened()
    assert after_a_kill.died is not None
    assert re.fullmatch(rf"pid {holder.pid} on \S+, started [0-9-]+ [0-9:]+ \S+", after_a_kill.died)
    (after_a_kill.folder / "manifest.json").touch()
    after_a_kill.close()
    assert opened().died is None


def test_a_run_that_wrote_nothing_leaves_no_folder(opened: Callable[..., Run]) -> None:
    run = opened()
    run.drop_if_unused()
    assert not run.folder.exists()


@pytest.mark.parametrize("written", ["manifest.json", "checkpoints/checkpoint-2"])
def test_a_run_that_wrote_anything_keeps_its_folder(opened: Callable[..., Run], written: str) -> None:
    run = opened()
    (run.folder / written).touch()
    run.drop_if_unused()
    assert (run.folder / written).exists()


def test_a_folder_that_belongs_to_another_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root, as whom tests may run, may write anywhere
    with pytest.raises(ConfigError) as caught:
        make_folder(tmp_path / "adapters")
    assert str(caught.value).endswith(
        f"output.dir: {tmp_path}/adapters: Permission denied; make it yours (sudo chown -R $(id -u) FOLDER), or set it "
        "to a writable folder"
    )
