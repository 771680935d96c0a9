"""A base model that is there."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def local_model(tmp_path: Path) -> str:
    """A setting that names a local base model, so that no test asks whether the demo model is made."""
    folder = tmp_path / "base-model"
    folder.mkdir()
    return f"model.name={folder}"
