"""scripts/prove.py: every part on a CPU, and a result file that has what was made whenever it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from finetune.config.load import ROOT
from finetune.prove import parts, work

SCRIPT = ROOT / "scripts" / "prove.py"


def arguments(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["prove.py", *words])
    monkeypatch.setattr(work, "make_work", lambda *_: work.Work(*[None] * 5, True, Path(), 0.0))  # type: ignore[arg-type]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_a_result_has_the_parts_before_the_one_in_which_it_is_killed(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, seen = tmp_path / "result.json", []

    def make(name: str, _work: Any) -> dict[str, Any]:
        seen.append(sorted(json.loads(path.read_text())["parts"]) if path.is_file() else [])
        if name == "rehearsal":
            raise SystemExit(143)
        return {"status": "done", "seconds": 1.0}

    arguments(monkeypatch, "--tiny", "--output", str(path))
    monkeypatch.setattr(parts, "make", make)
    with pytest.raises(SystemExit):
        script.main()
    assert seen == [[], ["checks"], ["checks", "train"]]
    assert sorted(json.loads(path.read_text())["parts"]) == ["checks", "train"]


def test_a_failed_part_does_not_stop_the_others_and_ends_in_exit_3(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ended: Any
) -> None:
    def make(name: str, _work: Any) -> dict[str, Any]:
        if name == "train":
            return {"status": "failed", "why": "out of memory", "seconds": 1.0}
        return {"status": "done", "seconds": 1.0, "throughput": [{"tokens_per_second": 5.0}] * (name == "speed")}

    path = tmp_path / "result.json"
    arguments(monkeypatch, "--tiny", "--json", "--output", str(path))
    monkeypatch.setattr(parts, "make", make)
    code, out, err = ended(script.main)
    assert code == 3
    assert err.endswith("prove: train failed\n")
    assert f"cp {path} benchmarks/results/" in err
    found = json.loads(out)
    assert found == json.loads(path.read_text())
    assert list(found["parts"]) == list(parts.PARTS)
    assert found["throughput"] == [{"tokens_per_second": 5.0}]
    assert found["command"] == "scripts/prove.py --minutes 12 --tiny"


def test_a_result_file_that_cannot_be_written_is_exit_2_before_any_part_is_made(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ended: Any
) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "result.json"
    arguments(monkeypatch, "--tiny", "--output", str(path))
    monkeypatch.setattr(parts, "make", lambda *_: pytest.fail("a part was made"))
    fix = "name a file that can be written"
    found = f"config: 1 problem\n  --output {path}: Not a directory; {fix}\n"
    assert ended(script.main) == (2, "", found)


@pytest.mark.parametrize("content", ["[1]", '{"date": "2026-11-29"}'])
def test_the_table_of_a_file_that_is_no_result_is_exit_2(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ended: Any, content: str
) -> None:
    path = tmp_path / "other.json"
    path.write_text(content, encoding="utf-8")
    arguments(monkeypatch, "--table", str(path))
    found = f"config: 1 problem\n  --table {path}: not a result of this command; name a file that it wrote\n"
    assert ended(script.main) == (2, "", found)


@pytest.mark.slow
def test_tiny_makes_every_part_on_a_cpu(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    line = [sys.executable, str(SCRIPT), "--tiny", "--minutes", "30", "--output", str(path)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text(encoding="utf-8"))
    assert {name: part["status"] for name, part in found["parts"].items()} == dict.fromkeys(parts.PARTS, "done")
    assert found["parts"]["train"]["adapter"] == found["parts"]["kill"]["adapter"]
    assert found["parts"]["kill"]["killed_after_step"] >= parts.KILL_AFTER
    assert len(found["parts"]["memory"]["configs"]) == 3
    assert found["throughput"][0]["tokens_per_second"] == found["parts"]["speed"]["tokens_per_second"] > 0
    assert not list((ROOT / "adapters").glob(".prove-*"))
    rows = subprocess.run([*line[:2], "--table", str(path)], capture_output=True, text=True, check=True).stdout
    assert "the same adapter, bit for bit | `result.json` |" in rows
    assert "plans count" in rows
