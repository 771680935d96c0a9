"""The lines of a model card, run by clients that are not this program, and their answers beside its own.

    .venv/bin/python benchmarks/foreign_clients.py adapters/demo-cpu --output benchmarks/results/NAME.json

Each client has a fresh environment, without this program. Of the card nothing is replaced but the question.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine

from finetune.files import resolve
from finetune.model.generate import reply_to
from finetune.results import chat
from finetune.runs import adapter
from finetune.terminal import Terminal
from finetune.wording import SILENT

QUESTION, LIMIT = '"Your question"', 200  # what the card asks, and the tokens that it waits for
BEGINNING = 20  # tokens, by which the base's answer differs from the adapter's
CPU_TORCH = "https://download.pytorch.org/whl/cpu"  # else pip takes CUDA's, of gigabytes, on Linux


@dataclass(frozen=True)
class Block:
    """A piece of code in a card, in the language that its fence names."""

    language: str
    text: str


def blocks(card: str) -> list[Block]:
    """The card's code, in its order: pip's line and Python for PEFT, then the same for llama.cpp."""
    return [Block(*found) for found in re.findall(r"^```(sh|python)\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)]


class Client:
    """A fresh environment in `folder`, where the card's names are links to a run and its base."""

    def __init__(self, folder: Path, run: Path, base: Path) -> None:
        self.folder = folder
        for name, target in {run.name: run, base.name: base, "ADAPTER": run, "BASE": base}.items():
            (folder / name).symlink_to(target.resolve())
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        self.environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
            "PATH": f"{folder / 'venv' / 'bin'}:{os.environ['PATH']}",
            "PIP_NO_COMPILE": "1",
            "HF_HUB_OFFLINE": "1",
        }
        if not {"PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"} & os.environ.keys():
            self.environment["PIP_EXTRA_INDEX_URL"] = CPU_TORCH
        self.run("python", "-c", "import importlib.util as u; assert u.find_spec('finetune') is None")

    def run(self, *line: str) -> str:
        """Its stdout; raises CalledProcessError."""
        return subprocess.run(
            line, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, text=True, check=True
        ).stdout

    def install(self, block: Block) -> None:
        """A card's `sh` block, line by line until one fails."""
        self.run("bash", "-euc", block.text)

    def answer(self, *code: Block, question: str) -> str:
        """What `code` prints when it asks `question`."""
        text = "".join(block.text for block in code)
        assert text.count(QUESTION) == 1
        return self.run("python", "-c", text.replace(QUESTION, json.dumps(question))).strip()


def ours(found: adapter.Adapter, question: str) -> dict[str, str]:
    """What this program's own chat answers, cut where the card's code cuts; of the base, how its answer begins."""
    talk = chat.begin(found, None, SILENT)
    prompt = talk.encoded(talk.with_question(question))
    tuned = reply_to(talk.model, talk.chat, [prompt], LIMIT) or []
    with talk.model.disable_adapter():
        base = reply_to(talk.model, talk.chat, [prompt], BEGINNING) or []
    return {"tuned": tuned[0].text, "base": base[0].text}


def plain(found: adapter.Adapter, question: str, folder: Path) -> dict[str, Any]:
    """PEFT and transformers alone: seconds to install, to answer, and the answer."""
    install, code, *_ = blocks((found.folder / "README.md").read_text(encoding="utf-8"))
    client = Client(folder, found.folder, resolve(found.config.model.name))
    begun = time.monotonic()
    client.install(install)
    installed = time.monotonic()
    said = client.answer(code, question=question)
    times = {"install_seconds": installed - begun, "answer_seconds": time.monotonic() - installed}
    return {
        "lines": [install.text, code.text],
        "answer": said,
        **{key: round(value, 1) for key, value in times.items()},
    }


def main() -> None:
    parser = machine.parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run, its base in a folder too")
    parser.add_argument("--question", default="How do I make a good cup of tea?")
    options = parser.parse_args()
    found = adapter.find(str(options.run), [], Terminal(json=True))
    result: dict[str, Any] = {"question": options.question, "ours": ours(found, options.question)}
    with tempfile.TemporaryDirectory() as folder:
        result["plain"] = plain(found, options.question, Path(folder))
    print(json.dumps(result, indent=2))
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    machine.write(
        machine.describe(" ".join(["benchmarks/foreign_clients.py", *sys.argv[1:]]), packages) | result, options.output
    )


if __name__ == "__main__":
    main()
