"""A tiny training with trackers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from finetune.config.load import ROOT


def training(
    base: Path, train_file: Path, output: Path, steps: int, *more: str, **environment: str
) -> subprocess.Popen[str]:
    """A start of train.py that tells wandb; `more` are settings of its own."""
    settings = {
        "model.name": base, "dataset.train_file": train_file, "output.dir": output, "tracking.run_name": "run",
        "tracking.report_to": "wandb", "dataset.sample_prompts": "[]", "dataset.validation_split": 0.25,
        "model.max_seq_length": 64, "training.max_steps": steps, "training.eval_steps": steps,
        "training.save_steps": steps,
    }  # fmt: skip
    lines = [*(f"{key}={value}" for key, value in settings.items()), *more]
    sets = [word for line in lines for word in ("--set", line)]
    line = [sys.executable, str(ROOT / "src" / "train.py"), "--config", "cpu", *sets]
    line += ["--skip", "host,libraries,device,rehearsal"]
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "NETRC": "/nonexistent", **environment}
    return subprocess.Popen(line, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
