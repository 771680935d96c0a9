"""Copies of a run off this machine, made in the background: into a mounted folder, or a private Hub repository.

A copy is laid out like the run's own folder: to resume on another machine, put it there and type the same command.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.schema import HUB, OutputConfig
from finetune.files import SEAL, HashedFile, json_object, nearest_folder, quoted, resolve, seal_facts, sha256
from finetune.model import hub
from finetune.runs.checkpoints import BEST, replace_best, saved, thin_out
from finetune.runs.folder import MANIFEST, Run, read_manifest
from finetune.wording import Report, first_line

SNAPSHOT = "copying"  # in the run's folder while it is copied: hard links, so nothing changes under the copy
WAIT_SECONDS = 300.0  # at the end of a start, for a copy that is under way
BLOCK = 2**20


@dataclass(frozen=True)
class Folder:
    """A folder for copies, usually on another disk than `runs`; if it is absent, the disk is not mounted."""

    path: Path
    other_disk: bool
    runs: Path

    def place(self, name: str) -> str:
        """Return where the run called `name` is copied to."""
        return str(self.path / name)

    def command(self, run: Path) -> str:
        """Return the command that copies `run`."""
        return f"cp -r {quoted(run)} {quoted(self.path)}"

    def back(self, run: Path) -> str:
        """Return the command that copies it back to `run`."""
        return f"cp -r {quoted(self.path / run.name)} {quoted(run.parent)}"

    def manifest(self, name: str) -> dict[str, Any]:
        """The manifest of the run called `name` there; empty if there is none."""
        return read_manifest(self.path / name)

    def put(self, snapshot: Path, name: str) -> None:
        """Copy `snapshot`; each part of the previous copy stays until the new one is complete. Raises OSError."""
        if not self.path.is_dir() or (self.other_disk and not on_other_disk(self.path, self.runs)):
            raise OSError(errno.ENODEV, "the disk is not mounted", str(self.path))
        folder = self.path / name
        require_same_run(snapshot, self, name)
        checkpoints = folder / "checkpoints"
        checkpoints.mkdir(parents=True, exist_ok=True)
        # In this order a kill loses nothing: a checkpoint relies on the metrics and the best adapter before it, and the
        # manifest may say "complete".
        for path in snapshot.iterdir():
            if path.is_file() and path.name != MANIFEST:
                _copy(path, folder / path.name)
        for source in sorted((snapshot / "checkpoints").glob("*")):
            _put_sealed(source, checkpoints)
        if saved(checkpoints):
            thin_out(checkpoints, 0)
        _copy(snapshot / MANIFEST, folder / MANIFEST)


@dataclass(frozen=True)
class Repository:
    """A model repository on the Hub, `owner/name`; each copy is one commit, and its history keeps the others."""

    id: str

    def place(self, name: str) -> str:
        """Return where the run called `name` is copied to."""
        return f"{HUB}{self.id}/{name}"

    def command(self, run: Path) -> str:
        """Return the command that copies `run`."""
        return f"hf upload {self.id} {quoted(run)} {run.name} --exclude lock"

    def back(self, run: Path) -> str:
        """Return the command that copies it back to `run`."""
        return f"hf download {self.id} --include {quoted(Path(run.name, '*'))} --local-dir {quoted(run.parent)}"

    def manifest(self, name: str) -> dict[str, Any]:
        """The manifest of the run called `name` there; empty if none can be read. Raises what HfApi raises."""
        return json_object(hub.read_file(self.id, f"{name}/{MANIFEST}") or b"") or {}

    def check(self, name: str) -> dict[str, Any]:
        """The same manifest. Raises CheckFailed if the repository cannot take copies, or the Hub does not answer."""
        return json_object(hub.read_for_copies(self.id, f"{name}/{MANIFEST}") or b"") or {}

    def put(self, snapshot: Path, name: str) -> None:
        """Upload `snapshot` in place of the previous copy. Raises OSError and what huggingface_hub raises."""
        from huggingface_hub import HfApi, RepoFile
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
        require_same_run(snapshot, self, name)
        api = HfApi(hub.endpoint())
        commit = api.upload_folder(
            repo_id=self.id, folder_path=snapshot, path_in_repo=name, delete_patterns="*", commit_message=f"Copy {name}"
        )
        ours = {f"{name}/{path.relative_to(snapshot)}": path for path in snapshot.rglob("*") if path.is_file()}
        found = api.get_paths_info(self.id, list(ours), revision=commit.oid)
        there = {file.path: file for file in found if isinstance(file, RepoFile)}
        for path, source in ours.items():
            file = there.get(path)
            if file is None or (file.lfs.sha256 != sha256(source) if file.lfs else file.blob_id != _git_blob(source)):
                raise _differs(path)


def target_of(output: OutputConfig) -> Folder | Repository | None:
    """Return the target of output.copy_to; None if that is null."""
    if output.copy_to is None:
        return None
    if output.copy_to.startswith(HUB):
        return Repository(output.copy_to.removeprefix(HUB))
    path, runs = resolve(output.copy_to), resolve(output.dir)
    return Folder(path, on_other_disk(path, runs), runs)


def on_other_disk(path: Path, runs: Path) -> bool:
    """Whether `path` exists and is on another disk than `runs`, or the nearest folder above it that exists."""
    return path.is_dir() and path.stat().st_dev != nearest_folder(runs).stat().st_dev


def same_run(ours: Path, there: dict[str, Any]) -> bool:
    """Whether a copy's manifest is empty or that of the run in `ours`: both begin with the same start."""
    starts = there.get("starts")
    return not starts or starts[0]["started"] == read_manifest(ours).get("starts", [{}])[0].get("started")


def require_same_run(ours: Path, target: Folder | Repository, name: str) -> None:
    """Raise FileExistsError if `target` has another run called `name`."""
    if not same_run(ours, target.manifest(name)):
        raise FileExistsError(errno.EEXIST, "contains another run", target.place(name))


class Copies:
    """Copies one run to `target`, one copy at a time; with `checkpoints` its newest checkpoint too.

    A copy that fails never stops a training: the first failure is reported, and the next copy tries again.
    """

    def __init__(self, run: Run, target: Folder | Repository, checkpoints: bool, report: Report) -> None:
        self.run, self.target, self.checkpoints, self._report = run, target, checkpoints, report
        self._thread: threading.Thread | None = None
        self._again = self._warned = False
        self._problem: str | None = None

    def begin(self) -> None:
        """Copy the run as it is now; if a copy is under way, copy it again after that one."""
        if self._thread is not None:
            self._again = True
            return
        self._again, self._problem = False, None
        try:
            snapshot = self._snapshot()
        except OSError as error:
            self._problem = _reason(error)
            return
        self._thread = threading.Thread(target=self._put, args=(snapshot,), daemon=True)
        self._thread.start()

    def poll(self) -> None:
        """Report a failure, once; begin a copy that was waiting."""
        if self._thread is not None and not self._thread.is_alive():
            self._thread = None
        if self._thread is None:
            if self._problem is None:
                self._warned = False
            elif not self._warned:
                self._warned = True
                found = f"not copied to {self.target.place(self.run.name)}: {self._problem}"
                self._report.warn(f"{found}; training continues, and the next copy tries again")
            if self._again:
                self.begin()

    @contextmanager
    def finished(self) -> Iterator[None]:
        """Copy the run after the block; report where to, or why that failed and the command to copy it."""
        try:
            yield
        except Exception:  # a second Ctrl-C, which quits at once, is no Exception
            self._finish()
            raise
        self._finish()

    def _finish(self) -> None:
        place = self.target.place(self.run.name)
        self._report.progress(f"copying to {place}")
        self._wait()
        self._again = False
        if self._thread is None:
            self.begin()
            self._wait()
        late = f"not finished within {WAIT_SECONDS:g} s" if self._thread is not None else None
        if problem := self._problem or late:
            by_hand = self.target.command(self.run.folder)
            self._report.warn(f"not copied to {place}: {problem}; to copy it, type: {by_hand}")
        else:
            self._report.decision("copied", place)
        if self._thread is None:
            shutil.rmtree(self.run.folder / SNAPSHOT, ignore_errors=True)

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join(WAIT_SECONDS)
            if not self._thread.is_alive():
                self._thread = None

    def _put(self, snapshot: Path) -> None:
        try:
            self.target.put(snapshot, self.run.name)
        except Exception as error:  # noqa: BLE001  # runs in a thread: report it; training continues
            self._problem = _reason(error)

    def _snapshot(self) -> Path:
        """Link or copy the run's files and sealed folders into a folder that training does not change."""
        snapshot = self.run.folder / SNAPSHOT
        shutil.rmtree(snapshot, ignore_errors=True)
        snapshot.mkdir()
        newest = [folder for folder in saved(self.run.checkpoints) if (folder / SEAL).is_file()][-1:]
        best = [self.run.checkpoints / BEST] if (self.run.checkpoints / BEST).is_dir() else []
        for folder in (*best, *(newest if self.checkpoints else ())):
            shutil.copytree(folder, snapshot / "checkpoints" / folder.name, copy_function=os.link)
        for path in self.run.folder.iterdir():
            if path.is_file() and path.name != "lock" and path.suffix != ".partial":
                put = shutil.copyfile if path.suffix == ".jsonl" else os.link  # training appends to the .jsonl files
                put(path, snapshot / path.name)
        return snapshot


def _put_sealed(source: Path, checkpoints: Path) -> None:
    """Copy a sealed folder under another name, its seal last, then rename it."""
    target, partial = checkpoints / source.name, checkpoints / f"{source.name}.partial"
    if (target / SEAL).is_file() and (target / SEAL).read_bytes() == (source / SEAL).read_bytes():
        return
    shutil.rmtree(partial, ignore_errors=True)
    for name in (*seal_facts(source)["files"], SEAL):
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        _copy(source / name, partial / name)
    if source.name == BEST:
        replace_best(checkpoints, partial)
        return
    old = target.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.is_dir():  # sealed again since, with the loss of an evaluation
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    """Copy a file whole or not at all: write another name, sync, read back and compare, rename."""
    partial = target.with_name(f"{target.name}.partial")
    with HashedFile(source) as read, partial.open("wb") as written:
        shutil.copyfileobj(read, written, BLOCK)
        written.flush()
        os.fsync(written.fileno())
        if sys.platform == "linux":  # read back from the disk or server, not from this machine's memory
            os.posix_fadvise(written.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        digest = read.sha256()
    if sha256(partial) != digest:
        raise _differs(str(target))
    partial.replace(target)


def _git_blob(path: Path) -> str:
    """Return git's hash of a small file, which the Hub uses too."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _differs(path: str) -> OSError:
    return OSError(errno.EIO, "the copy is not what was sent (sha256 differs)", path)


def _reason(error: Exception) -> str:
    """Return why a copy failed, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return first_line(error)
