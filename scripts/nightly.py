"""Inject every fault many times: kills at each point of a run and at random moments, damaged files, odd inputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import machine

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "safetensors", "hypothesis", "atheris")
H100_TORCH = ("scripts/test.sh", "--h100-torch")  # one more part, which reports its own failures
MOST = 8  # processes, each with torch and all libraries in memory


def main() -> int:
    options = machine.parser(__doc__).parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nightly-") as folder:
        counts, failed = run(Path(folder), min(os.cpu_count() or 1, MOST))
    failed += subprocess.run(H100_TORCH, cwd=ROOT, check=False).returncode != 0
    seconds = time.monotonic() - started
    if options.output:
        machine.record(options.output, "scripts/nightly.py", PACKAGES, **result(counts, failed, seconds))
    print(summary(counts, seconds))
    return 1 if failed else 0


def run(folder: Path, parts: int) -> tuple[Counter[str], int]:
    """Run all parts at once, one process each; return the sum of their counts, and how many failed."""
    counts: Counter[str] = Counter()
    failed = 0
    for number, process in enumerate([start(folder, part, parts) for part in range(parts)]):
        failed += process.wait() != 0
        print(log(folder, number).read_text(encoding="utf-8"))
        if counted(folder, number).is_file():
            counts.update(json.loads(counted(folder, number).read_text(encoding="utf-8")))
    return counts, failed


def start(folder: Path, part: int, parts: int) -> subprocess.Popen[bytes]:
    """Start one part, which prints to its log."""
    line = [sys.executable, "-m", "pytest", *files(part, parts), "-q", "-vv", f"--basetemp={folder}/runs-{part}"]
    named = {"NIGHTLY": str(counted(folder, part)), "NIGHTLY_PART": f"{part}/{parts}"}
    with log(folder, part).open("wb") as stream:
        return subprocess.Popen(line, cwd=ROOT, env={**os.environ, **named}, stdout=stream, stderr=subprocess.STDOUT)


def files(part: int, parts: int) -> Iterator[str]:
    """Yield the test files of a part. The kills take longest, so each part runs its share of them."""
    found = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "faults").glob("test_*.py"))
    kills = "tests/faults/test_kills.py"
    yield kills
    yield from [path for path in found if path != kills][part::parts]


def log(folder: Path, part: int) -> Path:
    """Return the file with a part's output."""
    return folder / f"{part}.log"


def counted(folder: Path, part: int) -> Path:
    """Return the file with a part's counts."""
    return folder / f"{part}.json"


def result(counts: Counter[str], failed: int, seconds: float) -> dict[str, Any]:
    """Return the counts for the JSON file, with the summary line."""
    return {"nightly": {**counts, "parts_failed": failed, "seconds": round(seconds)}, "line": summary(counts, seconds)}


def summary(counts: Counter[str], seconds: float) -> str:
    """Return one line with the counts and the time."""
    parts = [
        f"{counts['kills']:,} kills, {counts['stops']:,} stops, {counts['lost']:,} runs lost",
        f"{counts['damaged']:,} damaged files, {counts['used']:,} used",
        f"{counts['inputs']:,} inputs, {counts['crashes']:,} crashes",
        f"{seconds / 60:.0f} min",
    ]
    return f"nightly: {'; '.join(parts)}"


if __name__ == "__main__":
    sys.exit(main())
