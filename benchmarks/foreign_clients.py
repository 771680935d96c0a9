"""Run the code in a model card with other programs, and compare their answers with this program's.

    .venv/bin/python benchmarks/foreign_clients.py adapters/demo-cpu --output benchmarks/results/NAME.json

Each client runs in a fresh environment without this program. Only the question in the card's code is replaced.
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
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from finetune import cli
from finetune.data.tokenizer import Chat
from finetune.files import resolve
from finetune.model.generate import reply_to
from finetune.results import chat
from finetune.runs import adapter
from finetune.terminal import Terminal
from finetune.wording import SILENT

QUESTION, LIMIT = '"Your question"', 200  # the question and the token limit in the card
BEGINNING = 20  # tokens; by then the base's answer differs from the adapter's
TOKENS = """
import json, urllib.request
def post(path, **body):
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode())
    return json.load(urllib.request.urlopen(request))
prompt = post("/apply-template", messages=messages)["prompt"]
print(json.dumps(post("/tokenize", content=prompt, add_special=True, parse_special=True)["tokens"]))
"""  # run after the card's code for llama.cpp
CPU_TORCH = "https://download.pytorch.org/whl/cpu"  # else pip downloads CUDA's, gigabytes, on Linux


@dataclass(frozen=True)
class Block:
    """A code block in a card, and the language of its fence."""

    language: str
    text: str


def blocks(card: str) -> list[Block]:
    """Return the card's code in order: pip's line and Python for PEFT, then for llama.cpp."""
    return [Block(*found) for found in re.findall(r"^```(sh|python)\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)]


class Client:
    """A fresh environment in `folder`, in which the names in the card link to a run and its base."""

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
        """Run a command there; return its stdout. Raises CalledProcessError."""
        return subprocess.run(
            line, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, text=True, check=True
        ).stdout

    def install(self, block: Block) -> None:
        """Run a card's `sh` block, line by line until one fails."""
        self.run("bash", "-euc", block.text)

    def answer(self, *code: Block, question: str) -> str:
        """Return what `code` prints for `question`."""
        text = "".join(block.text for block in code)
        assert text.count(QUESTION) == 1
        return self.run("python", "-c", text.replace(QUESTION, json.dumps(question))).strip()


def answers(model: PeftModel, chat: Chat, prompt: list[int]) -> dict[str, str]:
    """Return the greedy answer, cut where the card's code cuts it, and the beginning of the base's own."""
    tuned = reply_to(model, chat, [prompt], LIMIT) or []
    with model.disable_adapter():
        base = reply_to(model, chat, [prompt], BEGINNING) or []
    return {"tuned": tuned[0].text, "base": base[0].text}


def in_float32(found: adapter.Adapter) -> PeftModel:
    """Load the adapter on the unquantized base in float32 with PEFT, to compare with llama.cpp."""
    base = AutoModelForCausalLM.from_pretrained(resolve(found.config.model.name), dtype=torch.float32)
    return PeftModel.from_pretrained(base, found.folder)


def plain(client: Client, install: Block, code: Block, question: str) -> dict[str, Any]:
    """Return the answer of PEFT and transformers alone, and the seconds to install them and to answer."""
    begun = time.monotonic()
    client.install(install)
    installed = time.monotonic()
    said = client.answer(code, question=question)
    return {
        "lines": [install.text, code.text],
        "answer": said,
        "install_seconds": round(installed - begun, 1),
        "answer_seconds": round(time.monotonic() - installed, 1),
    }


def llama_cpp(client: Client, install: Block, code: Block, question: str) -> dict[str, Any]:
    """Return llama.cpp's answer and seconds, both conversions included, and its token ids of the prompt."""
    result = plain(client, install, Block(code.language, code.text + TOKENS), question)
    said, _, prompt = result["answer"].rpartition("\n")
    return result | {"lines": [install.text, code.text], "answer": said, "prompt": json.loads(prompt)}


def same_tokens(chat: Chat, expected: str, found: str) -> int:
    """Return the number of tokens of `expected` before `found` differs."""
    ids = chat.tokenizer.encode(expected, add_special_tokens=False).ids
    counts = (count for count in range(len(ids), 0, -1) if found.startswith(chat.tokenizer.decode(ids[:count])))
    return next(counts, 0)


def measure(found: adapter.Adapter, question: str, folder: Path) -> dict[str, Any]:
    """Return each client's answer and the expected one."""
    talk = chat.begin(found, None, SILENT)
    prompt = talk.encoded(talk.with_question(question))
    result: dict[str, Any] = {"question": question, "prompt": prompt, "ours": answers(talk.model, talk.chat, prompt)}
    result["float32"] = answers(in_float32(found), talk.chat, prompt)
    code = iter(blocks((found.folder / "README.md").read_text(encoding="utf-8")))
    for run in (plain, llama_cpp):
        (folder / run.__name__).mkdir()
        client = Client(folder / run.__name__, found.folder, resolve(found.config.model.name))
        result[run.__name__] = run(client, next(code), next(code), question)
    llama = result["llama_cpp"]
    return result | {"same_tokens": same_tokens(talk.chat, result["float32"]["tuned"], llama["answer"])}


def main() -> None:
    parser = machine.parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a finished run whose base is a local folder")
    parser.add_argument("--question", default="What color is grass?")
    options = parser.parse_args()
    found = adapter.find(str(options.run), [], Terminal(json=True))
    with tempfile.TemporaryDirectory() as folder:
        result = measure(found, options.question, Path(folder))
    print(json.dumps(result, indent=2))
    command = " ".join(["benchmarks/foreign_clients.py", *sys.argv[1:]])
    machine.record(options.output, command, ("torch", "transformers", "peft", "bitsandbytes"), **result)


if __name__ == "__main__":
    cli.run(main)
