"""A run that is copied off its machine: its disk fills up, vanishes and returns; kills; and resuming from the copy."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.files import read_seal
from support.harness import Command, Warm, Whole, names, result

SKIP = ("--skip", "host,libraries,device,rehearsal,paths")
BOTH = "output.copy_checkpoints=true"
DISTURBED = "disturbed_copies"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Another disk, a small one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if sys.platform != "linux":
        pytest.skip("mounting a tmpfs needs Linux")
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"mounting a tmpfs needs root and the right to mount: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=False)


def copied_to(command: Command, folder: Path, output: Path) -> Command:
    return command.at(output, f"output.copy_to={folder}", BOTH)


def test_the_copy_is_the_finished_run_and_the_end_says_where_it_is(warm: Warm, whole: Whole, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    command = copied_to(whole.command, there, tmp_path / "output")
    ended = warm(command)
    assert ended.code == 0, ended.text
    assert f"copied: {there}/run\n" in ended.text
    assert result(command) == whole.result
    assert names(there / "run") == names(command.folder) - {"lock"}
    assert names(there / "run" / "checkpoints") == {"best", "checkpoint-6"}
    for path in command.folder.iterdir():
        if path.is_file() and path.name != "lock":
            assert (there / "run" / path.name).read_bytes() == path.read_bytes()
    assert json.loads((there / "run" / "manifest.json").read_text())["copy_to"] == str(there)


@pytest.mark.slow
def test_resuming_on_an_empty_machine_from_the_copy_gives_the_same_bits(
    warm: Warm, whole: Whole, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    command = copied_to(whole.command, there, tmp_path / "output")
    assert warm(command, *SKIP, module=DISTURBED, KILLED_WITH="checkpoint-6").code < 0
    copy = there / "run"
    [checkpoint] = copy.glob("checkpoints/checkpoint-*")
    assert checkpoint.name in ("checkpoint-2", "checkpoint-4")
    shutil.rmtree(command.output)  # that machine is gone
    refused = warm(command)
    assert refused.code == 3
    assert f"{copy} contains another run" in refused.text
    shutil.rmtree(command.output)
    shutil.copytree(copy, command.folder)
    ended = warm(command)
    assert ended.code == 0, ended.text
    assert result(command)["adapter"] == whole.result["adapter"]
    assert result(command)["last"] == whole.result["last"]


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9], ids="{:.0%} of a run".format)
def test_a_kill_at_any_moment_leaves_a_copy_that_can_be_resumed_or_none(
    warm: Warm, whole: Whole, tmp_path: Path, share: float
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    command = copied_to(whole.command, there, tmp_path / "output")
    assert warm(command, *SKIP, kill_after=share * whole.seconds).code <= 0  # 0: on a busy machine it may be faster
    shutil.rmtree(command.output)
    whole_ones = [path for path in there.glob("run/checkpoints/*") if not path.name.endswith((".partial", ".old"))]
    for folder in whole_ones:
        read_seal(folder)
    if (there / "run").is_dir():
        shutil.copytree(there / "run", command.folder)
    ended = warm(command)
    assert ended.code == 0, ended.text
    assert result(command)["adapter"] == whole.result["adapter"]
    assert names(there / "run" / "checkpoints") == {"best", "checkpoint-6"}


FAULTS = {  # what happens to a disk, what brings it back, and why nothing is copied meanwhile
    "full": ("cat /dev/zero > {0}/filler 2> /dev/null || true", "rm {0}/filler", "No space left on device"),
    "gone": ("umount --lazy {0}", "mount -t tmpfs tmpfs {0}", "the disk is not mounted"),
}


@pytest.mark.slow
@pytest.mark.parametrize("returns", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_disk_that_fills_up_or_vanishes_never_stops_the_training_and_is_written_when_it_is_back(
    warm: Warm, whole: Whole, disk: Path, tmp_path: Path, fault: str, returns: bool
) -> None:
    command = copied_to(whole.command, disk, tmp_path / "output")
    begins, ends, reason = FAULTS[fault]
    lines = json.dumps([line.format(disk) for line in (begins, ends)[: 1 + returns]])
    ended = warm(command, *SKIP, module=DISTURBED, BEFORE_COPY=lines)
    assert ended.code == 0, ended.text
    assert result(command) == whole.result
    said = [line for line in ended.text.splitlines() if "not copied" in line or line.startswith("copied: ")]
    assert len(said) == 2
    assert said[0].startswith(f"warning: not copied to {disk}/run: ")
    assert said[0].endswith(f": {reason}; training continues, and the next copy tries again")
    if returns:
        assert said[1] == f"copied: {disk}/run"
        assert (disk / "run" / "adapter_model.safetensors").read_bytes() == (
            command.folder / "adapter_model.safetensors"
        ).read_bytes()
    else:
        assert said[1].endswith(f": {reason}; to copy it, type: cp -r {command.folder} {disk}")
        assert fault == "full" or list(disk.iterdir()) == []
    assert names(command.folder) - {"lock"} == names(whole.command.folder) - {"lock"}
