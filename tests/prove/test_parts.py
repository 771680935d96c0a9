"""A part is made in the time that is left, and no part's end is another's."""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from finetune.errors import CheckFailed
from finetune.machine.platforms import PLATFORMS
from finetune.model import hub
from finetune.prove import parts
from finetune.prove.process import Ended
from finetune.prove.work import LeftOut, Work


def work(folder: Path, seconds: float = 60, platform: str = "cpu", random: bool = False) -> Work:
    return Work(
        PLATFORMS[platform], platform, (), ("model.name=x",), "a base", random, folder, time.monotonic() + seconds
    )


@pytest.mark.parametrize(
    ("error", "status", "why"),
    [
        (TimeoutError(), "skipped", "part: no time was left; allow more with --minutes N"),
        (LeftOut("no base"), "skipped", "part: no base"),
        (CheckFailed("bits differ", "look"), "failed", "bits differ; look"),
        (Ended("exit code -9: without a message", ""), "failed", "exit code -9: without a message"),
    ],
)
def test_a_part_without_figures_says_why(
    error: BaseException, status: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parts.PARTS, "part", Mock(side_effect=error))
    found = parts.make("part", work(tmp_path))
    assert (found["status"], found["why"]) == (status, why)


def test_a_part_is_not_begun_when_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(parts.PARTS, "part", lambda _work: {"figure": 1})
    assert parts.make("part", work(tmp_path))["figure"] == 1
    assert parts.make("part", work(tmp_path, seconds=0))["status"] == "skipped"


def test_a_check_that_failed_fails_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(parts.PARTS, "part", lambda _work: {"failed": ["gpu.device"]})
    assert parts.make("part", work(tmp_path))["status"] == "failed"


def test_the_7b_needs_the_hubs_cache_or_random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "is_cached", lambda *_: False)
    monkeypatch.setattr(Work, "alone", lambda *_: {"tokens_per_second": 1.0})
    found = parts.make("speed", work(tmp_path, platform="h100"))
    assert found["status"] == "skipped"
    assert found["why"].startswith("speed: mistralai/Mistral-7B-Instruct-v0.2 is not in the Hub's cache: hf download ")
    assert found["why"].endswith(", or --random")
    random = work(tmp_path, platform="h100", random=True)
    assert parts.make("speed", random)["why"] == "speed: it needs the result of the part rehearsal, which has none"
    (tmp_path / "used.json").write_text("{}")
    assert parts.make("speed", random)["base"] == "a base"


# Killed and resumed ---------------------------------------------------------------------------------------------------


def uninterrupted(folder: Path) -> None:
    (folder / "whole").mkdir()
    (folder / "whole" / "adapter_model.safetensors").write_bytes(b"adapter")


def killed_run(folder: Path, adapter: bytes) -> Any:
    """In place of src/train.py, a program that saves a checkpoint, waits, and when resumed writes `adapter`."""
    program = (
        "import pathlib, sys, time\n"
        f"run = pathlib.Path({str(folder)!r}) / 'killed'\n"
        "checkpoint = run / 'checkpoints' / 'checkpoint-10'\n"
        "if checkpoint.exists():\n"
        f"    (run / 'adapter_model.safetensors').write_bytes({adapter!r}); sys.exit()\n"
        "checkpoint.mkdir(parents=True); (checkpoint / 'sha256.json').touch()\n"
        "time.sleep(60)\n"
    )
    return lambda *_: [sys.executable, "-c", program]


ADAPTER, ANOTHER = (hashlib.sha256(content).hexdigest() for content in (b"adapter", b"another"))
DIFFERENT = (
    f"killed after step 10 and resumed, the adapter is {ANOTHER[:12]}, uninterrupted {ADAPTER[:12]}; "
    "docs/architecture.md says which bits are the same where"
)


@pytest.mark.parametrize(
    ("adapter", "result"),
    [
        (b"adapter", {"status": "done", "killed_after_step": 10, "same_bits": True, "adapter": ADAPTER}),
        (b"another", {"status": "failed", "why": DIFFERENT}),
    ],
)
def test_a_killed_run_must_end_in_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: bytes, result: dict[str, Any]
) -> None:
    uninterrupted(tmp_path)
    monkeypatch.setattr(parts, "command", killed_run(tmp_path, adapter))
    found = parts.make("kill", work(tmp_path))
    assert {**found, "seconds": 0} == {**result, "seconds": 0}


def test_a_run_that_ends_before_it_is_killed_proves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uninterrupted(tmp_path)
    monkeypatch.setattr(parts, "command", lambda *_: [sys.executable, "-c", "raise SystemExit(6)"])
    found = parts.make("kill", work(tmp_path))
    assert (found["status"], found["why"]) == ("failed", "the run ended with exit code 6 before it was killed")


def test_without_an_uninterrupted_run_there_is_nothing_to_compare(tmp_path: Path) -> None:
    found = parts.make("kill", work(tmp_path))
    assert found["why"] == "kill: it needs the adapter of the part train, which wrote none"
