"""A fake engine beside a project."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.docker_hosts import project as project
from support.recorded_docker import FakeEngine, fake_engine


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Sockets have short paths, and another user is to come as far as the socket."""
    with tempfile.TemporaryDirectory(prefix="check-docker-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def fake(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEngine]:
    """An engine that docker-py finds, beside a project's folder."""
    with fake_engine(short_folder / "docker.sock") as made:
        monkeypatch.setenv("DOCKER_HOST", made.address)
        yield made
