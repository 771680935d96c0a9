"""A checkpoint is whole or not used, damaged ones are set aside, and the best three and the newest are kept."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from finetune.errors import DiskFull
from finetune.files import read_seal, seal, sha256, write_json
from finetune.runs.checkpoints import damage as damage_of
from finetune.runs.checkpoints import room_for, saved, thin_out
from support.sealed import ADAPTER, NO_SEAL, checkpoint, every_damage, names, unsealed

# --- seals


def test_a_seal_gives_back_its_facts_and_the_hash_of_every_file(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 4, eval_loss=1.5)
    facts = read_seal(folder)
    assert facts.pop("files") == {
        ADAPTER: sha256(folder / ADAPTER),
        "more/state.json": sha256(folder / "more/state.json"),
    }
    assert facts == {"step": 4, "eval_loss": 1.5, "fingerprint": {"lr": 0.1}}


def test_sealing_again_takes_the_files_as_they_are_now(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 4)
    (folder / ADAPTER).write_bytes(b"other")
    seal(folder, {"step": 4})
    assert read_seal(folder)["files"][ADAPTER] == sha256(folder / ADAPTER)
    assert "sha256.json" not in read_seal(folder)["files"]


@every_damage
def test_a_seal_tells_what_is_not_as_it_was_saved(tmp_path: Path, damage: Callable[[Path], None], text: str) -> None:
    folder = checkpoint(tmp_path, 4)
    damage(folder)
    with pytest.raises(ValueError) as failure:
        read_seal(folder)
    assert str(failure.value) == text


@pytest.mark.parametrize("length", [0, 1, 40])
def test_a_seal_cut_short_vouches_for_nothing(tmp_path: Path, length: int) -> None:
    folder = checkpoint(tmp_path, 4)
    (folder / "sha256.json").write_bytes((folder / "sha256.json").read_bytes()[:length])
    assert damage_of(folder) is not None


# --- thinning out


def test_the_best_three_by_eval_loss_and_the_newest_are_kept(tmp_path: Path) -> None:
    for step, loss in {2: 5.0, 4: 1.0, 6: 4.0, 8: 2.0, 10: 3.0, 12: 6.0}.items():
        checkpoint(tmp_path, step, loss)
    thin_out(tmp_path, 3)
    assert saved(tmp_path) == [tmp_path / f"checkpoint-{step}" for step in (4, 8, 10, 12)]
    assert all(read_seal(folder) for folder in saved(tmp_path))


def test_the_newest_may_be_one_of_the_best(tmp_path: Path) -> None:
    for step, loss in {2: 5.0, 4: 4.0, 6: 3.0, 8: 2.0}.items():
        checkpoint(tmp_path, step, loss)
    thin_out(tmp_path, 3)
    assert saved(tmp_path) == [tmp_path / f"checkpoint-{step}" for step in (4, 6, 8)]


def test_of_equal_losses_the_earlier_is_kept_and_no_loss_counts_as_the_worst(tmp_path: Path) -> None:
    for step, loss in {2: None, 4: 2.0, 6: 2.0, 8: None}.items():
        checkpoint(tmp_path, step, loss)
    thin_out(tmp_path, 1)
    assert saved(tmp_path) == [tmp_path / "checkpoint-4", tmp_path / "checkpoint-8"]


def test_folders_without_a_seal_and_other_folders_are_never_touched(tmp_path: Path) -> None:
    for step in (1, 3, 99):
        unsealed(tmp_path, step)
    for step, loss in {2: 2.0, 4: 1.0, 6: 3.0}.items():
        checkpoint(tmp_path, step, loss)
    for other in ("best", "damaged-checkpoint-2.1"):
        unsealed(tmp_path, 7).rename(tmp_path / other)
    thin_out(tmp_path, 1)
    kept = ["best", *(f"checkpoint-{step}" for step in (1, 3, 4, 6, 99)), "damaged-checkpoint-2.1"]
    assert names(tmp_path) == kept


def test_a_removal_cut_short_leaves_a_folder_that_no_seal_vouches_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (2, 4, 6):
        checkpoint(tmp_path, step, float(step))

    def killed(_folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("finetune.runs.checkpoints.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        thin_out(tmp_path, 1)
    with pytest.raises(ValueError, match=NO_SEAL):
        read_seal(tmp_path / "checkpoint-4")
    assert (tmp_path / "checkpoint-4" / ADAPTER).is_file()


# --- whole files


def test_json_is_written_readably_and_nothing_else_is_left(tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", {"name": "Zürich", "steps": 3})
    assert (tmp_path / "manifest.json").read_text(encoding="utf-8") == '{\n  "name": "Zürich",\n  "steps": 3\n}\n'
    assert names(tmp_path) == ["manifest.json"]


@pytest.mark.parametrize("before", [None, '{"status": "interrupted"}'], ids=["new", "over an older one"])
def test_json_that_cannot_be_written_leaves_the_file_as_it_was(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "manifest.json"
    if before is not None:
        path.write_text(before)
    with pytest.raises(TypeError):
        write_json(path, {"status": "complete", "steps": 3, "set": {1, 2}})  # fails after the first keys
    assert (path.read_text() if path.exists() else None) == before


def test_a_power_cut_before_the_rename_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "manifest.json"
    write_json(path, {"status": "interrupted"})
    synced: list[str] = []

    def cut(partial: Path, _target: Path) -> Path:
        synced.append(partial.read_text())
        raise OSError("power cut")

    monkeypatch.setattr(Path, "replace", cut)
    with pytest.raises(OSError, match="power cut"):
        write_json(path, {"status": "complete"})
    assert json.loads(path.read_text()) == {"status": "interrupted"}
    assert json.loads(synced[0]) == {"status": "complete"}  # what would have been renamed was whole


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"files": []}', '{"files": {', ""])
def test_a_seal_of_another_shape_is_told_and_thinning_leaves_its_folder(tmp_path: Path, text: str) -> None:
    folder = checkpoint(tmp_path, 1)
    (folder / "sha256.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"^sha256\.json cannot be read$"):
        read_seal(folder)
    checkpoint(tmp_path, 2)
    checkpoint(tmp_path, 3)
    thin_out(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_a_file_that_was_not_there_when_it_was_sealed_is_told(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 1)
    (folder / "extra.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^extra\.bin was not there when it was saved$"):
        read_seal(folder)


# --- room for a save


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DiskFull) as refused, room_for(tmp_path, 2**60):
        (tmp_path / "written").touch()
    assert not (tmp_path / "written").exists()
    text = rf"no space left: {tmp_path} has [0-9.,]+ MiB free, a save takes 1,099,511,627,776.0; "
    assert re.fullmatch(text + "free some, then type the same command again", str(refused.value))
    assert refused.value.exit_code == 6


@pytest.mark.parametrize(
    "error",
    [
        OSError(30, "Read-only file system"),
        RuntimeError("[enforce fail at inline_container.cc:626] . unexpected pos 64 vs 0"),
        RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed"),
        SafetensorError("Error while serializing: I/O error: No space left on device"),
    ],
)
def test_a_save_that_fails_on_the_disk_is_told_with_the_sizes(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(DiskFull) as refused, room_for(tmp_path, 2**20):
        raise error
    text = rf"cannot save: {re.escape(str(error))} \({tmp_path} has [0-9.,]+ MiB free, a save takes 1.0\); "
    assert re.fullmatch(text + "fix that, then type the same command again", str(refused.value))


def test_a_devices_error_during_a_save_is_no_disks(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^CUDA error: an illegal memory access$"), room_for(tmp_path, 1):
        raise RuntimeError("CUDA error: an illegal memory access")
