"""Run folders: which one a command refers to, and the lock that lets only one process write it."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from finetune.cli import advice
from finetune.errors import OutOfResource
from finetune.files import json_object, make_folder, shown
from finetune.wording import clock

if TYPE_CHECKING:
    from finetune.config.schema import Config

MANIFEST, METRICS = "manifest.json", "metrics.jsonl"
REJECTED = "rejected"  # for an adapter that failed its self-test
WAIT_FOR_NAME_SECONDS = 1.0


@dataclass(frozen=True)
class Run:
    """One run's folder. `finished` means its manifest says complete; `lock` is held while this process lives.

    `died` names the start before this one if that ended without a message, as a killed one does. `fresh` means that
    --fresh made it: the command that resumes it is the one without.
    """

    folder: Path
    finished: bool
    lock: TextIO | None
    died: str | None = None
    fresh: bool = False

    @property
    def name(self) -> str:
        """The folder's name, which trackers show."""
        return self.folder.name

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "checkpoints"

    def drop_if_unused(self) -> None:
        """Remove the folder if only the lock was written: the command was stopped while loading."""
        if not self.finished and not (self.folder / MANIFEST).exists() and not any(self.checkpoints.iterdir()):
            shutil.rmtree(self.folder)

    def close(self) -> None:
        """End this start cleanly: from now on the lock names nobody."""
        with suppress(OSError):  # a disk that is read-only or gone since has ended this start, which says so
            if self.lock is not None:
                self.lock.truncate(0)
            self.drop_if_unused()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in a run's folder; empty if there is none or it cannot be read."""
    try:
        return json_object((folder / MANIFEST).read_bytes()) or {}
    except OSError:
        return {}


def find_run(config: Config, fresh: bool) -> tuple[Path, bool]:
    """The folder of the run this config's command refers to, and whether that run is finished; nothing is written.

    Of run_name, run_name-2, run_name-3, ... it is the newest unfinished one; if all are finished, the newest; with
    `fresh` the next number.
    """
    taken = _taken(config.run_folder)
    existing = [path for path in taken if path.is_dir()]
    unfinished = [folder for folder in existing if read_manifest(folder).get("status") != "complete"]
    if fresh and taken:
        return config.run_folder.with_name(f"{config.run_name}-{_number(config.run_folder, taken[-1]) + 1}"), False
    if existing and not unfinished:
        return existing[-1], True
    return (unfinished[-1] if unfinished else config.run_folder), False


def open_run(config: Config, fresh: bool) -> Run:
    """Open the run of `find_run`; unless it is finished, create and lock its folder.

    Raises OutOfResource if another process holds the lock.
    """
    folder, finished = find_run(config, fresh)
    if finished:
        return Run(folder, True, None)
    make_folder(folder / "checkpoints")
    lock, died = _lock(folder)
    return Run(folder, False, lock, died, fresh)


def lock_holder(folder: Path) -> str | None:
    """Who is writing this run folder now, and how to stop it; None for nobody."""
    try:
        with (folder / "lock").open(encoding="utf-8") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return "; ".join(_held_by(stream))
    except FileNotFoundError:
        pass
    return None


def _taken(first: Path) -> list[Path]:
    """The existing paths of this run and its fresh ones, in order."""
    pattern = re.compile(re.escape(first.name) + r"(-([2-9]|[1-9][0-9]+))?")
    return sorted(
        (path for path in first.parent.glob("*") if pattern.fullmatch(path.name)),
        key=lambda path: _number(first, path),
    )


def _number(first: Path, folder: Path) -> int:
    return 1 if folder == first else int(folder.name.removeprefix(f"{first.name}-"))


def _held_by(stream: TextIO) -> tuple[str, str]:
    """Who holds this lock and what to do about it, from the two lines the holder wrote.

    Waits for them: the holder writes them a moment after it gets the lock.
    """
    until = time.monotonic() + WAIT_FOR_NAME_SECONDS
    while True:
        stream.seek(0)
        who, _, stop = stream.read().strip().partition("\n")
        if stop or time.monotonic() > until:
            break
        time.sleep(0.01)
    return who or "another process", f"wait for it, or stop it with: {stop}" if stop else "wait for it"


def _lock(folder: Path) -> tuple[TextIO, str | None]:
    """The lock, and who held it last if that start did not end cleanly."""
    stream = (folder / "lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder, fix = _held_by(stream)
        stream.close()
        raise OutOfResource(f"{shown(folder)} is being written by {holder}", fix) from None
    stream.seek(0)
    died = stream.readline().strip() or None
    stream.truncate(0)
    started = clock(datetime.now().astimezone())
    stop = advice(f"kill {os.getpid()}", f"docker stop {socket.gethostname()}")
    stream.write(f"pid {os.getpid()} on {socket.gethostname()}, started {started}\n{stop}\n")
    stream.flush()
    return stream, died
