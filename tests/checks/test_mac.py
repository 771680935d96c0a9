"""The Mac's config through the whole of `src/train.py` on this machine's CPU, its base held packed and expanded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from finetune.config.load import ROOT, load_config

# Where it computes, how large it is, and where things lie. All else is what configs/training_config_m4.yaml says:
# bfloat16 and autocast, NF4, LoRA, dropout, sdpa, optimizer, schedule, 1 x 16 sequences, checkpointing, packing.
OVERRIDDEN = ("platform", "model.name", "model.max_seq_length", "training.max_steps", "dataset.max_rows")
ELSEWHERE = ("dataset.train_file", "dataset.validation_file", "tracking.report_to", "tracking.run_name", "output.dir")
TWICE = """
import runpy, sys
path, *arguments = sys.argv[1:]
sys.path.insert(0, path.removesuffix('/train.py'))
for storage in ("packed", "expanded"):
    sys.argv = [path, *arguments, "--set", f"quantization.storage={storage}", "--set", f"tracking.run_name={storage}"]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""


@pytest.fixture(scope="module")
def trained(tiny_mistral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two runs, packed and expanded."""
    folder = tmp_path_factory.mktemp("mac")
    settings = {
        "platform": "cpu",
        "model.name": tiny_mistral,
        "model.max_seq_length": 64,
        "training.max_steps": 2,
        "dataset.train_file": ROOT / "data" / "sample" / "train.jsonl",
        "dataset.max_rows": 60,
        "dataset.validation_file": "null",
        "tracking.report_to": "none",
        "output.dir": folder,
    }
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-c", TWICE, str(ROOT / "src" / "train.py"), "--config", "m4", *sets]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def test_packed_and_expanded_end_in_the_same_adapter_bit_for_bit(trained: Path) -> None:
    adapters = [(trained / name / "adapter_model.safetensors").read_bytes() for name in ("packed", "expanded")]
    assert adapters[0] == adapters[1]
    learned = [
        value for name, value in load_file(trained / "packed" / "adapter_model.safetensors").items() if "_B" in name
    ]
    assert learned
    assert all(value.abs().sum() > 0 for value in learned)  # else the equality would say nothing


@pytest.mark.parametrize("storage", ["packed", "expanded"])
def test_the_two_runs_had_the_macs_own_values_but_for_where_they_ran_and_how_large(trained: Path, storage: str) -> None:
    ran = flat(yaml.safe_load((trained / storage / "config.yaml").read_text(encoding="utf-8")))
    own = flat(load_config("m4", [f"quantization.storage={storage}"])[0].as_dict())
    assert {key for key in own if ran[key] != own[key]} == {*OVERRIDDEN, *ELSEWHERE}
    manifest = json.loads((trained / storage / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["status"], manifest["steps"]) == ("complete", 2)
