"""Start-up of each command in CPU and wall seconds, beside commands that the peers answer the same questions with.

    .venv/bin/python benchmarks/startup.py --rounds 3 --output benchmarks/results/NAME.json

One command after the other, round by round, so that a drift of the machine's speed meets all alike. CPU seconds are
those of the process and its children. The heaviest imports are read once for each, by `-X importtime`: milliseconds of
wall time that a module takes itself, without what it imports; what else the machine does is in them.
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

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")
HEAVIEST = 5
SAMPLE = ("--set", "dataset.train_file=data/sample/train.jsonl", "--set", "dataset.validation_file=null")


@dataclass(frozen=True)
class Command:
    """What is started, what it answers, and the CPU seconds that it should take at most, where there is an aim."""

    name: str
    arguments: tuple[str, ...]
    answers: str
    aim: float | None = None

    @property
    def line(self) -> list[str]:
        """As it is started: a script of ours by this Python, a peer's program from beside this Python."""
        program, *rest = self.arguments
        beside = Path(sys.executable).parent / program
        return [sys.executable, str(ROOT / program if (ROOT / program).is_file() else beside), *rest]


def commands(folder: Path) -> list[Command]:
    """Ours, then the peers'; those that write do so below `folder`."""
    scripts = ["src/train.py", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "scripts").glob("*.py"))]
    helps = [Command(f"{script} --help", (script, "--help"), "help", 0.3) for script in scripts]
    there = ("--config", "h100", *SAMPLE, "--set", f"output.dir={folder}")
    ours = (
        Command("train.py, a typo in the config", ("src/train.py", "--set", "lora.rank=3"), "config error", 0.5),
        Command("train.py --dry-run, 150 rows", ("src/train.py", "--dry-run", *there), "plan"),
        Command(
            "validate_environment.py --config h100",
            ("scripts/validate_environment.py", *there),
            "checks",
            10.0,
        ),
    )
    model = (
        "--model_name_or_path",
        "m",
        "--dataset_name",
        "d",
        "--output_dir",
        str(folder),
        "--use_cpu",
        "--bf16",
        "false",
    )
    peers = (
        Command("trl sft --help", ("trl", "sft", "--help"), "help"),
        Command("trl sft, a typo in the arguments", ("trl", "sft", *model, "--lora_rank", "3"), "config error"),
        Command("accelerate launch --help", ("accelerate", "launch", "--help"), "help"),
        Command("transformers --help", ("transformers", "--help"), "help"),
    )
    return [*helps, *ours, *peers]


def measure(command: Command) -> dict[str, Any]:
    """One start: exit code, CPU and wall seconds."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before, started = used(), time.perf_counter()
    done = subprocess.run(command.line, cwd=ROOT, env=environment(), capture_output=True, check=False)
    wall = time.perf_counter() - started
    return {"exit": done.returncode, "cpu": round(used() - before, 3), "wall": round(wall, 3)}


def environment() -> dict[str, str]:
    """One thread, and no question to a network that would be timed instead."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}


def heaviest(command: Command) -> dict[str, float]:
    """The modules that take longest to import: milliseconds of each itself."""
    line = [command.line[0], "-X", "importtime", *command.line[1:]]
    done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    rows = re.findall(r"^import time: +(\d+) \| +\d+ \| +(\S+)$", done.stderr, re.MULTILINE)
    longest = sorted(((int(microseconds), name) for microseconds, name in rows), reverse=True)[:HEAVIEST]
    return {name: microseconds / 1000 for microseconds, name in longest}


def summarize(command: Command, starts: list[dict[str, Any]]) -> dict[str, Any]:
    """Minimum and median of each clock."""
    (code,) = {start["exit"] for start in starts}  # a command that ends in two ways was not measured
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
        chosen = commands(Path(folder))
        starts: dict[str, list[dict[str, Any]]] = {command.name: [] for command in chosen}
        for command in chosen:
            measure(command)  # once before: files come into the disk's cache, Python writes its own, rows are encoded
        for number in range(options.rounds):
            for command in chosen:
                starts[command.name].append(measure(command))
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
        summary = {command.name: summarize(command, starts[command.name]) for command in chosen}
        for command in chosen:
            summary[command.name]["heaviest_imports_ms"] = heaviest(command)
    show(summary)
    command_line = f"benchmarks/startup.py --rounds {options.rounds}"
    document = {**machine.describe(command_line, PACKAGES), "commands": summary, "starts": starts}
    machine.write(document, options.output)


def show(summary: dict[str, dict[str, Any]]) -> None:
    print(f"{'seconds':<40}{'CPU min':>9}{'median':>9}{'aim':>7}{'wall min':>10}{'median':>9}  heaviest imports, ms")
    for name, row in summary.items():
        numbers = f"{row['cpu_min']:>9.2f}{row['cpu_median']:>9.2f}{row.get('cpu_aim', ''):>7}"
        modules = ", ".join(f"{module} {spent:.0f}" for module, spent in row["heaviest_imports_ms"].items())
        print(f"{name:<40}{numbers}{row['wall_min']:>10.2f}{row['wall_median']:>9.2f}  {modules}")


if __name__ == "__main__":
    main()
