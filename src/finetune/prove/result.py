"""Formats results: the head of a result file, the block to paste into an issue, rows for docs/measured.md."""

from __future__ import annotations

import importlib.metadata
import os
import platform as host
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune.checks.issue_block import BEGIN, END, nameless


def describe(command: str, packages: tuple[str, ...]) -> dict[str, Any]:
    """Return the head of a result file: date, command, machine and package versions."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": command,
        "machine": dict(system=f"{host.system()} {host.machine()}", cpu_cores=os.cpu_count(), cpu=cpu_name()),  # noqa: C408
        "versions": {
            "python": host.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
    }


def cpu_name() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    return names[0].split(":")[1].strip() if names else host.processor()


def sentence(part: dict[str, Any]) -> str:
    """Summarize a part: why it has no figures, or its figures without tables."""
    if "why" in part:
        return str(part["why"]).splitlines()[0]
    left_out = ("status", "seconds")
    plain = {key: value for key, value in part.items() if key not in left_out and not isinstance(value, dict | list)}
    return ", ".join(f"{key.replace('_', ' ')} {_text(value)}" for key, value in plain.items())


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "not known", True: "yes", False: "no"}[value]
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def part_line(name: str, part: dict[str, Any]) -> str:
    """Return one line about a part."""
    return f"{part['status']:<8}{name:<11}{part['seconds']:>6.0f} s  {sentence(part)}"


def block(document: dict[str, Any]) -> list[str]:
    """Return lines to paste into an issue, without user and host names: machine, versions, all parts and checks."""
    machine, versions = document["machine"], document["versions"]
    lines = [
        f"command  {document['command']}, {document['date']}",
        f"machine  {machine.get('gpu') or machine.get('cpu')}; {machine['system']}, {machine['cpu_cores']} cores",
        f"versions {', '.join(f'{name} {version}' for name, version in versions.items())}",
    ]
    for name, part in document["parts"].items():
        lines.append(part_line(name, part))
        lines += [f"  {_row(row)}" for rows in part.values() if isinstance(rows, list) for row in rows]
    return [BEGIN, *(nameless(line) for line in lines), END]


def _row(row: Any) -> str:
    return ", ".join(f"{key} {_text(value)}" for key, value in row.items()) if isinstance(row, dict) else str(row)


def table(document: dict[str, Any], file: str) -> list[str]:
    """Return rows for docs/measured.md, and what the plan can use from `file` in benchmarks/results."""
    parts = {name: part for name, part in document["parts"].items() if part["status"] == "done"}
    where = document["machine"].get("gpu") or f"{document['machine']['cpu_cores']} cores"
    rows = []
    if "speed" in parts:
        speed = parts["speed"]
        used = [f"{name.upper()} {speed[name]:.1%}" for name in ("mfu", "hfu") if speed[name] is not None]
        figures = ", ".join([f"{speed['tokens_per_second']:,.0f} tokens/s", *used])
        rows.append((f"{where}, {speed['base']}: training, {speed['steps']} steps", figures))
    if "memory" in parts:
        rows.append(
            (f"{where}: expected memory against the measured peak", f"{parts['memory']['furthest_off']:.1%} off")
        )
    if "kill" in parts:
        kill = parts["kill"]
        rows.append(
            (f"{where}: killed after step {kill['killed_after_step']}, resumed", "the same adapter, bit for bit")
        )
    lines = [f"| {what} | {figures} | `{Path(file).name}` |" for what, figures in rows]
    hours = (1e6 / entry["tokens_per_second"] / 3600 for entry in document.get("throughput", []))
    return lines + [f"in benchmarks/results, plans count {one:.2f} h for a million tokens from it" for one in hours]
