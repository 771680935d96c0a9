"""Whether a run goes on from a checkpoint, and whether that checkpoint belongs to what is asked for now."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.checkpoints import ASIDE, BEST, SEAL, newest_whole, read_seal, set_aside, step_of, trusted_best
from finetune.errors import CheckFailed, ConfigError
from finetune.report import Terminal
from finetune.runs import Run


def find(run: Run, fingerprint: dict[str, Any], accept_changes: bool, terminal: Terminal) -> Path | None:
    """The checkpoint to go on from, or None for a run from its start.

    Checkpoints that are not whole are set aside, and said so; so is a best adapter that is not this run's. Raises
    CheckFailed where none is whole, and ConfigError where config, data or versions differ from the checkpoint's and
    `accept_changes` is false.
    """
    folder, notes = newest_whole(run.checkpoints)
    for sentence in notes:
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
    if folder and not changes and not (run.checkpoints / BEST).is_dir():
        folder = _before_best(run, folder, terminal)
    if folder:
        terminal.decision("resume", f"from {folder.name}, the newest checkpoint that is whole")
    return folder


def _before_best(run: Run, folder: Path, terminal: Terminal) -> Path | None:
    """The newest checkpoint from which the best step so far is trained again, so that its adapter is there again."""
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    best = min(losses, key=lambda step: losses[step], default=step_of(folder) + 1)
    found: Path | None = folder
    while found and step_of(found) >= best:
        aside = set_aside(found)
        (aside / SEAL).unlink()  # it was whole, so it is no reason to refuse a start
        terminal.warn(f"{found.name} set aside as {aside.name}: the best adapter, of step {best}, is made again")
        found = newest_whole(run.checkpoints)[0]
    return found


def differences(then: Any, now: Any, path: str = "") -> Iterator[str]:
    """Each leaf that differs between two trees, as `path: then -> now`."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted(then.keys() | now.keys()):
            yield from differences(then.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif then != now:
        yield f"{path}: {then} -> {now}"
