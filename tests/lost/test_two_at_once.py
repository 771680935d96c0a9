"""Two starts at once, a full disk and a read-only one: told with what to do, and nothing that was good is touched."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import ENVIRONMENT, ROOT, Command, Warm, Whole, differences, names

from finetune.checkpoints import read_seal


@pytest.mark.slow
def test_of_two_starts_at_once_one_trains_and_the_other_names_it(whole: Whole, tmp_path: Path) -> None:
    command = whole.command.at(tmp_path / "output")
    line = [sys.executable, str(ROOT / "src" / "train.py"), *command.arguments()]
    both = [
        subprocess.Popen(
            line, env={**os.environ, **ENVIRONMENT}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        for _ in range(2)
    ]
    said = {process.pid: process.communicate(timeout=300)[1] for process in both}
    assert sorted(process.returncode for process in both) == [0, 6], said
    winner, loser = sorted(both, key=lambda process: process.returncode)
    holder = rf"pid {winner.pid} on \S+, started \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
    wanted = rf"{command.folder} is being written by {holder}; wait for it, or stop it with: kill {winner.pid}\n"
    assert re.fullmatch(wanted, said[loser.pid])
    assert differences(command, whole.result) == []


class SmallDisk:
    """A tmpfs; `resize` takes bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def mount(self, *options: str) -> None:
        line = ["mount", "-t", "tmpfs", *options, "tmpfs", str(self.folder)]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"mounting a tmpfs needs root and the right to mount: {done.stderr.strip()}")

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    if shutil.which("mount") is None or sys.platform != "linux":
        pytest.skip("mounting a tmpfs needs Linux")
    folder = tmp_path / "disk"
    folder.mkdir()
    made = SmallDisk(folder)
    made.mount("-o", "size=200m")
    yield made
    subprocess.run(["umount", str(folder)], check=True)


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def fill(folder: Path, leave: int) -> Path:
    """A file beside the runs that leaves so many bytes free."""
    filler = folder / "filler"
    filler.write_bytes(b"\0" * (free_bytes(folder) - leave))
    return filler


def copied(stopped: Command, disk: SmallDisk) -> Command:
    return stopped.elsewhere(disk.folder / "output")


SKIP = ("--skip", "host,libraries,device,rehearsal,paths")


@pytest.mark.parametrize("share", [0.1, 0.4, 0.8, 1.2], ids="{:.0%} of a checkpoint".format)
def test_a_disk_that_fills_up_is_exit_6_with_path_and_sizes_and_the_last_checkpoint_stays_whole(
    warm: Warm, whole: Whole, stopped: Command, disk: SmallDisk, share: float
) -> None:
    command = copied(stopped, disk)
    size = sum(path.stat().st_size for path in (command.checkpoints / "checkpoint-4").iterdir())
    filler = fill(disk.folder, int(share * size))
    ended = warm(command, *SKIP)
    assert ended.code == 6, ended.text
    last = ended.text.splitlines()[-1]
    assert str(disk.folder) in last and re.search(r"[\d.]+ [KMG]iB", last), last
    assert "Traceback" not in ended.text
    assert read_seal(command.checkpoints / "checkpoint-4")
    assert not (command.folder / "adapter_model.safetensors").exists()
    filler.unlink()
    ended = warm(command)
    assert ended.code == 0, ended.text
    assert differences(command, whole.result) == []


def test_an_output_folder_that_became_read_only_is_told_and_the_checkpoint_stays_whole(
    warm: Warm, whole: Whole, stopped: Command, disk: SmallDisk
) -> None:
    command = copied(stopped, disk)
    disk.remount("ro")
    ended = warm(command)
    disk.remount("rw")
    wanted = f"output.dir: {command.checkpoints}: Read-only file system; set it to a folder that can be written"
    assert (ended.code, ended.text.splitlines()[-1].strip()) == (2, wanted)
    assert names(command.checkpoints) == {"best", "checkpoint-2", "checkpoint-4"}
    ended = warm(command)
    assert ended.code == 0, ended.text
    assert differences(command, whole.result) == []
