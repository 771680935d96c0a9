"""Two starts at once, a full disk and a read-only one: told with what to do, and nothing that was good is touched."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from finetune.files import read_seal
from support.harness import ENVIRONMENT, NIGHTLY, ROOT, Command, Warm, Whole, differences, names


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
    holder = rf"pid {winner.pid} on \S+, started \d{{4}}-\d\d-\d\d \d\d:\d\d \S+"
    wanted = rf"{command.folder} is being written by {holder}; wait for it, or stop it with: kill {winner.pid}\n"
    assert re.fullmatch(wanted, said[loser.pid])
    assert differences(command, whole.result) == []


@dataclass(frozen=True)
class SmallDisk:
    """A tmpfs that is mounted at `folder`, and a second time at `behind`, where it stays when it is gone from there."""

    folder: Path
    behind: Path

    def mount(self, *arguments: str) -> None:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"mounting a tmpfs needs root and the right to mount: {done.stderr.strip()}")

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.folder)], check=True)

    def mend(self) -> None:
        """Undo any of `faults`."""
        (self.behind / "filler").unlink(missing_ok=True)
        while self.folder.is_mount():
            subprocess.run(["umount", str(self.folder)], check=True)
        self.mount("--bind", str(self.behind), str(self.folder))

    def faults(self) -> dict[str, str]:
        """What may happen to a disk at any moment, as a shell's line."""
        return {
            "full": f"cat /dev/zero > {self.folder}/filler 2> /dev/null || true",
            # Over itself, since the kernel refuses to make a mount read-only in which a file is open for writing.
            "read-only": f"mount --bind {self.folder} {self.folder} && mount -o remount,bind,ro {self.folder}",
            "gone": f"umount --lazy {self.folder}",
        }


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    if shutil.which("mount") is None or sys.platform != "linux":
        pytest.skip("mounting a tmpfs needs Linux")
    made = SmallDisk(tmp_path / "disk", tmp_path / "behind")
    made.folder.mkdir()
    made.behind.mkdir()
    made.mount("-t", "tmpfs", "-o", "size=200m", "tmpfs", str(made.behind))
    made.mount("--bind", str(made.behind), str(made.folder))
    yield made
    made.mend()
    subprocess.run(["umount", str(made.folder), str(made.behind)], check=True)


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


@pytest.mark.parametrize(
    "share",
    [0.4, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.1, 0.8, 1.2))],
    ids="{:.0%} of a checkpoint".format,
)
def test_a_disk_that_fills_up_is_exit_6_and_the_last_checkpoint_stays_whole(
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
    wanted = f"output.dir: {command.checkpoints}: Read-only file system; set it to a writable folder"
    assert (ended.code, ended.text.splitlines()[-1].strip()) == (2, wanted)
    assert names(command.checkpoints) == {"best", "checkpoint-2", "checkpoint-4"}
    ended = warm(command)
    assert ended.code == 0, ended.text
    assert differences(command, whole.result) == []


ADVICE = "then type the same command again"
SIZES = r"\S+ has [\d.]+ MiB free, a save takes [\d.]+"
SAID = {
    "full": rf"no space left: \S+/run has 0\.0 MiB free; free some, {ADVICE}|(no space left: {SIZES}|cannot save: .+ "
    rf"\({SIZES}\)); (free some|fix that), {ADVICE}",
    "read-only": rf"\S+/run can no longer be written: Read-only file system \([\d.]+ MiB free\); fix that, {ADVICE}|"
    rf"cannot save: .*Read-only file system.* \({SIZES}\); fix that, {ADVICE}",
    "gone": rf"\S+/run is gone \(No such file or directory\); bring it back, {ADVICE}|"
    rf"cannot save: .*No such file or directory.*; fix that, {ADVICE}",
}
MOMENTS = {
    "a log": "run/metrics.jsonl",
    "a checkpoint's optimizer": "run/checkpoints/checkpoint-4/optimizer.pt",
    "a checkpoint's folder": "run/checkpoints/checkpoint-4",
    "a seal": "run/checkpoints/checkpoint-4/sha256.json.partial",
    "the best adapter": "run/checkpoints/best.partial/adapter_model.safetensors",
    "the best adapter's place": "run/checkpoints/best",
    "the final adapter": "run/export.partial/adapter_model.safetensors",
    "the manifest": "run/manifest.json.partial",
}


def last_point(whole: Whole, path: str) -> int:
    """The number of the last point at which `path` is written; where none is, at which something happens to it."""
    found = [(what == "write", number) for number, (what, first, *_) in enumerate(whole.points, 1) if first == path]
    return max(found)[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment", MOMENTS if NIGHTLY else ["a log", "a checkpoint's optimizer", "a checkpoint's folder"]
)
@pytest.mark.parametrize("fault", SAID)
def test_a_disk_that_fails_in_mid_run_is_exit_6_and_the_run_resumes_once_it_is_fixed(
    warm: Warm, whole: Whole, disk: SmallDisk, fault: str, moment: str
) -> None:
    command = whole.command.at(disk.folder / "output")
    ended = warm(command, point=last_point(whole, MOMENTS[moment]), how=disk.faults()[fault])
    disk.mend()
    assert ended.code == 6, ended.text
    assert "Traceback" not in ended.text
    assert re.fullmatch(SAID[fault], ended.text.splitlines()[-1]), ended.text
    sealed = [path.parent for path in command.checkpoints.glob("checkpoint-*/sha256.json")]
    assert sealed and all(read_seal(folder) for folder in sealed)
    assert not (command.folder / "adapter_model.safetensors").exists() or moment == "the manifest"
    ended = warm(command)
    assert ended.code == 0, ended.text
    assert f"resume: from {max(sealed).name}, the newest intact checkpoint" in ended.text.splitlines()
    assert differences(command, whole.result) == []
