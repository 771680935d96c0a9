"""The starts of one run, as manifest.json lists them: when each began, from which step, and how and where it ended."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune.errors import OutOfResource, Stopped

Start = dict[str, Any]


def begin(
    folder: Path,
    from_step: int,
    changed: Sequence[str] = (),
    set_aside: Sequence[str] = (),
    rehearsal: dict[str, float] | None = None,
) -> list[Start]:
    """All starts of the run in `folder`, the one that begins now last; one before that did not end was killed.

    `changed` since the checkpoint, which --resume-changed accepted, and what was `set_aside`, each a sentence; and what
    its `rehearsal` measured.
    """
    starts = _before(folder)
    if starts and starts[-1]["end"] is None:
        last = _last_sign(folder, starts[-1])
        starts[-1] |= {"ended": last.get("time"), "step": last["step"], "end": "killed"}
    now = {"started": _utc(), "from_step": from_step, "ended": None, "step": None, "end": None}
    return [*starts, now | {"changed": list(changed), "set_aside": list(set_aside), "rehearsal": rehearsal}]


def end(folder: Path, start: Start, error: Exception | None) -> None:
    """Write into `start` that it ends now, how, and at the last step that the run's folder knows of."""
    step = max([_last_sign(folder, start)["step"], *_saved_steps(folder)])
    start |= {"ended": _utc(), "step": step, "end": _how(error)}


def _how(error: Exception | None) -> str:
    if error is None:
        return "complete"
    if isinstance(error, Stopped):
        return "time budget" if error.exit_code == OutOfResource.exit_code else "stopped"
    return "failed"


def _utc(seconds: float | None = None) -> str:
    now = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return now.isoformat(timespec="seconds")


def _before(folder: Path) -> list[Start]:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    starts: list[Start] = manifest.get("starts", []) if isinstance(manifest, dict) else []
    return starts


def _last_sign(folder: Path, start: Start) -> dict[str, Any]:
    """Step, and time where there is one, of the last line that `start` logged."""
    path, last = folder / "metrics.jsonl", {"step": start["from_step"]}
    begun = datetime.fromisoformat(start["started"]).timestamp()
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []:
        if line.endswith("\n") and (entry := json.loads(line))["time"] >= begun:
            last = {"step": entry["step"], "time": _utc(entry["time"])}
    return last


def _saved_steps(folder: Path) -> list[int]:
    names = (path.name.removeprefix("checkpoint-") for path in (folder / "checkpoints").glob("checkpoint-*"))
    return [int(name) for name in names if name.isdigit()]
