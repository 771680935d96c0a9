"""Wall time of the quickstart in a fresh clone, the first time and run again, what it came to, and its tokens a second.

    .venv/bin/python benchmarks/quickstart.py --output benchmarks/results/NAME.json

Clones this repository's HEAD into a temporary folder, so nothing here is touched and nothing here helps. The plan reads
the result's `throughput` to say how long a run like this one takes; it is the slower of the two runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from finetune.config.load import load_config  # noqa: E402
from finetune.files import read_json, read_json_lines  # noqa: E402
from finetune.plan import throughput  # noqa: E402
from finetune.plan.model_shape import read_geometry  # noqa: E402
from finetune.runs.folder import MANIFEST, METRICS  # noqa: E402

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes")


def run_quickstart(clone: Path, log: Path) -> dict[str, Any]:
    """Run it once; seconds, and the losses of the run it made."""
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
    """The folder of the run that was finished last."""
    return max(clone.glob(f"adapters/*/{MANIFEST}"), key=lambda path: path.stat().st_mtime).parent


def evaluation_speed(folder: Path, tokens: int) -> float | None:
    """Tokens a second over all evaluations of a run, each of which reads `tokens`; None where none was timed."""
    entries = read_json_lines(folder / METRICS)
    seconds = [entry["eval_runtime"] for entry in entries if "eval_runtime" in entry]
    return round(tokens * len(seconds) / sum(seconds), 1) if seconds else None


def throughput_entry(clone: Path, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the plan may reckon with: the conditions of the run, and the slower speeds of `runs`."""
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
    parser.add_argument("--log", type=Path, help="keep what the first run printed there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quickstart-") as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        first = run_quickstart(clone, options.log or Path(folder) / "first.log")
        again = run_quickstart(clone, Path(folder) / "again.log")
        entry = throughput_entry(clone, [first["run"], again["run"]])
    head = machine.describe("benchmarks/quickstart.py", PACKAGES)
    result = {**head, "first": first, "again": again, "throughput": [entry]}
    print(json.dumps(result, indent=2))
    machine.write(result, options.output)


if __name__ == "__main__":
    main()
