"""Resident memory of the demo's training on a CPU, anonymous and file pages apart, compared with the plan. Linux only.

    .venv/bin/python benchmarks/resident.py --output benchmarks/results/NAME.json

Trains the demo for two steps in a temporary folder, from the rehearsal to the self-test, and reads the process's memory
from /proc every 50 ms. File pages, mostly of libraries, can be dropped by the system; anonymous pages cannot.
`program_gib` is the resident peak without what torch allocates at the plan's peak: the value for the row `cpu` in
src/finetune/machine/platforms.py. The exit code is 1 if the plan's peak is more than 10 % from the measured one.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

ROOT = Path(__file__).resolve().parents[1]
BOUND = 0.10  # of the measured peak
SETTINGS = ("training.max_steps=2", "training.eval_steps=2", "training.save_steps=2", "dataset.sample_prompts=[]")


def pages_gib(pid: int) -> dict[str, float]:
    """Resident pages of a process now, GiB: anonymous ones and those of files; empty if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return {}
    kib = {name: int(size) for name, size in re.findall(r"Rss(Anon|File):\s+(\d+) kB", status)}
    return {name.lower(): size / 2**20 for name, size in kib.items()}


def train(output: Path) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Train the demo in `output`; return its manifest and the samples of its memory."""
    settings = [argument for setting in (f"output.dir={output}", *SETTINGS) for argument in ("--set", setting)]
    command = [sys.executable, "src/train.py", "--config", "cpu", "--json", *settings]
    samples = []
    with (output / "manifest.json").open("w+", encoding="utf-8") as printed:
        process = subprocess.Popen(command, cwd=ROOT, stdout=printed)
        while process.poll() is None:
            samples.append(pages_gib(process.pid))
            time.sleep(0.05)
        if process.returncode:
            raise SystemExit(process.returncode)
        printed.seek(0)
        return json.load(printed), [pages for pages in samples if pages]


def main() -> int:
    options = machine.parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory(prefix="resident-") as folder:
        manifest, samples = train(Path(folder))
    plan, peak_gib = manifest["plan"], manifest["peak_memory_gib"]
    tensors_gib = plan["peak_memory_gib"] - plan["memory_parts"]["program"]
    result = {
        "settings": SETTINGS,
        "planned_gib": plan["peak_memory_gib"],
        "resident_gib": peak_gib,
        "anonymous_gib": round(max(pages["anon"] for pages in samples), 3),
        "file_gib": round(max(pages["file"] for pages in samples), 3),
        "tensors_gib": round(tensors_gib, 3),
        "program_gib": round(peak_gib - tensors_gib, 3),
    }
    document = machine.record(options.output, "benchmarks/resident.py", machine.PACKAGES, resident=result)
    print(json.dumps(document, indent=2))
    return 0 if abs(plan["peak_memory_gib"] / peak_gib - 1) <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
