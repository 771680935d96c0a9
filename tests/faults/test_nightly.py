"""What scripts/nightly.py says, and that nothing is left out where a night is split into parts."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from finetune.files import ROOT
from support.commands import load_script
from support.harness import HERE


@pytest.fixture(scope="module")
def nightly() -> ModuleType:
    return load_script("nightly")


def test_the_nightly_line_says_what_was_tried_what_was_lost_and_how_long_it_took(nightly: ModuleType) -> None:
    counts = Counter({"kills": 237, "stops": 24, "damaged": 6173, "used": 1, "inputs": 55000})
    said = "nightly: 237 kills, 24 stops, 0 runs lost; 6,173 damaged files, 1 used; 55,000 inputs, 0 crashes; 18 min"
    assert nightly.summary(counts, 1090.0) == said
    tried = {"kills": 237, "stops": 24, "damaged": 6173, "used": 1, "inputs": 55000, "parts_failed": 0, "seconds": 1090}
    assert nightly.result(counts, 0, 1090.4) == {"nightly": tried, "line": said}


@pytest.mark.parametrize(("other_torch", "code"), [(0, 0), (1, 1)])
def test_the_h100s_torch_is_a_part_of_the_night(
    nightly: ModuleType, monkeypatch: pytest.MonkeyPatch, other_torch: int, code: int
) -> None:
    called = []

    def run(line: tuple[str, ...], cwd: Path, check: bool) -> SimpleNamespace:
        called.append((line, cwd, check))
        return SimpleNamespace(returncode=other_torch)

    monkeypatch.setattr(nightly, "run", lambda *_: (Counter(), 0))
    monkeypatch.setattr(nightly, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(sys, "argv", ["nightly.py"])
    assert nightly.main() == code
    assert called == [(("scripts/test.sh", "--h100-torch"), ROOT, False)]


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_every_file_of_tests_is_in_a_part_and_only_the_kills_are_in_all(nightly: ModuleType, parts: int) -> None:
    chosen = Counter(path for part in range(parts) for path in nightly.files(part, parts))
    here = {f"tests/faults/{path.name}" for path in HERE.glob("test_*.py")}
    assert chosen == {path: parts if path.endswith("test_kills.py") else 1 for path in here}


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_the_shares_of_all_parts_are_the_whole(parts: int) -> None:
    program = "from support import harness; print(*harness.share(list(range(50))))"
    shares = []
    for part in range(parts):
        named = {"NIGHTLY_PART": f"{part}/{parts}", "PYTHONPATH": str(HERE.parent)}
        done = subprocess.run([sys.executable, "-c", program], env=named, capture_output=True, text=True, check=True)
        shares += [int(number) for number in done.stdout.split()]
    assert sorted(shares) == list(range(50))
