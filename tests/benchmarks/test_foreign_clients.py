"""The model card's lines, run by clients that are not ours, with an adapter that was trained on the demo's base."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.files import ROOT
from finetune.results.model_card import SAME_TOKENS
from support.train_command import ENVIRONMENT

SHORT = (
    "tracking.run_name=run", "dataset.sample_prompts=[]", "dataset.max_validation_rows=4", "model.max_seq_length=256",
    "training.max_steps=6", "training.eval_steps=6", "training.save_steps=6", "training.gradient_accumulation_steps=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(demo_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the demo's base."""
    folder = tmp_path_factory.mktemp("demo")
    settings = (*SHORT, f"model.name={demo_base}", f"output.dir={folder}")
    line = [sys.executable, str(ROOT / "src" / "train.py"), "--config", "cpu", "--skip", "device,rehearsal"]
    line += [word for text in settings for word in ("--set", text)]
    subprocess.run(line, env=ENVIRONMENT, check=True)
    return folder / "run"


@pytest.fixture(scope="module")
def found(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the clients answered, and what was expected of them. A client that cannot be installed fails the tests."""
    output = tmp_path_factory.mktemp("result") / "result.json"
    line = [sys.executable, str(ROOT / "benchmarks" / "foreign_clients.py"), str(run), "--output", str(output)]
    subprocess.run(line, env=ENVIRONMENT, check=True)
    return dict(json.loads(output.read_text(encoding="utf-8")))


@pytest.mark.slow
def test_the_lines_that_are_run_are_all_those_of_the_card(run: Path, found: dict[str, Any]) -> None:
    card = (run / "README.md").read_text(encoding="utf-8")
    lines = [*found["plain"]["lines"], *found["llama_cpp"]["lines"]]
    assert re.findall(r"^```(?:sh|python)\n(.*?)^```$", card, re.DOTALL | re.MULTILINE) == lines


@pytest.mark.slow
def test_peft_without_this_program_answers_as_this_program(found: dict[str, Any]) -> None:
    assert found["plain"]["answer"] == found["ours"]["tuned"]
    assert not found["ours"]["tuned"].startswith(found["ours"]["base"])


@pytest.mark.slow
def test_llama_cpp_has_the_prompts_token_ids_and_begins_its_answer_as_peft_does_without_4_bits(
    found: dict[str, Any],
) -> None:
    assert found["llama_cpp"]["prompt"] == found["prompt"]
    assert found["same_tokens"] >= SAME_TOKENS
    assert not found["float32"]["tuned"].startswith(found["float32"]["base"])
