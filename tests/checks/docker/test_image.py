"""Checks of the image that train-h100 starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.machine.docker_host import read_docker_host
from support.docker_hosts import BUILD, found, needs_engine


@pytest.mark.slow
@needs_engine
def test_a_real_image_is_older_once_the_program_or_the_lock_changes(real: Path) -> None:
    (real / "src/train.py").write_text("print(1)\n")
    (real / "scripts/new.py").write_text("")
    by_id = {it.id: it for it in found(read_docker_host(real))}
    assert by_id["docker.source"][1:] == ("warn", "other in the image than here: src/train.py, scripts/new.py", BUILD)
    (real / "requirements/h100.lock").write_text("torch==2.11.0\n")
    by_id = {it.id: it for it in found(read_docker_host(real))}
    assert by_id["docker.image"].status == "fail"
    assert by_id["docker.image"].detail.endswith("was made from another requirements/h100.lock than the one here")
