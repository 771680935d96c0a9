"""What all benchmarks share: `--output`, measuring in rounds, and the result file with machine, versions and date."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "src"))

from finetune.files import write_json
from finetune.prove.result import describe

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes")  # of a training, whose versions a result records


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with `--output`."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--output", type=Path, help="also write the result to this file")
    return made


def in_rounds(
    count: int, names: Iterable[str], measure: Callable[[str], dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """Measure every name once per round, so that drift in the machine's speed affects all; return results by name."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(1, count + 1):
        for name, measured in results.items():
            measured.append(measure(name))
            figures = ", ".join(f"{key} {value:.4g}" for key, value in measured[-1].items())
            print(f"round {number} of {count}: {name}: {figures}", file=sys.stderr, flush=True)
    return results


def record(output: Path | None, command: str, packages: tuple[str, ...], **found: Any) -> dict[str, Any]:
    """Return the result of `command` with its head, and write it to `output` unless that is None."""
    document = {**describe(command, packages), **found}
    if output:
        write_json(output, document)
    return document


@functools.cache
def tokenizer() -> Any:
    """Return Mistral's tokenizer, which pads on the right, as in training."""
    from finetune.data.tokenizer import load_chat
    from finetune.model.load import make_tokenizer

    return make_tokenizer(load_chat(None), "right")
