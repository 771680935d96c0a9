"""A run that is complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.run_folders import make_run, manifest


@pytest.fixture
def complete(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", manifest())
