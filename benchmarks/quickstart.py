"""Measure the quickstart in a fresh clone, the first time and again: wall time, losses and tokens per second.

    .venv/bin/python benchmarks/quickstart.py --output benchmarks/results/NAME.json

It clones this repository's HEAD into a temporary folder, so nothing here is changed or used. The plan estimates hours
from the result's `throughput`, that of the slower run.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import yaml

from finetune.config.load import load_config
from finetune.files import ROOT, read_json, read_json_lines
from finetune.plan import throughput
from finetune.plan.model_shape import read_geometry
from finetune.runs.folder import MANIFEST, METRICS


def run_quickstart(clone: Path, log: Path) -> dict[str, Any]:
    """Run the quickstart once; return its seconds and the figures of its run."""
    started = time.perf_counter()
    with log.open("w", encoding="utf-8") as stream:
        subprocess.run(["./scripts/quickstart.sh"], cwd=clone, stdout=stream, stderr=subprocess.STDOUT, check=True)
    seconds = time.perf_counter() - started
    folder = newest_run(clone)
    manifest = read_json(folder / MANIFEST)
    names = ("eval_loss_before", "eval_loss", "steps", "tokens_per_second", "peak_memory_gib", "seconds")
    run = {name: manifest[name] for name in names}
    run["eval_tokens_per_second"] = evaluation_speed(folder, manifest["tokens"]["validation"]["total"])
    return {"wall_seconds": round(seconds), "run": run}


def newest_run(clone: Path) -> Path:
    """Return the folder of the run that finished last."""
    return max(clone.glob(f"adapters/*/{MANIFEST}"), key=lambda path: path.stat().st_mtime).parent


def evaluation_speed(folder: Path, tokens: int) -> float | None:
    """Return tokens per second over all evaluations of a run, each of `tokens`; None if none was timed."""
    entries = read_json_lines(folder / METRICS)
    seconds = [entry["eval_runtime"] for entry in entries if "eval_runtime" in entry]
    return round(tokens * len(seconds) / sum(seconds), 1) if seconds else None


def throughput_entry(clone: Path, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return an entry for the plan: the conditions of the run, and the slower speeds of `runs`."""
    settings = yaml.safe_load((newest_run(clone) / "config.yaml").read_text(encoding="utf-8"))
    name = f"model.name={clone / settings['model']['name']}"
    config, _ = load_config(str(newest_run(clone) / "config.yaml"), [name])
    entry = throughput.conditions(config, read_geometry(config))
    for speed in ("tokens_per_second", "eval_tokens_per_second"):
        measured = [run[speed] for run in runs if run[speed] is not None]
        entry[speed] = min(measured, default=None)
    return entry


def main() -> None:
    parser = machine.parser(__doc__)
    parser.add_argument("--log", type=Path, help="keep the output of the first run in this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quickstart-") as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        first = run_quickstart(clone, options.log or Path(folder) / "first.log")
        again = run_quickstart(clone, Path(folder) / "again.log")
        entry = throughput_entry(clone, [first["run"], again["run"]])
    measured = {"first": first, "again": again, "throughput": [entry]}
    result = machine.record(options.output, "benchmarks/quickstart.py", machine.PACKAGES, **measured)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
