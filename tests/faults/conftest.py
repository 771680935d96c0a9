"""One warm program and one run that nothing happens to, for all tests of this folder."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.harness import COUNTS, Command, Warm, Whole, names, result
from support.train_command import write_rows


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    if sys.platform != "linux":
        pytest.skip("a forked training needs Linux")
    program = Warm()
    yield program
    program.close()


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", 40)


@pytest.fixture(scope="session")
def whole(warm: Warm, tiny_mistral: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    if (
        "PYTEST_XDIST_WORKER" in os.environ
    ):  # a second process that makes it fails: tests/conftest.py keeps them together
        (tmp_path_factory.getbasetemp().parent / "whole").mkdir()
    command = Command(tiny_mistral, rows, folder / "output")
    ended = warm(command, notes=folder / "points")
    assert ended.code == 0, ended.text
    points = [json.loads(line) for line in (folder / "points").read_text().splitlines()]
    return Whole(command, result(command), points, ended.seconds)


@pytest.fixture(scope="session")
def stopped(warm: Warm, whole: Whole, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """A run killed right after its second save: checkpoint-2, checkpoint-4 and a best adapter, all whole."""
    command = whole.command.at(tmp_path_factory.mktemp("stopped") / "output")
    sealed = ["rename", *(f"run/checkpoints/checkpoint-4/{name}" for name in ("sha256.json.partial", "sha256.json"))]
    assert warm(command, point=whole.points.index(sealed) + 2).code < 0
    assert names(command.checkpoints) == {"best", "checkpoint-2", "checkpoint-4"}
    return command


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    COUNTS["crashes"] += report.failed and "test_fuzz" in report.nodeid


def pytest_sessionfinish() -> None:
    """scripts/nightly.py reads what was counted."""
    if path := os.environ.get("NIGHTLY"):
        Path(path).write_text(json.dumps(COUNTS), encoding="utf-8")
