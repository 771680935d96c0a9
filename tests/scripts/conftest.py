"""A command of scripts/, run in the tests' own process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest

from support.commands import SCRIPTS, load_script

Ending = tuple[int, str, str]


@pytest.fixture(scope="module")
def script(request: pytest.FixtureRequest) -> ModuleType:
    """The script that the test file is named after."""
    return load_script(request.path.stem.removeprefix("test_"))


@pytest.fixture
def run(
    script: ModuleType, ended: Callable[[Callable[[], None]], Ending], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Ending]:
    """Runs it with these arguments; exit code, stdout, stderr."""

    def running(*arguments: object) -> Ending:
        monkeypatch.setattr(sys, "argv", [f"{SCRIPTS / script.__name__}.py", *map(str, arguments)])
        return ended(script.main)

    return running
