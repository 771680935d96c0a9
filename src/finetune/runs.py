"""Run folders: which one a command means, and that only one program writes it."""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from finetune.config import Config
from finetune.errors import OutOfResource


@dataclass(frozen=True)
class Run:
    """One run's folder. `finished` when its manifest says complete; `lock` is held as long as this process lives."""

    folder: Path
    finished: bool
    lock: TextIO | None

    @property
    def name(self) -> str:
        """The folder's name, which trackers show."""
        return self.folder.name

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.folder / "checkpoints"


def open_run(config: Config, fresh: bool) -> Run:
    """The run that this config's command means, its folder made and locked.

    The newest of run_name, run_name-2, run_name-3, ...: where that one is finished, it is returned so; `fresh` takes
    the next free number. Raises OutOfResource where another process holds the lock.
    """
    existing = _existing(config.run_folder)
    folder = existing[-1] if existing else config.run_folder
    if fresh and existing:
        folder = config.run_folder.with_name(f"{config.run_name}-{_number(config.run_folder, existing[-1]) + 1}")
    if not fresh and _status(folder) == "complete":
        return Run(folder, True, None)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    return Run(folder, False, _lock(folder))


def _existing(first: Path) -> list[Path]:
    pattern = re.compile(re.escape(first.name) + r"(-[1-9]\d*)?")
    folders = [path for path in first.parent.glob("*") if path.is_dir() and pattern.fullmatch(path.name)]
    return sorted(folders, key=lambda path: _number(first, path))


def _number(first: Path, folder: Path) -> int:
    return 1 if folder == first else int(folder.name.removeprefix(f"{first.name}-"))


def _status(folder: Path) -> str | None:
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return None
    content: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))
    return str(content.get("status"))


def _lock(folder: Path) -> TextIO:
    stream = (folder / "lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.seek(0)
        holder = stream.read().strip() or "another process"
        stream.close()
        raise OutOfResource(f"{folder} is being written by {holder}; wait for it, or stop it with: kill PID") from None
    stream.seek(0)
    stream.truncate()
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    stream.write(f"pid {os.getpid()} on {socket.gethostname()}, started {started}\n")
    stream.flush()
    return stream
