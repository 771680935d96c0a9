"""Measure the start-up of each command in CPU and wall seconds, and of comparable commands of other projects.

    .venv/bin/python benchmarks/startup.py --rounds 3 --output benchmarks/results/NAME.json

CPU seconds include child processes. The heaviest imports are measured once per command with `-X importtime`: wall
milliseconds of a module itself, without those it imports, on a machine that may be busy.
"""

from __future__ import annotations

import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine

from finetune.files import ROOT

PACKAGES = (*machine.PACKAGES, "accelerate")
HEAVIEST = 5
SAMPLE = ("--set", "dataset.train_file=data/sample/train.jsonl", "--set", "dataset.validation_file=null")


@dataclass(frozen=True)
class Command:
    """A command line, what it answers, and its limit of CPU seconds, if any."""

    name: str
    arguments: tuple[str, ...]
    answers: str
    aim: float | None = None

    @property
    def line(self) -> list[str]:
        """The full command line: our scripts run with this Python, other programs are in its folder."""
        program, *rest = self.arguments
        installed = Path(sys.executable).parent / program
        return [sys.executable, str(ROOT / program if (ROOT / program).is_file() else installed), *rest]


def commands(folder: Path) -> list[Command]:
    """Return our commands, then those of other projects; they write only in `folder`."""
    scripts = ["src/train.py", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "scripts").glob("*.py"))]
    helps = [Command(f"{script} --help", (script, "--help"), "help", 0.3) for script in scripts]
    there = ("--config", "h100", *SAMPLE, "--set", f"output.dir={folder}")
    ours = (
        Command("train.py, a typo in the config", ("src/train.py", "--set", "lora.rank=3"), "config error", 0.5),
        Command("train.py --dry-run, 150 rows", ("src/train.py", "--dry-run", *there), "plan"),
        Command("validate_environment.py --config h100", ("scripts/validate_environment.py", *there), "checks", 10.0),
    )
    model = f"--model_name_or_path m --dataset_name d --output_dir {folder} --use_cpu --bf16 false".split()
    peers = (
        Command("trl sft --help", ("trl", "sft", "--help"), "help"),
        Command("trl sft, a typo in the arguments", ("trl", "sft", *model, "--lora_rank", "3"), "config error"),
        Command("accelerate launch --help", ("accelerate", "launch", "--help"), "help"),
        Command("transformers --help", ("transformers", "--help"), "help"),
    )
    return [*helps, *ours, *peers]


def measure(command: Command) -> dict[str, Any]:
    """Start the command once; return exit code, CPU and wall seconds."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before, started = used(), time.perf_counter()
    done = subprocess.run(command.line, cwd=ROOT, env=environment(), capture_output=True, check=False)
    wall = time.perf_counter() - started
    return {"exit": done.returncode, "cpu": round(used() - before, 3), "wall": round(wall, 3)}


def environment() -> dict[str, str]:
    """Return variables for one thread and no network, whose delays would be measured, too."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}


def heaviest(command: Command) -> dict[str, float]:
    """Return the modules that take longest to import, with their own milliseconds."""
    line = [command.line[0], "-X", "importtime", *command.line[1:]]
    done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    rows = re.findall(r"^import time: +(\d+) \| +\d+ \| +(\S+)$", done.stderr, re.MULTILINE)
    longest = sorted(((int(microseconds), name) for microseconds, name in rows), reverse=True)[:HEAVIEST]
    return {name: microseconds / 1000 for microseconds, name in longest}


def summarize(command: Command, starts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return minimum and median of each clock."""
    (code,) = {start["exit"] for start in starts}  # a command with two exit codes was not measured
    clocks = {
        f"{clock}_{what}": round(function(start[clock] for start in starts), 3)
        for clock in ("cpu", "wall")
        for what, function in (("min", min), ("median", statistics.median))
    }
    aim = {} if command.aim is None else {"cpu_aim": command.aim}
    return {"answers": command.answers, "exit": code, **clocks, **aim}


def main() -> None:
    parser = machine.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        chosen = {command.name: command for command in commands(Path(folder))}
        for command in chosen.values():
            measure(command)  # fills the disk's cache, Python's byte code and the cache of encoded rows
        starts = machine.in_rounds(options.rounds, chosen, lambda name: measure(chosen[name]))
        summary = {name: summarize(command, starts[name]) for name, command in chosen.items()}
        for name, command in chosen.items():
            summary[name]["heaviest_imports_ms"] = heaviest(command)
    show(summary)
    command_line = f"benchmarks/startup.py --rounds {options.rounds}"
    machine.record(options.output, command_line, PACKAGES, commands=summary, starts=starts)


def show(summary: dict[str, dict[str, Any]]) -> None:
    """Print the table."""
    print(f"{'seconds':<40}{'CPU min':>9}{'median':>9}{'aim':>7}{'wall min':>10}{'median':>9}  heaviest imports, ms")
    for name, row in summary.items():
        numbers = f"{row['cpu_min']:>9.2f}{row['cpu_median']:>9.2f}{row.get('cpu_aim', ''):>7}"
        modules = ", ".join(f"{module} {spent:.0f}" for module, spent in row["heaviest_imports_ms"].items())
        print(f"{name:<40}{numbers}{row['wall_min']:>10.2f}{row['wall_median']:>9.2f}  {modules}")


if __name__ == "__main__":
    main()
