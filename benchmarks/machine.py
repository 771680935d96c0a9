"""What every benchmark shares: `--output`, and what a result file says about where and when it was measured."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with `--output`."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--output", type=Path, help="also write the result there")
    return made


def write(result: dict[str, Any], output: Path | None) -> None:
    """The result file, where one is wanted."""
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def describe(command: str, packages: tuple[str, ...]) -> dict[str, Any]:
    """Date, command, machine and package versions, as the head of a result file."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": command,
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu_cores": os.cpu_count(),
            "cpu": cpu_name(),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
    }


def cpu_name() -> str:
    """The processor's name as the system has it."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    return names[0].split(":")[1].strip() if names else platform.processor()
