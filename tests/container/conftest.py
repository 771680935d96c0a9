"""A real Docker engine, and a copy of this project whose image it built: Dockerfile and compose.yaml unmodified.

`.env` chooses the CPU's lock, leaves flash-attn out and has no UID, so the programs run as the owner of `adapters`.
These tests show everything of the image but what only the H100's has: flash-attn's compile by nvcc 12.1
(benchmarks/results has files of it by 12.4), the hashed CUDA wheels, and Ubuntu's own packages where the base image is
a stand-in. NO_GPU takes the GPU away from the three services that ask.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.docker_project import KEY, PRIVATE, TOKEN, UID, Project, copied


@pytest.fixture(scope="session")
def project(tiny_mistral: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """The project of user 4711, with a tiny base model, keys in files, and its image built."""
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "info"], capture_output=True, check=False).returncode
    ):
        pytest.skip("no Docker engine answers here: docker info")
    folder = copied(tmp_path_factory.mktemp("container") / "project")
    folder.parent.chmod(0o755)
    made = Project(folder, f"test-{os.getpid()}")
    keys = folder.parent / "keys"
    keys.mkdir()
    (keys / "hf").write_text(TOKEN, encoding="utf-8")
    (keys / "wandb").write_text(KEY, encoding="utf-8")
    settings = {
        "LOCK": "cpu", "FLASH_ATTN": "skip", "HF_TOKEN_FILE": f"{keys}/hf", "WANDB_API_KEY_FILE": f"{keys}/wandb",
    }  # fmt: skip
    lines = "".join(f"{key}={value}\n" for key, value in settings.items())
    (folder / ".env").write_text((folder / ".env.example").read_text(encoding="utf-8") + lines, encoding="utf-8")
    row = {"messages": [{"role": "user", "content": PRIVATE}, {"role": "assistant", "content": "Yes."}]}
    (folder / "data" / "processed" / "private.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    shutil.copytree(tiny_mistral, folder / "models" / "tiny")
    for path in (folder / "models" / "tiny").iterdir():
        path.chmod(0o644)
    for path in (*keys.iterdir(), folder / "adapters", folder / "models"):
        os.chown(path, UID, UID)
    done = made.compose("build", minutes=40)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    yield made
    made.compose("--profile", "program", "down", "--volumes", "--timeout", "1")


@pytest.fixture
def clone(project: Project, tiny_mistral: Path) -> Iterator[Project]:
    """The same project as a clone has it, without `.env`, where every user can go; the image is there."""
    with tempfile.TemporaryDirectory(prefix="clone-") as parent:
        Path(parent).chmod(0o755)
        made = Project(copied(Path(parent) / "project"), f"{project.name}-clone")
        shutil.copytree(tiny_mistral, made.folder / "models" / "tiny")
        yield made
        made.compose("--profile", "program", "down", "--volumes", "--timeout", "1")
