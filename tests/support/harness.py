"""What the tests of this folder share: starts of `src/train.py`, fast and real ones, and what a finished run is."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from support.train_command import FILES, ROOT, STEPS, run_settings

HERE = ROOT / "tests" / "faults"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
PATIENCE = 120.0  # seconds, after which a run that hangs is ended
NIGHTLY = "NIGHTLY" in os.environ
PART, PARTS = map(int, os.environ.get("NIGHTLY_PART", "0/1").split("/"))
COUNTS: Counter[str] = Counter()
Item = TypeVar("Item")

PROBE = ".check-"  # a folder with a file of 7 bytes, where the kill came in the check that output.dir can be written
CHECKPOINTS = {"best", *(f"checkpoint-{step}" for step in (2, 4, 6))}


@dataclass(frozen=True)
class Command:
    """The command of one run: base model and data are shared by all, `output` is its own."""

    base: Path
    train_file: Path
    output: Path
    more: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return self.output / "run"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def arguments(self) -> list[str]:
        settings = [*run_settings(self.base, self.train_file, self.output), *self.more]
        sets = [word for setting in settings for word in ("--set", setting)]
        return ["--config", "cpu", "--skip", "host,libraries,device,rehearsal", *sets]

    def at(self, output: Path, *more: str) -> Command:
        """The same command with another output folder, and settings that change it."""
        return replace(self, output=output, more=(*self.more, *more))

    def elsewhere(self, output: Path) -> Command:
        """The same command on a copy of the output folder as it is now."""
        shutil.copytree(self.output, output)
        return self.at(output)

    def really(self, **environment: str) -> subprocess.CompletedProcess[str]:
        """Start it as a person does, with all imports."""
        line = [sys.executable, str(ROOT / "src" / "train.py"), *self.arguments()]
        surroundings = {**os.environ, **ENVIRONMENT, **environment}
        return subprocess.run(line, env=surroundings, capture_output=True, text=True, check=False, timeout=300)


@dataclass(frozen=True)
class Ended:
    """How one start ended: the exit code, or minus the signal; all it printed; its seconds without imports."""

    code: int
    text: str
    seconds: float


class Warm:
    """The program of warm.py, which starts runs without importing anything again."""

    def __init__(self) -> None:
        line = [sys.executable, str(Path(__file__).with_name("warm.py"))]
        surroundings = {**os.environ, **ENVIRONMENT}
        self.process = subprocess.Popen(
            line, env=surroundings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    def __call__(
        self,
        command: Command,
        *options: str,
        kill_after: float | None = None,
        number: int = signal.SIGKILL,
        point: int | None = None,
        how: str = "before",
        notes: Path | None = None,
        module: str | None = None,
        **environment: str,
    ) -> Ended:
        """Start `command`, and kill it after that many seconds (or send another signal), or at its `point`-th point.

        `module` of this folder is imported first.
        """
        request = {
            "arguments": [*command.arguments(), *options],
            "environment": environment,
            "folder": str(command.output) if point or notes else None,
            "notes": str(notes) if notes else None,
            "point": point,
            "how": how,
            "module": module,
            "seconds": kill_after or PATIENCE,
            "signal": int(number),
        }
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Ended(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


@dataclass(frozen=True)
class Whole:
    """A run that nothing happened to: its command, its result, its points and its seconds without imports."""

    command: Command
    result: dict[str, Any]
    points: list[list[str]]
    seconds: float


def share(items: list[Item]) -> list[Item]:
    """What this process tries of them; scripts/nightly.py starts several."""
    return items[PART::PARTS]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def result(command: Command) -> dict[str, Any]:
    """All of a finished run that an interruption must not change: adapter, last checkpoint, losses, manifest."""
    last = command.checkpoints / f"checkpoint-{STEPS}"
    manifest = json.loads((command.folder / "manifest.json").read_text(encoding="utf-8"))
    metrics = (command.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    equal = ("status", "tokens", "steps", "train_loss", "eval_loss", "best_step", "adapter_sha256")
    return {
        "adapter": sha256(command.folder / "adapter_model.safetensors"),
        "best": sha256(command.checkpoints / "best" / "adapter_model.safetensors"),
        "last": {path.name: sha256(path) for path in last.iterdir() if path.suffix in (".safetensors", ".pt", ".pth")},
        "metrics": [_without_times(json.loads(line)) for line in metrics],
        "manifest": {name: manifest[name] for name in equal},
    }


def _without_times(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: entry[name] for name in ("step", "loss", "eval_loss", "learning_rate", "grad_norm") if name in entry}


def left_over(command: Command) -> set[str]:
    """What lies in a finished run that no document names; what was set aside is named there."""
    found = names(command.folder) - FILES
    found |= {name for name in names(command.checkpoints) - CHECKPOINTS if not name.startswith("damaged-")}
    found |= {path.name for path in command.output.rglob("*.partial") if "damaged-" not in str(path)}
    beside = {name for name in names(command.output) if not name.startswith(PROBE)}
    return found | (beside - {"run", ".cache"})


def differences(command: Command, wanted: dict[str, Any]) -> list[str]:
    """What is not as in the run that nothing happened to; [] where nothing was lost."""
    found = result(command)
    changed = [name for name in wanted if found[name] != wanted[name]]
    return changed + sorted(f"{name} is left over" for name in left_over(command))
