"""src/train.py as a command, in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

FILES = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "checkpoints",
    "config.yaml", "lock", "manifest.json", "metrics.jsonl", "receipt.json", "report.html", "tokenizer.json",
    "tokenizer_config.json",
}  # fmt: skip


def run_settings(base: Path, train_file: Path, output: Path) -> list[str]:
    """The settings of one run of six steps, with three evaluations and three checkpoints."""
    return [
        f"model.name={base}", f"dataset.train_file={train_file}", f"output.dir={output}",
        "tracking.run_name=run", "dataset.sample_prompts=[]", "dataset.validation_split=0.2",
        "model.max_seq_length=64", "lora.lora_dropout=0.1", "training.packing=true", f"training.max_steps={STEPS}",
        "training.eval_steps=2", "training.save_steps=2", "training.gradient_accumulation_steps=2",
    ]  # fmt: skip


@dataclass(frozen=True)
class Command:
    """The command of one run: `base` and `train_file` are shared by all, `output` is its own."""

    base: Path
    train_file: Path
    output: Path

    def settings(self) -> list[str]:
        return run_settings(self.base, self.train_file, self.output)

    def line(self, *options: str) -> list[str]:
        sets = [word for setting in self.settings() for word in ("--set", setting)]
        return [sys.executable, str(ROOT / "src" / "train.py"), "--config", "cpu", *sets, *options]

    def __call__(self, *options: str) -> subprocess.CompletedProcess[str]:
        line = self.line(*options)
        return subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300)

    def elsewhere(self, output: Path) -> Command:
        """The same command on a copy of the output folder as it is now."""
        shutil.copytree(self.output, output)
        return Command(self.base, self.train_file, output)


def write_rows(path: Path, count: int) -> Path:
    """`count` short conversations, each different."""
    with path.open("w", encoding="utf-8") as stream:
        for number in range(count):
            question = {"role": "user", "content": f"What comes after {number}?"}
            text = f"After {number} " + "and then " * (number % 4) + "comes the next."
            stream.write(json.dumps({"messages": [question, {"role": "assistant", "content": text}]}) + "\n")
    return path


@pytest.fixture(scope="session")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", 60)
