"""Reads a run's folder for its report."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune.errors import ConfigError
from finetune.files import read_json, read_json_lines, shown
from finetune.runs.folder import MANIFEST, METRICS

PAGE = "report.html"
SCRIPT = "scripts/make_report.py"  # writes the report again
Losses = list[tuple[float, float]]


@dataclass(frozen=True)
class Evidence:
    """The contents of a run's folder; `metrics` and `samples` are the complete lines of their files, [] if missing.

    Nothing else is read, so the same folder gives the same report on every machine.
    """

    folder: Path
    manifest: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    config: str

    @property
    def name(self) -> str:
        """The run's name."""
        return self.folder.name

    @property
    def status(self) -> str:
        """complete, interrupted or failed."""
        return str(self.manifest.get("status"))

    def get(self, *keys: str) -> Any:
        """Return the manifest's value under these nested keys; None if it is missing."""
        found: Any = self.manifest
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def number(self, *keys: str) -> float | None:
        """Return a value as `get` does; None if it is not a finite number."""
        found = self.get(*keys)
        return found if isinstance(found, int | float) and math.isfinite(found) else None

    def series(self, key: str) -> Losses:
        """(step, value) of each line of metrics.jsonl that has `key`."""
        return [(entry["step"], entry[key]) for entry in self.metrics if isinstance(entry.get(key), int | float)]

    @cached_property
    def evaluations(self) -> Losses:
        """(step, held-out loss), finite ones only."""
        return [(step, loss) for step, loss in self.series("eval_loss") if math.isfinite(loss)]

    @property
    def best(self) -> tuple[float, float] | None:
        """The evaluation (step, loss) whose adapter is or would be the final one."""
        chosen = [pair for pair in self.evaluations if pair[0] == self.number("best_step")]
        return min(chosen or self.evaluations, key=lambda pair: pair[1], default=None)

    @property
    def starts(self) -> list[dict[str, Any]]:
        """The starts of the run, oldest first."""
        return self.get("starts") or []

    @property
    def last_step(self) -> int:
        """The last step that any record mentions."""
        steps = [*(step for step, _ in self.series("step")), *(start["step"] or 0 for start in self.starts)]
        return int(max([self.number("steps") or 0, *steps]))

    @property
    def answers(self) -> list[dict[str, str]]:
        """The final sample answers, else those of the newest best step."""
        final = self.get("samples")
        return final or (self.samples[-1]["samples"] if self.samples else [])


def read(folder: Path) -> Evidence:
    """Read the run in `folder`. Raises ConfigError if it is not a run's folder."""
    if not folder.is_dir():
        raise ConfigError(f"{shown(folder)}: no such folder", fix="name a run's folder, such as adapters/RUN")
    try:
        manifest = read_json(folder / MANIFEST)
    except FileNotFoundError:
        raise ConfigError(
            f"{shown(folder)}: no {MANIFEST} in it", fix="name a run's folder, such as adapters/RUN"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{shown(folder / MANIFEST)}: cannot be read ({error})") from None
    if not isinstance(manifest, dict):
        raise ConfigError(f"{shown(folder / MANIFEST)}: found {type(manifest).__name__}, expected an object")
    config = folder / "config.yaml"
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    metrics = [entry for entry in read_json_lines(folder / METRICS) if "step" in entry]
    samples = [entry for entry in read_json_lines(folder / "samples.jsonl") if entry.get("samples")]
    return Evidence(folder.resolve(), manifest, metrics, samples, text)
