"""Measured tokens per second from benchmarks/results, for the plan's hours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import ConfigError
from finetune.files import ROOT, read_json
from finetune.plan.automatic import used
from finetune.plan.model_shape import Geometry

if TYPE_CHECKING:
    from finetune.config.schema import Config

RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Throughput:
    """A measured speed, its file (relative to the project's root) and the machine it was measured on.

    Padding is not counted. `eval_tokens_per_second` is None if evaluations were not timed.
    """

    tokens_per_second: float
    eval_tokens_per_second: float | None
    file: str
    machine: str


def conditions(config: Config, geometry: Geometry) -> dict[str, Any]:
    """What determines a run's speed: a result file's `throughput` entry counts only if all of it matches.

    Keys that are `auto` are left out: run and measurement both use what is fastest.
    """
    known = {key: value for key, value in used(config, geometry).items() if getattr(config.training, key) != "auto"}
    return {
        "platform": config.platform,
        "hidden_size": geometry.hidden_size,
        "num_hidden_layers": geometry.num_hidden_layers,
        "max_seq_length": config.model.max_seq_length,
        "packing": config.training.packing,
        "storage": config.quantization.storage,
        "attn_implementation": config.model.attn_implementation,
        "gradient_checkpointing": config.training.gradient_checkpointing,
        **known,
    }


def find(config: Config, geometry: Geometry, folder: Path = RESULTS) -> Throughput | None:
    """The newest measurement under this run's conditions (the last in its file), or None.

    Raises ConfigError if a file is not JSON, or its entry for this run has no speed.
    """
    expected = conditions(config, geometry)
    found: dict[tuple[str, str], Throughput] = {}
    for path in sorted(folder.glob("*.json")):
        shown = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
        try:
            document = read_json(path)
            entries = document.get("throughput", [])
            for entry in (entry for entry in entries if expected.items() <= entry.items()):
                speeds = float(entry["tokens_per_second"]), entry["eval_tokens_per_second"]
                found[document["date"], path.name] = Throughput(*speeds, shown, _machine(document["machine"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{shown}: {type(error).__name__}: {error}", fix="restore or remove the file") from None
    return found[max(found)] if found else None


def _machine(known: dict[str, Any]) -> str:
    return known.get("gpu") or f"{known.get('cpu_cores', 'unknown')} cores of {known.get('cpu', 'an unknown CPU')}"
