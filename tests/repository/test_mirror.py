"""Tests mirror the packages: each module with logic has a test file of its name, each test file of a room a module."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

from finetune.files import ROOT

PROGRAM, TESTS = ROOT / "src" / "finetune", ROOT / "tests"


class Unmirrored(NamedTuple):
    """Paths without `.py` (and `test_`) that have no counterpart, and why."""

    paths: tuple[str, ...]
    why: str


OF_A_TABLE = ("base_model", "data", "device", "gpu", "host", "libraries", "paths", "plan", "resume")
TESTED_ELSEWHERE = (
    Unmirrored(
        tuple(f"checks/{name}" for name in OF_A_TABLE),
        "each check is a row of the table of faults, on one machine that is otherwise healthy: checks/test_faults.py",
    ),
    Unmirrored(("config/base_model",), "which base models are accepted is a rule: config/test_rules.py"),
    Unmirrored(("errors",), "each class is a row of the exit codes in test_cli.py"),
    Unmirrored(("results/export",), "what is exported is what test_train.py finds in a finished run's folder"),
    Unmirrored(("training/short_training",), "the training that a rehearsal makes: training/test_rehearsal.py"),
)
OF_NO_MODULE = (
    Unmirrored(("checks/faults",), "the table of faults goes through every check"),
    Unmirrored(("training/precision", "training/trackers_for_real"), "whole trainings, slow, beside the fast tests"),
)


def listed(exceptions: tuple[Unmirrored, ...]) -> set[str]:
    return {path for exception in exceptions for path in exception.paths}


def modules() -> set[str]:
    """Modules that hold a function, as paths below the package."""
    files = [path for path in PROGRAM.rglob("*.py") if path.stem != "__init__"]
    with_logic = [path for path in files if any(isinstance(node, ast.FunctionDef) for node in ast.walk(parsed(path)))]
    return {path.relative_to(PROGRAM).with_suffix("").as_posix() for path in with_logic}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def rooms() -> set[str]:
    return {path.name for path in PROGRAM.iterdir() if path.is_dir() and path.name != "__pycache__"}


def mirrored() -> set[str]:
    """Test files of the rooms, as the module paths that they should mirror."""
    files = [path.relative_to(TESTS) for room in rooms() for path in (TESTS / room).rglob("test_*.py")]
    return {path.with_name(path.stem.removeprefix("test_")).as_posix() for path in files}


def top_level() -> set[str]:
    return {path.stem.removeprefix("test_") for path in TESTS.glob("test_*.py")} - {"train"}  # src/train.py


def test_each_module_with_logic_has_a_test_file_of_its_name() -> None:
    assert modules() - mirrored() - top_level() == listed(TESTED_ELSEWHERE)


def test_each_test_file_of_a_room_is_named_as_a_module() -> None:
    names = {path.relative_to(PROGRAM).with_suffix("").as_posix() for path in PROGRAM.rglob("*.py")}
    assert (mirrored() | top_level()) - names == listed(OF_NO_MODULE)
