"""Inject every fault many times: kills at each point of a run and at random moments, damaged files, odd inputs."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    argparse.ArgumentParser(description=__doc__, allow_abbrev=False).parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nightly-") as folder:
        counts_file = Path(folder) / "counts.json"
        line = [sys.executable, "-m", "pytest", "tests/lost", "-q", "-vv", f"--basetemp={folder}/runs"]
        environment = {**os.environ, "NIGHTLY": str(counts_file)}
        failed = subprocess.run(line, cwd=ROOT, env=environment, check=False).returncode
        counts = json.loads(counts_file.read_text(encoding="utf-8")) if counts_file.is_file() else {}
    print(summary(counts, time.monotonic() - started))
    return 1 if failed else 0


def summary(counts: dict[str, int], seconds: float) -> str:
    """The one line that says what was tried and what it cost."""
    parts = [
        f"{counts.get('kills', 0):,} kills, {counts.get('lost', 0):,} runs lost",
        f"{counts.get('damaged', 0):,} damaged files, {counts.get('used', 0):,} used",
        f"{counts.get('inputs', 0):,} inputs, {counts.get('crashes', 0):,} crashes",
        f"{seconds / 60:.0f} min",
    ]
    return f"nightly: {'; '.join(parts)}"


if __name__ == "__main__":
    sys.exit(main())
