"""Checkpoints that are whole or not used: a sha256 manifest is written last. The best are kept, others thinned out."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

SEAL = "sha256.json"


def write_json(path: Path, content: Any) -> None:
    """Write `path` whole or not at all: another name, fsync, rename."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=2, ensure_ascii=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def sha256(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Mark `folder` as whole: every file's sha256, and `facts` such as step, eval_loss and the run's fingerprint."""
    files = {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    files.pop(SEAL, None)
    write_json(folder / SEAL, {**facts, "files": files})


def read_seal(folder: Path) -> dict[str, Any]:
    """The facts of a sealed folder. Raises ValueError with what is wrong where a file is missing, changed or new."""
    if not (folder / SEAL).is_file():
        raise ValueError(f"no {SEAL}: its save was not finished")
    facts: dict[str, Any] = json.loads((folder / SEAL).read_text(encoding="utf-8"))
    for name, digest in facts["files"].items():
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
        if sha256(folder / name) != digest:
            raise ValueError(f"{name} is not what was saved (sha256 differs)")
    return facts


def step_of(folder: Path) -> int:
    """N of `checkpoint-N`."""
    return int(folder.name.rsplit("-", 1)[1])


def saved(checkpoints: Path) -> list[Path]:
    """The `checkpoint-N` folders, oldest first, whole or not."""
    found = [path for path in checkpoints.glob("checkpoint-*") if path.name.rsplit("-", 1)[1].isdigit()]
    return sorted(found, key=step_of)


def newest_whole(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that its seal vouches for, and a sentence for each newer one, which is set aside."""
    notes = []
    for folder in reversed(saved(checkpoints)):
        try:
            read_seal(folder)
        except (ValueError, KeyError, OSError) as error:
            aside = _aside(folder)
            folder.rename(aside)
            notes.append(f"{folder.name} is not whole ({error}); set aside as {aside.name}")
            continue
        return folder, notes
    return None, notes


def _aside(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"damaged-{folder.name}.{number}")).exists():
        number += 1
    return aside


def thin_out(checkpoints: Path, keep: int) -> None:
    """Remove all sealed checkpoints but the `keep` best by eval_loss and the newest."""
    losses = {}
    for folder in saved(checkpoints):
        if (folder / SEAL).is_file():
            loss = json.loads((folder / SEAL).read_text(encoding="utf-8")).get("eval_loss")
            losses[folder] = float("inf") if loss is None else loss
    best = sorted(losses, key=lambda folder: (losses[folder], step_of(folder)))[:keep]
    for folder in list(losses)[:-1]:
        if folder not in best:
            (folder / SEAL).unlink()  # first, so that a half-removed folder is never taken for whole
            shutil.rmtree(folder)
