"""Sealed checkpoints of two files, and ways to damage them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.files import seal

FINGERPRINT = {"lr": 0.1}
ADAPTER = "adapter_model.safetensors"


def checkpoint(checkpoints: Path, step: int, eval_loss: float | None = 1.0) -> Path:
    """A sealed checkpoint of two files, one of them in a folder."""
    folder = unsealed(checkpoints, step)
    seal(folder, {"step": step, "eval_loss": eval_loss, "fingerprint": FINGERPRINT})
    return folder


def unsealed(checkpoints: Path, step: int) -> Path:
    folder = checkpoints / f"checkpoint-{step}"
    (folder / "more").mkdir(parents=True)
    (folder / ADAPTER).write_bytes(bytes(range(256)) * 4)
    (folder / "more" / "state.json").write_text(f'{{"step": {step}}}\n')
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip_a_byte(folder: Path) -> None:
    damaged = bytearray((folder / ADAPTER).read_bytes())
    damaged[700] ^= 1
    (folder / ADAPTER).write_bytes(damaged)


def truncate(folder: Path) -> None:
    (folder / ADAPTER).write_bytes((folder / ADAPTER).read_bytes()[:-1])


def empty(folder: Path) -> None:
    (folder / ADAPTER).write_bytes(b"")


def remove_a_file(folder: Path) -> None:
    (folder / ADAPTER).unlink()


def remove_a_file_below(folder: Path) -> None:
    (folder / "more" / "state.json").unlink()


def remove_the_seal(folder: Path) -> None:
    (folder / "sha256.json").unlink()


def leave_the_seal_half_written(folder: Path) -> None:
    (folder / "sha256.json").rename(folder / "sha256.json.partial")


CHANGED = f"{ADAPTER} is not what was saved (sha256 differs)"
NO_SEAL = "no sha256.json: its save was not finished"
DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (flip_a_byte, CHANGED),
    (truncate, CHANGED),
    (empty, CHANGED),
    (remove_a_file, f"{ADAPTER} is missing"),
    (remove_a_file_below, "more/state.json is missing"),
    (remove_the_seal, NO_SEAL),
    (leave_the_seal_half_written, NO_SEAL),
]
every_damage = pytest.mark.parametrize(("damage", "text"), DAMAGES, ids=[row[0].__name__ for row in DAMAGES])
