"""A cache on disk: sealed folders, verified when opened, made by one process at a time; only the newest are kept."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import OutOfResource
from finetune.files import GIB, make_folder, quoted, read_seal, seal, seal_facts, shown
from finetune.wording import SILENT, Report

PARTIAL, DAMAGED = ".partial", ".damaged"


@dataclass(frozen=True)
class Cache:
    """The entries in `folder` whose names start with `prefix` and which contain `what`; the newest `kept` are kept."""

    folder: Path
    report: Report = SILENT
    kept: int = 5
    prefix: str = "rows-"
    what: str = "encoded rows"

    def folder_of(self, key: str) -> Path:
        """The folder of an entry, which may not exist yet."""
        return self.folder / f"{self.prefix}{key}"

    def entry(self, key: str, fill: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
        """The folder and facts of `key`. If they are missing or damaged, `fill` makes them.

        `fill` writes into an empty folder and returns the facts. Waits for another process that is making an entry.
        Raises OutOfResource if the disk is full.
        """
        folder = self.folder_of(key)
        facts = _facts(folder)[0]
        if facts is None:
            make_folder(self.folder)
            with self._locked():
                facts = self._set_aside_if_damaged(folder)
                if facts is None:
                    facts = self._make(folder, fill)
        os.utime(folder)  # the newest are the most recently used
        return folder, facts

    def undamaged(self, start: str) -> list[tuple[Path, dict[str, Any]]]:
        """Folder and facts of each undamaged entry whose key starts with `start`."""
        folders = [path for path in self._entries() if path.name.startswith(f"{self.prefix}{start}")]
        found = [(path, _facts(path)[0]) for path in folders if path.suffix not in (PARTIAL, DAMAGED)]
        return [(path, facts) for path, facts in found if facts is not None]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / f"{self.prefix}lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                self.report.warn(f"waiting for {lock.read()}, which makes {self.what} in {shown(self.folder)}")
                fcntl.flock(lock, fcntl.LOCK_EX)
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            lock.flush()
            yield

    def _set_aside_if_damaged(self, folder: Path) -> dict[str, Any] | None:
        facts, wrong = _facts(folder)
        if wrong:
            aside = folder.with_name(f"{folder.name}{DAMAGED}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            self.report.warn(f"{shown(folder)} is damaged ({wrong}); set aside as {aside.name} and made again")
        return facts

    def _make(self, folder: Path, fill: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """Make a complete entry or none, and remove old ones. We hold the lock, so partial ones are stale."""
        for stale in self.folder.glob(f"{self.prefix}*{PARTIAL}"):
            shutil.rmtree(stale, ignore_errors=True)
        partial = folder.with_name(f"{folder.name}{PARTIAL}")
        try:
            partial.mkdir()
            facts = fill(partial)
            _sync(partial)
            seal(partial, facts)
            partial.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise self._disk_full() from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        for old in self._entries()[self.kept :]:
            shutil.rmtree(old, ignore_errors=True)
        return seal_facts(folder)

    def _entries(self) -> list[Path]:
        """All entries, including damaged ones, the newest first."""
        found = [path for path in self.folder.glob(f"{self.prefix}*") if path.is_dir()]
        return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)

    def _disk_full(self) -> OutOfResource:
        size = sum(file.stat().st_size for entry in self._entries() for file in entry.iterdir()) / GIB
        found = f"no space left for {self.what} in {shown(self.folder)} ({size:.1f} GiB are kept there)"
        again = f"rm -r {quoted(self.folder)}/{self.prefix}*, which is made again when needed"
        return OutOfResource(found, f"free some, or {again}")


def _facts(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """(facts, "") of an undamaged entry, (None, "") of a missing one, (None, problem) of a damaged one."""
    if not folder.exists():
        return None, ""
    try:
        return read_seal(folder), ""
    except (ValueError, OSError) as error:
        return None, str(error)


def _sync(folder: Path) -> None:
    """Flush a folder's files to disk, so no crash leaves a sealed entry with holes."""
    for path in folder.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
