"""benchmarks/trainer_overhead.py runs to its end; what it measures is not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.config.load import ROOT


@pytest.mark.slow
def test_quick_makes_every_part_once_and_all_three_train_alike(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "trainer_overhead.py"), "--quick", "--output", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["command"] == "benchmarks/trainer_overhead.py --quick"
    losses = {name: one["loss"] for name, (one,) in found["tiny"]["rounds"].items()}
    assert losses == dict.fromkeys(("bare loop", "ours", "TRL"), pytest.approx(6.943, abs=0.001))
    assert {name: len(rounds) for name, rounds in found["adapter"]["rounds"].items()} == {"TRL": 1, "ours": 1}
