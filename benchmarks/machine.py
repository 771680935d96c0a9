"""What every benchmark shares: `--output`, and what a result file says about where and when it was measured."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "src"))

from finetune.prove.result import describe

__all__ = ["describe", "parser", "write"]


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with `--output`."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--output", type=Path, help="also write the result there")
    return made


def write(result: dict[str, Any], output: Path | None) -> None:
    """The result file, where one is wanted."""
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
