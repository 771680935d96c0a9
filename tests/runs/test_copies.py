"""A run's copy on another disk or on the Hub: whole or not there, of this run only, and never a reason to stop."""

from __future__ import annotations

import errno
import hashlib
import json
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import RepoFile

from finetune.files import read_seal, seal, write_json
from finetune.runs import copies
from finetune.runs.copies import Copies, Folder, Repository
from finetune.runs.folder import Run
from finetune.wording import Report


class Said:
    """What a run's copies report."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.report = Report(
            print,
            lambda what, why: self.lines.append(f"{what}: {why}"),
            lambda text: self.lines.append(text),
        )


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run at step 4 whose best adapter is that of step 2."""
    made = Run(tmp_path / "adapters" / "run", False, None)
    for name, step in (("best", 2), ("checkpoint-2", 2), ("checkpoint-4", 4)):
        save(made, name, step)
    write_json(made.folder / "manifest.json", {"status": "interrupted", "starts": [{"started": "today"}]})
    (made.folder / "metrics.jsonl").write_text("{}\n")
    (made.folder / "lock").touch()
    return made


def save(run: Run, name: str, step: int) -> None:
    folder = run.checkpoints / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(bytes([step]) * 1000)
    seal(folder, {"step": step})


@pytest.fixture
def disk(tmp_path: Path) -> Folder:
    (tmp_path / "disk").mkdir()
    return Folder(tmp_path / "disk", False, tmp_path / "adapters")


def copied(run: Run, target: Folder | Repository, checkpoints: bool = True) -> list[str]:
    """What a start says that copies the run once, as it ends."""
    said = Said()
    with Copies(run, target, checkpoints, said.report).finished():
        pass
    return said.lines


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# In a folder ----------------------------------------------------------------------------------------------------------


def test_the_copy_is_a_run_folder_with_the_best_adapter_and_the_newest_checkpoint(run: Run, disk: Folder) -> None:
    assert copied(run, disk) == [f"copied: {disk.path}/run"]
    ours = tree(run.folder)
    kept = [name for name in ours if name != "lock" and "checkpoint-2" not in name]
    assert tree(disk.path / "run") == {name: ours[name] for name in kept}
    assert not (run.folder / "copying").exists()


def test_without_checkpoints_only_the_best_adapter_is_copied(run: Run, disk: Folder) -> None:
    copied(run, disk, checkpoints=False)
    assert [path.name for path in (disk.path / "run" / "checkpoints").iterdir()] == ["best"]


def test_the_next_copy_replaces_what_changed_and_writes_nothing_else_again(run: Run, disk: Folder) -> None:
    copied(run, disk)
    there = disk.path / "run" / "checkpoints"
    before = (there / "best" / "adapter_model.safetensors").stat().st_ino
    save(run, "checkpoint-6", 6)
    copied(run, disk)
    assert sorted(path.name for path in there.iterdir()) == ["best", "checkpoint-6"]
    assert (there / "best" / "adapter_model.safetensors").stat().st_ino == before
    save(run, "best", 6)
    seal(run.checkpoints / "checkpoint-6", {"step": 6, "eval_loss": 1.0})
    copied(run, disk)
    assert sorted(path.name for path in there.iterdir()) == ["best", "checkpoint-6"]
    assert (read_seal(there / "best")["step"], read_seal(there / "checkpoint-6")["eval_loss"]) == (6, 1.0)


@pytest.mark.parametrize("last", range(1, 9))
def test_a_copy_that_ends_at_any_file_leaves_the_previous_one_whole(
    last: int, run: Run, disk: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(run, disk)
    save(run, "best", 4)
    save(run, "checkpoint-6", 6)
    written = []

    def until_the_last(source: Path, target: Path) -> None:
        written.append(target)
        if len(written) == last:
            target.with_name(f"{target.name}.partial").write_bytes(source.read_bytes()[:1])
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        real(source, target)

    real = copies._copy
    monkeypatch.setattr(copies, "_copy", until_the_last)
    if said := copied(run, disk)[0]:
        assert said.startswith(f"not copied to {disk.path}/run: {disk.path}/run/") or last > 6
    monkeypatch.undo()
    whole = [folder for folder in (disk.path / "run" / "checkpoints").iterdir() if folder.suffix != ".partial"]
    assert {folder.name.rpartition("-")[0] for folder in whole} == {"", "checkpoint"}
    assert read_seal(disk.path / "run" / "checkpoints" / "best")["step"] in (2, 4)
    assert json.loads((disk.path / "run" / "manifest.json").read_text())["status"] == "interrupted"
    assert copied(run, disk) == [f"copied: {disk.path}/run"]
    assert sorted(folder.name for folder in (disk.path / "run" / "checkpoints").iterdir()) == ["best", "checkpoint-6"]


def test_a_copy_that_is_not_what_was_sent_is_not_put_in_place(
    run: Run, disk: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "sha256", str)
    [said] = copied(run, disk)
    wrong = disk.path / "run" / "metrics.jsonl"
    by_hand = f"cp -r {run.folder} {disk.path}"
    differs = "the copy is not what was sent (sha256 differs)"
    assert said == f"not copied to {disk.path}/run: {wrong}: {differs}; to copy it, type: {by_hand}"
    assert not wrong.exists()


def test_another_runs_copy_is_left_alone(run: Run, disk: Folder) -> None:
    copied(run, disk)
    before = tree(disk.path)
    write_json(run.folder / "manifest.json", {"starts": [{"started": "tomorrow"}]})
    assert copied(run, disk)[0].startswith(f"not copied to {disk.path}/run: {disk.path}/run: contains another run; ")
    assert tree(disk.path) == before


def test_a_disk_that_is_not_mounted_is_not_written(run: Run, disk: Folder) -> None:
    said = copied(run, replace(disk, other_disk=True))
    assert said[0].startswith(f"not copied to {disk.path}/run: {disk.path}: the disk is not mounted; ")
    assert list(disk.path.iterdir()) == []


# In the background ----------------------------------------------------------------------------------------------------


class Slow(Folder):
    """Blocks in each copy until `go` is set, and fails if `fails` is."""

    def __init__(self, folder: Folder) -> None:
        super().__init__(folder.path, folder.other_disk, folder.runs)
        object.__setattr__(self, "go", threading.Event())
        object.__setattr__(self, "fails", False)
        object.__setattr__(self, "steps", [])

    go: threading.Event
    fails: bool
    steps: list[int]

    def put(self, snapshot: Path, name: str) -> None:
        assert self.go.wait(30)
        if self.fails:
            raise OSError(errno.EIO, "Input/output error", "/disk")
        self.steps.append(read_seal(snapshot / "checkpoints" / "best")["step"])


def polled(made: Copies) -> None:
    while made._thread is not None and made._thread.is_alive():
        made._thread.join(0.01)
    made.poll()


def test_a_copy_is_of_the_moment_it_began_and_the_next_one_waits_for_it(run: Run, disk: Folder) -> None:
    slow, said = Slow(disk), Said()
    made = Copies(run, slow, True, said.report)
    made.begin()
    for step in (4, 6):  # in this time the best adapter is replaced twice
        (run.checkpoints / "best").rename(run.checkpoints / f"old-{step}")
        save(run, "best", step)
        made.begin()
    made.poll()
    assert slow.steps == []
    slow.go.set()
    polled(made)
    polled(made)
    assert slow.steps == [2, 6]
    assert said.lines == []


def test_a_failure_is_reported_once_and_again_only_after_a_copy_that_worked(run: Run, disk: Folder) -> None:
    slow, said = Slow(disk), Said()
    slow.go.set()
    made = Copies(run, slow, True, said.report)
    for fails in (True, True, False, True):
        object.__setattr__(slow, "fails", fails)
        made.begin()
        polled(made)
    found = f"not copied to {disk.path}/run: /disk: Input/output error"
    warning = f"{found}; training continues, and the next copy tries again"
    assert said.lines == [warning, warning]


def test_what_is_not_copied_in_time_is_reported(run: Run, disk: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "WAIT_SECONDS", 0.1)
    slow = Slow(disk)
    by_hand = f"cp -r {run.folder} {disk.path}"
    assert copied(run, slow) == [
        f"not copied to {disk.path}/run: not finished within 0.1 s; to copy it, type: {by_hand}"
    ]
    slow.go.set()


def test_a_program_that_ends_at_once_copies_nothing_more(run: Run, disk: Folder) -> None:
    with pytest.raises(KeyboardInterrupt), Copies(run, disk, True, Said().report).finished():
        raise KeyboardInterrupt
    assert list(disk.path.iterdir()) == []


# On the Hub -----------------------------------------------------------------------------------------------------------


class Hub:
    """The Hub as huggingface_hub talks to it: files of one commit, large ones by sha256, others by git's hash."""

    def __init__(self, damage: str = "") -> None:
        self.damage, self.asked, self.files = damage, {}, {}

    def __call__(self, endpoint: str) -> Hub:
        return self

    def upload_folder(self, *, folder_path: Path, path_in_repo: str, **asked: Any) -> Any:
        self.asked = asked
        self.files = {f"{path_in_repo}/{name}": content for name, content in tree(folder_path).items()}
        return SimpleNamespace(oid="c0ffee")

    def file_exists(self, repository: str, path: str) -> bool:
        return (repository, path in self.files) == ("me/copies", True)

    def hf_hub_download(self, repository: str, path: str, local_dir: str) -> str:
        file = Path(local_dir, path)
        file.parent.mkdir(parents=True)
        file.write_bytes(self.files[path])
        return str(file)

    def get_paths_info(self, repository: str, paths: list[str], revision: str) -> list[RepoFile]:
        assert (repository, revision) == ("me/copies", "c0ffee")
        return [self.known(path) for path in paths if path != self.damage or not path.endswith("metrics.jsonl")]

    def known(self, path: str) -> RepoFile:
        content = self.files[path] + (b"x" if path == self.damage else b"")
        lfs = {"size": len(content), "oid": hashlib.sha256(content).hexdigest(), "pointerSize": 134}
        oid = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        large = {"lfs": lfs} if path.endswith("safetensors") else {}
        return RepoFile(path=path, size=len(content), oid=oid, **large)


BEST = "run/checkpoints/best/adapter_model.safetensors"


def test_a_copy_on_the_hub_is_one_commit_in_place_of_the_last(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", there)
    assert copied(run, Repository("me/copies")) == ["copied: hf://me/copies/run"]
    assert there.asked == {"repo_id": "me/copies", "delete_patterns": "*", "commit_message": "Copy run"}
    assert {BEST, "run/manifest.json"} <= set(there.files)


def test_another_runs_copy_on_the_hub_is_left_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", there)
    assert [copied(run, Repository("me/copies")) for _ in range(2)] == [["copied: hf://me/copies/run"]] * 2
    before = there.files
    write_json(run.folder / "manifest.json", {"starts": [{"started": "tomorrow"}]})
    another = "hf://me/copies/run: contains another run"
    assert copied(run, Repository("me/copies"))[0].startswith(f"not copied to hf://me/copies/run: {another}; ")
    assert there.files is before


@pytest.mark.parametrize("damaged", [b"\xff", b"{", b"[]", b"[" * 100_000])
def test_a_copy_on_the_hub_with_a_damaged_manifest_is_replaced(
    damaged: bytes, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", there)
    copied(run, Repository("me/copies"))
    there.files["run/manifest.json"] = damaged
    assert copied(run, Repository("me/copies")) == ["copied: hf://me/copies/run"]
    assert there.files["run/manifest.json"] == (run.folder / "manifest.json").read_bytes()


@pytest.mark.parametrize("damage", [BEST, "run/manifest.json", "run/metrics.jsonl"])
def test_a_file_that_the_hub_does_not_have_as_it_was_sent_is_a_failure(
    damage: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub(damage))
    differs = "the copy is not what was sent (sha256 differs)"
    by_hand = f"hf upload me/copies {run.folder} run --exclude lock"
    assert copied(run, Repository("me/copies")) == [
        f"not copied to hf://me/copies/run: {damage}: {differs}; to copy it, type: {by_hand}"
    ]
