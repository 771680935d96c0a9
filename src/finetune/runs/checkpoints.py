"""Checkpoints are used only if complete: their sha256 seal is written last. The best are kept, others deleted."""

from __future__ import annotations

import math
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from finetune.errors import CheckFailed, DiskFull
from finetune.files import SEAL, quoted, read_seal, seal_facts, shown

BEST = "best"
ASIDE = "damaged-"


@contextmanager
def room_for(folder: Path, needed_bytes: int) -> Iterator[None]:
    """Write `needed_bytes` in `folder` within the block, or raise DiskFull with path and sizes.

    Free space is checked first, so that a full disk leaves no half-written file; and after a failure, which libraries
    report in many ways (an OSError, torch's RuntimeError, safetensors' own error).
    """
    free_bytes = shutil.disk_usage(folder).free  # fails if the folder is gone, which a library would create again
    sizes = f"{shown(folder)} has {free_bytes / 2**20:,.1f} MiB free, a save takes {needed_bytes / 2**20:,.1f}"
    if free_bytes < needed_bytes:
        raise DiskFull(f"no space left: {sizes}", "free some, then type the same command again")
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        of_a_file = re.search("PytorchStreamWriter|inline_container|unexpected pos", str(error))
        if isinstance(error, RuntimeError) and not of_a_file:
            raise  # from the device, not the disk
        raise DiskFull(f"cannot save: {error} ({sizes})", "fix that, then type the same command again") from error


def step_of(folder: Path) -> int:
    """N of `checkpoint-N`."""
    return int(folder.name.rsplit("-", 1)[1])


def saved(checkpoints: Path) -> list[Path]:
    """The `checkpoint-N` folders, oldest first, intact or not."""
    found = [path for path in checkpoints.glob("checkpoint-*") if path.name.rsplit("-", 1)[1].isdigit()]
    return sorted(found, key=step_of)


# What torch raises for a file it did not write, or that weights_only refuses.
UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, ValueError, AttributeError)


def refuse_code(folder: Path) -> None:
    """Raise ValueError if a file contains Python objects: loading them runs code, and a seal is not a signature."""
    import torch  # here, so that callers who only need a hash do not wait for it
    from transformers.trainer_pt_utils import safe_globals

    for path in sorted(folder.glob("*.pt*")):
        try:
            with safe_globals():  # as transformers does; memory-mapped, so no tensor is read
                torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except UNREADABLE:
            raise ValueError(f"{path.name} holds more than tensors and plain values") from None


def damage(folder: Path) -> str | None:
    """Why the sealed `folder` cannot be used; None if it is intact.

    Raises CheckFailed if this user may not read it, which says nothing about its content.
    """
    try:
        read_seal(folder)
        refuse_code(folder)
    except PermissionError as error:
        found = f"{shown(Path(error.filename))} cannot be read: {error.strerror}"
        raise CheckFailed(
            found, f"sudo chown -R $(id -u) {quoted(folder)} makes it yours; --fresh starts a new run"
        ) from None
    except (ValueError, OSError) as error:
        return str(error)
    return None


def replace_best(checkpoints: Path, new: Path) -> None:
    """Replace the best adapter with the sealed folder `new`; at every moment one of the two exists."""
    best, old = checkpoints / BEST, checkpoints / f"{BEST}.old"
    shutil.rmtree(old, ignore_errors=True)
    if best.is_dir():
        best.rename(old)
    new.rename(best)
    shutil.rmtree(old, ignore_errors=True)


def find_best(checkpoints: Path, fingerprint: dict[str, Any]) -> tuple[Path | None, str | None]:
    """The folder of the best adapter so far, and why it cannot be used: it is damaged, or from another run.

    A kill inside replace_best leaves it in a folder next to `best`, from which `settle_best` renames it.
    """
    folders = [checkpoints / BEST]
    if not folders[0].is_dir():
        folders = [folder for folder in _beside_best(checkpoints) if damage(folder) is None]
    if not folders:
        return None, None
    reason = damage(folders[0])
    if reason is None and seal_facts(folders[0]).get("fingerprint") != fingerprint:
        reason = "trained with another config or data"
    return folders[0], reason


def settle_best(checkpoints: Path, found: Path | None) -> Path:
    """Clean up after a kill inside replace_best: rename `found` to `best` and remove the rest."""
    if found is not None and found.name != BEST:
        found.rename(checkpoints / BEST)
    for folder in _beside_best(checkpoints):
        shutil.rmtree(folder, ignore_errors=True)
    return checkpoints / BEST


def _beside_best(checkpoints: Path) -> list[Path]:
    return [checkpoints / f"{BEST}.partial", checkpoints / f"{BEST}.old"]


def set_aside(folder: Path) -> Path:
    """Quarantine what cannot be used by renaming it, so that nothing a person might still want is deleted."""
    number = 1
    while (aside := folder.with_name(f"{ASIDE}{folder.name}.{number}")).exists():
        number += 1
    return folder.rename(aside)


def thin_out(checkpoints: Path, keep: int) -> None:
    """Delete all sealed checkpoints except the newest and the `keep` best by eval_loss.

    Those saved between two evaluations, which have no eval_loss, rank after the others, the newest first.
    """
    ranks = {}
    for folder in saved(checkpoints):
        try:
            loss = seal_facts(folder).get("eval_loss")
        except ValueError:
            continue
        ranks[folder] = (math.inf, -step_of(folder)) if loss is None else (loss, step_of(folder))
    best = sorted(ranks, key=lambda folder: ranks[folder])[:keep]
    for folder in list(ranks)[:-1]:
        if folder not in best:
            (folder / SEAL).unlink()  # first, so that a half-deleted folder is never taken for a complete one
            shutil.rmtree(folder)
