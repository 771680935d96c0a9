"""The model card's lines, run by clients that are not ours, with an adapter that was trained on the demo's base."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.files import ROOT
from support.train_command import ENVIRONMENT

SHORT = (
    "tracking.run_name=run", "dataset.sample_prompts=[]", "dataset.max_validation_rows=4", "model.max_seq_length=256",
    "training.max_steps=6", "training.eval_steps=6", "training.save_steps=6", "training.gradient_accumulation_steps=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the demo's base, which is made where it is not there."""
    folder = tmp_path_factory.mktemp("demo")
    base = ROOT / "models" / "demo-135m"
    if not base.is_dir():
        base = folder / "demo-135m"
        subprocess.run([sys.executable, ROOT / "scripts" / "make_demo_model.py", "--output", base], check=True)
    settings = (*SHORT, f"model.name={base}", f"output.dir={folder}")
    line = [sys.executable, str(ROOT / "src" / "train.py"), "--config", "cpu", "--skip", "device,rehearsal"]
    line += [word for text in settings for word in ("--set", text)]
    subprocess.run(line, env=ENVIRONMENT, check=True)
    return folder / "run"


@pytest.mark.slow
def test_peft_without_this_program_answers_as_this_program_by_the_lines_of_the_card(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    line = [sys.executable, str(ROOT / "benchmarks" / "foreign_clients.py"), str(run), "--output", str(output)]
    subprocess.run(line, env=ENVIRONMENT, check=True)
    found = json.loads(output.read_text(encoding="utf-8"))
    card = (run / "README.md").read_text(encoding="utf-8")
    assert all(f"\n{text}```\n" in card for text in found["plain"]["lines"])
    assert found["plain"]["answer"] == found["ours"]["tuned"]
    assert not found["ours"]["tuned"].startswith(found["ours"]["base"])
