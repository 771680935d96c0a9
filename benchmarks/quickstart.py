"""Wall time of the quickstart in a fresh clone, the first time and run again, and what it came to.

    .venv/bin/python benchmarks/quickstart.py --output benchmarks/results/NAME.json

Clones this repository's HEAD into a temporary folder, so nothing here is touched and nothing here helps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import describe

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes")


def run_quickstart(clone: Path, log: Path) -> dict[str, Any]:
    """Run it once; seconds, and the losses of the run it made."""
    started = time.perf_counter()
    with log.open("w", encoding="utf-8") as stream:
        subprocess.run(["./scripts/quickstart.sh"], cwd=clone, stdout=stream, stderr=subprocess.STDOUT, check=True)
    seconds = time.perf_counter() - started
    newest = max(clone.glob("adapters/*/manifest.json"), key=lambda path: path.stat().st_mtime)
    manifest = json.loads(newest.read_text(encoding="utf-8"))
    names = ("eval_loss_before", "eval_loss", "steps", "tokens_per_second", "peak_memory_gib", "seconds")
    return {"wall_seconds": round(seconds), "run": {name: manifest[name] for name in names}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write the result there")
    parser.add_argument("--log", type=Path, help="keep what the first run printed there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quickstart-") as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        first = run_quickstart(clone, options.log or Path(folder) / "first.log")
        again = run_quickstart(clone, Path(folder) / "again.log")
    result = {**describe("benchmarks/quickstart.py", PACKAGES), "first": first, "again": again}
    print(json.dumps(result, indent=2))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
