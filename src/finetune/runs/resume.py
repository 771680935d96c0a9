"""Whether a run goes on from a checkpoint, and whether that checkpoint belongs to what is asked for now."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import CheckFailed, ConfigError
from finetune.runs.checkpoints import ASIDE, BEST, SEAL, newest_whole, read_seal, set_aside, step_of, trusted_best
from finetune.runs.folder import Run
from finetune.terminal import Terminal


@dataclass(frozen=True)
class Resume:
    """Where a start goes on: a checkpoint, or None for the run's beginning; what it accepted, and what it set aside."""

    checkpoint: Path | None
    changes: tuple[str, ...] = ()
    set_aside: tuple[str, ...] = ()


def find(run: Run, fingerprint: dict[str, Any], accept_changes: bool, terminal: Terminal) -> Resume:
    """Where the run goes on.

    Checkpoints that are not whole are set aside, and said so; so is a best adapter that is not this run's. Raises
    CheckFailed where none is whole, and ConfigError where config, data or versions differ from the checkpoint's and
    `accept_changes` is false.
    """
    folder, aside = newest_whole(run.checkpoints)
    for sentence in aside:
        terminal.warn(sentence)
    if folder is None and any(run.checkpoints.glob(f"{ASIDE}checkpoint-*/{SEAL}")):  # no seal: killed in its first save
        raise CheckFailed(f"no checkpoint in {run.checkpoints} is whole; --fresh starts a new run")
    changes = list(differences(read_seal(folder)["fingerprint"], fingerprint)) if folder else []
    if folder and changes and not accept_changes:
        advice = "--fresh starts a new run, --resume-changed goes on all the same"
        raise ConfigError(*(f"changed since {folder.name}: {change}" for change in changes), advice=advice)
    for change in changes:
        terminal.warn(f"going on although changed: {change}")
    if note := trusted_best(run.checkpoints, fingerprint):  # not before: a refused command changes nothing
        terminal.warn(note)
        aside.append(note)
    if folder and not changes and not (run.checkpoints / BEST).is_dir():
        folder, notes = _before_best(run, folder)
        for sentence in notes:
            terminal.warn(sentence)
        aside += notes
    if folder:
        terminal.decision("resume", f"from {folder.name}, the newest checkpoint that is whole")
    return Resume(folder, tuple(changes), tuple(aside))


def _before_best(run: Run, folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint from which the best step so far is trained again, so that its adapter is there again.

    With a sentence for each newer one, which is set aside.
    """
    best = best_step(folder)
    found: Path | None = folder
    notes = []
    while found and step_of(found) >= best:
        aside = set_aside(found)
        (aside / SEAL).unlink()  # it was whole, so it is no reason to refuse a start
        notes.append(f"{found.name} set aside as {aside.name}: the best adapter, of step {best}, is made again")
        found, damaged = newest_whole(run.checkpoints)
        notes += damaged
    return found, notes


def best_step(folder: Path) -> int:
    """The step of the least eval_loss so far, as the checkpoint in `folder` knows; one after its own where none was."""
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    return min(losses, key=lambda step: losses[step], default=step_of(folder) + 1)


def differences(then: Any, now: Any, path: str = "") -> Iterator[str]:
    """Each leaf that differs between two trees, as `path: then -> now`."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted(then.keys() | now.keys()):
            yield from differences(then.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif then != now:
        yield f"{path}: {then} -> {now}"
