"""What was measured of speed: tokens a second from the files in benchmarks/results, for the plan's hours."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt

from finetune import wording
from finetune.config.problems import Problems, validated
from finetune.config.schema import Attention, Config, Count, Section
from finetune.errors import ConfigError
from finetune.files import ROOT
from finetune.plan.memory import checkpointed_layers
from finetune.plan.model_shape import Geometry

RESULTS = ROOT / "benchmarks" / "results"
Speed = Annotated[float, Gt(0)]


class Conditions(Section):
    """What decides how fast a run is: an entry is used only where all of it is equal."""

    platform: Literal["h100", "m4", "cpu"]
    hidden_size: Count
    num_hidden_layers: Count
    max_seq_length: Count
    packing: bool
    storage: Literal["packed", "expanded"]
    attn_implementation: Attention
    gradient_checkpointing: bool
    checkpointed_layers: Annotated[int, Ge(0)]
    fused_lora: bool
    fused_kernels: bool


class Entry(Conditions):
    """One entry of a result file's `throughput`: tokens without padding, in training steps, and in evaluations.

    `eval_tokens_per_second` is None where evaluations were not timed.
    """

    tokens_per_second: Speed
    eval_tokens_per_second: Speed | None


@dataclass(frozen=True)
class Throughput:
    """A measured speed, the file it is in (relative to the project's root), and the machine it was measured on."""

    tokens_per_second: float
    eval_tokens_per_second: float | None
    file: str
    machine: str


def conditions(config: Config, geometry: Geometry) -> Conditions:
    """Those of a run."""
    return Conditions(
        platform=config.platform,
        hidden_size=geometry.hidden_size,
        num_hidden_layers=geometry.num_hidden_layers,
        max_seq_length=config.model.max_seq_length,
        packing=config.training.packing,
        storage=config.quantization.storage,
        attn_implementation=config.model.attn_implementation,
        gradient_checkpointing=config.training.gradient_checkpointing,
        checkpointed_layers=checkpointed_layers(config, geometry),
        fused_lora=config.training.fused_lora,
        fused_kernels=config.training.fused_kernels,
    )


def find(config: Config, geometry: Geometry, folder: Path = RESULTS) -> Throughput | None:
    """The newest measurement under the conditions of this run (the last of its file), or None.

    Raises ConfigError where a file's entry is malformed.
    """
    wanted = conditions(config, geometry).model_dump()
    found: dict[tuple[str, str], Throughput] = {}
    for path in sorted(folder.glob("*.json")):
        document, entries = read(path)
        for entry in entries:
            if wanted.items() <= entry.model_dump().items():
                found[str(document.get("date", "")), path.name] = _throughput(entry, path, document)
    return found[max(found)] if found else None


def read(path: Path) -> tuple[dict[str, Any], list[Entry]]:
    """A result file and its entries; none where it has no `throughput`, or is no JSON that could have one.

    Raises ConfigError with everything that is wrong with the entries.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        document = json.loads(text)
    except ValueError as error:
        if '"throughput"' in text:
            raise ConfigError(f"{_shown(path)}: not JSON: {error}") from None
        return {}, []
    if not isinstance(document, dict) or "throughput" not in document:
        return {}, []
    rows = document["throughput"]
    if not isinstance(rows, list):
        raise ConfigError(f"{_shown(path)}: throughput: found {wording.show(rows)}, wanted a list of entries")
    problems = Problems({})
    entries = [validated(Entry, row, problems, f"throughput[{number}]") for number, row in enumerate(rows)]
    if problems.found:
        raise ConfigError(*(f"{_shown(path)}: {problem}" for problem in problems.found))
    return document, [entry for entry in entries if entry]


def _throughput(entry: Entry, path: Path, document: dict[str, Any]) -> Throughput:
    machine = document.get("machine")
    known = machine if isinstance(machine, dict) else {}
    device = known.get("gpu") or f"{known.get('cpu_cores', 'unknown')} cores of {known.get('cpu', 'an unknown CPU')}"
    return Throughput(entry.tokens_per_second, entry.eval_tokens_per_second, _shown(path), device)


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
