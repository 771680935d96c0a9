"""Encoded rows on disk are what was sealed, or are made again; one process makes them, and the newest are kept."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.data import cache as cache_module
from finetune.data.cache import Cache
from finetune.errors import OutOfResource
from finetune.wording import Report


class Folder:
    """A cache whose entries hold a number, and what it said."""

    def __init__(self, folder: Path) -> None:
        self.said: list[str] = []
        self.made = 0
        self.cache = Cache(folder, Report(warn=self.said.append))

    def fill(self, partial: Path) -> dict[str, Any]:
        self.made += 1
        (partial / "train.arrow").write_bytes(bytes(100))
        (partial / "validation.arrow").write_bytes(bytes(10))
        return {"made": self.made}

    def entry(self, key: str = "a") -> int:
        folder, facts = self.cache.entry(key, self.fill)
        assert (folder / "train.arrow").read_bytes() == bytes(100)
        return facts["made"]

    def names(self) -> list[str]:
        return sorted(path.name for path in self.cache.folder.iterdir() if path.is_dir())


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "my cache")


def test_an_entry_is_made_once(folder: Folder) -> None:
    assert [folder.entry("a"), folder.entry("a"), folder.entry("b"), folder.entry("a")] == [1, 1, 2, 1]
    assert folder.said == []


def flip_a_byte(path: Path) -> None:
    path.write_bytes(bytes(99) + b"\1")


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a byte": (lambda entry: flip_a_byte(entry / "train.arrow"), "train.arrow is not what was saved (sha256 differs)"),
    "a short file": (lambda entry: os.truncate(entry / "train.arrow", 50),
        "train.arrow is not what was saved (sha256 differs)"),
    "an empty file": (lambda entry: os.truncate(entry / "validation.arrow", 0),
        "validation.arrow is not what was saved (sha256 differs)"),
    "no file": (lambda entry: (entry / "train.arrow").unlink(), "train.arrow is missing"),
    "no seal": (lambda entry: (entry / "sha256.json").unlink(), "no sha256.json: its save was not finished"),
    "half a seal": (lambda entry: os.truncate(entry / "sha256.json", 50), "sha256.json cannot be read"),
    "another seal": (lambda entry: (entry / "sha256.json").write_text('{"files": {}, "made": 7}'),
        "sha256.json is not what was saved (sha256 differs)"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "found"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_entry_is_set_aside_and_made_again(folder: Folder, damage: Callable[[Path], Any], found: str) -> None:
    folder.entry()
    damage(folder.cache.folder / "rows-a")
    assert [folder.entry(), folder.entry()] == [2, 2]
    assert folder.said == [
        f"{folder.cache.folder}/rows-a is damaged ({found}); set aside as rows-a.damaged and made again"
    ]
    assert folder.names() == ["rows-a", "rows-a.damaged"]


def test_a_file_in_place_of_an_entry_is_set_aside(folder: Folder) -> None:
    folder.cache.folder.mkdir()
    (folder.cache.folder / "rows-a").touch()
    assert [folder.entry(), folder.entry()] == [1, 1]
    assert (folder.cache.folder / "rows-a.damaged").is_file()


def test_an_entry_that_is_damaged_twice_is_set_aside_in_place_of_the_first(folder: Folder) -> None:
    for made in (1, 2, 3):
        assert folder.entry() == made
        flip_a_byte(folder.cache.folder / "rows-a" / "train.arrow")
    assert folder.names() == ["rows-a", "rows-a.damaged"]


def test_the_five_entries_used_last_are_kept(folder: Folder) -> None:
    for age, key in enumerate("abcde"):
        folder.entry(key)
        os.utime(folder.cache.folder / f"rows-{key}", (age, age))
    folder.entry("a")
    folder.entry("f")
    assert folder.names() == [f"rows-{key}" for key in "acdef"]


def test_nothing_but_entries_is_removed(folder: Folder) -> None:
    other = folder.cache.folder / "packed-0123"
    other.mkdir(parents=True)
    os.utime(other, (0, 0))
    for key in "abcdefgh":
        folder.entry(key)
    assert other.is_dir()
    assert len(folder.names()) == 6


def test_what_a_killed_process_left_half_made_is_removed(folder: Folder) -> None:
    for name in ("rows-a.partial", "rows-old.partial"):
        (folder.cache.folder / name).mkdir(parents=True)
        (folder.cache.folder / name / "train.arrow").write_bytes(bytes(10))
    assert folder.entry() == 1
    assert folder.names() == ["rows-a"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_with_the_folder_its_size_and_what_to_remove(folder: Folder, number: int) -> None:
    def fill(_: Path) -> dict[str, Any]:
        raise OSError(number, os.strerror(number))

    folder.entry("before")
    with pytest.raises(OutOfResource) as failure:
        folder.cache.entry("a", fill)
    where = folder.cache.folder
    assert str(failure.value) == (
        f"no space left for encoded rows in {where} (0.0 GiB are kept there); "
        f"free some, or rm -r '{where}'/rows-*, which is made again when needed"
    )
    assert folder.names() == ["rows-before"]


def test_every_file_is_forced_to_the_disk_before_the_entry_gets_its_name(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    sync, rename = os.fsync, Path.rename

    def watched_sync(number: int) -> None:
        order.append(Path(f"/proc/self/fd/{number}").readlink().name)
        sync(number)

    def watched_rename(self: Path, target: Path) -> Path:
        order.append(f"{self.name} -> {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    folder.entry()
    assert {"train.arrow", "validation.arrow", "sha256.json.partial"} <= set(order[:-1])
    assert order[-1] == "rows-a.partial -> rows-a"


def test_a_second_process_says_whom_it_waits_for_and_takes_what_that_one_made(folder: Folder) -> None:
    folder.cache.folder.mkdir()
    with (folder.cache.folder / "rows-lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 7 on a-machine")
        lock.flush()
        second = Folder(folder.cache.folder)
        waiting = threading.Thread(target=second.entry)
        waiting.start()
        for _ in range(200):
            if second.said:
                break
            time.sleep(0.02)
        assert second.said == [f"waiting for process 7 on a-machine, which makes encoded rows in {folder.cache.folder}"]
        first = folder.cache.folder / "rows-a.partial"
        first.mkdir()
        folder.fill(first)
        cache_module.seal(first, {"made": 5})
        first.rename(folder.cache.folder / "rows-a")
    waiting.join(10)
    assert second.made == 0
    assert re.fullmatch(rf"process {os.getpid()} on \S+", (folder.cache.folder / "rows-lock").read_text())
