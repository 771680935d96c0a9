"""Feeds one reader with bytes that atheris makes up, guided by the lines and comparisons that they reach.

    guided.py config|jsonl|planted FOLDER RUNS

What the inputs grow from lies in FOLDER, and what crashes is written there. Exit 77 after a crash.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

GUIDING = {
    "config": ["finetune.config.yaml_file", "finetune.config.problems", "finetune.config.load"],
    "jsonl": [f"finetune.data.{name}" for name in ("jsonl", "encode", "digests", "certificate", "tokenizer")],
    "planted": ["support.planted"],
}


def reader(name: str, folder: Path) -> Callable[[bytes], None]:
    """What takes the bytes, its modules imported so that atheris sees into them."""
    with atheris.instrument_imports(include=GUIDING[name]):
        if name == "planted":
            from support.planted import check_planted

            return check_planted
        from support.inputs import LENGTH, check_config, check_jsonl

        if name == "config":
            path = folder.with_suffix(".yaml")
            return lambda content: check_config(content, path)
        from finetune.data.encode import Encoder, Recipe

        encoder = Encoder(Recipe(None, None, LENGTH, True, True))
        return lambda content: check_jsonl(content, encoder)


def main() -> None:
    name, folder, runs = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    settings = [
        f"-runs={runs}",
        "-seed=1",
        "-timeout=5",
        "-rss_limit_mb=0",
        "-max_len=4000",
        f"-artifact_prefix={folder}/",
    ]
    atheris.Setup([sys.argv[0], *settings, "-print_final_stats=1", str(folder)], reader(name, folder))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
