"""Docker hosts that lack something, a project for one, and the engine of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from finetune.checks.docker.host import CHECKS
from finetune.checks.runner import run
from finetune.config.load import ROOT
from finetune.machine import docker_host, docker_image
from finetune.machine.docker_host import DockerHost, Engine, Place, Unreachable
from support.recorded_docker import FOLDERS, READY

IDS = [check.id for check in CHECKS]


class Found(NamedTuple):
    """What a check is to find."""

    id: str
    status: str
    detail: str
    fix: str


def warn(name: str, detail: str, fix: str) -> Found:
    return Found(f"docker.{name}", "warn", detail, fix)


def fail(name: str, detail: str, fix: str) -> Found:
    return Found(f"docker.{name}", "fail", detail, fix)


def skip(name: str, detail: str) -> Found:
    return Found(f"docker.{name}", "skip", detail, "")


def found(host: DockerHost) -> list[Found]:
    return [Found(it.id, it.status, it.detail, it.fix) for it in run(CHECKS, host)]


def engine(**changes: Any) -> DockerHost:
    assert isinstance(READY.engine, Engine)
    return replace(READY, engine=replace(READY.engine, **changes))


def machine(**changes: Any) -> DockerHost:
    return replace(READY, machine=replace(READY.machine, **changes))


def settings(**changes: Any) -> DockerHost:
    return replace(READY, settings=replace(READY.settings, **changes))


def image(**changes: Any) -> DockerHost:
    assert READY.image is not None
    return replace(READY, image=replace(READY.image, **changes))


def folder(name: str, mode: int | None, uid: int = 1000, gid: int = 1000) -> DockerHost:
    other = Place(name, mode, uid, gid)
    return replace(READY, folders=tuple(other if it.name == name else it for it in FOLDERS))


def token(mode: int | None, uid: int = 1000) -> DockerHost:
    return settings(token_files={"HF_TOKEN_FILE": Place("/home/trainer/token", mode, uid, uid)})


def unreachable(why: str, **changes: Any) -> DockerHost:
    silence = Unreachable(why, "Read timed out") if why == "other" else Unreachable(why)  # type: ignore[arg-type]
    return replace(READY, engine=silence, image=None, image_disk=None, volume_disk=None, **changes)


def disk(images: float, volumes: float | None = None, **changes: Any) -> DockerHost:
    """Of one file system, or of two."""
    assert READY.image_disk is not None
    first = replace(READY.image_disk, free_gib=images)
    if volumes is None:
        return replace(READY, image_disk=first, volume_disk=first, **changes)
    second = docker_host.Disk("/mnt/docker", volumes, 67)
    return replace(READY, image_disk=first, volume_disk=second, **changes)


BUILD = "docker compose build"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's folder with lock, program, .env and bound folders, in a shell that names none of it."""
    for name in ("UID", "GID", "LOCK", *docker_host.SECRETS):
        monkeypatch.delenv(name, raising=False)
    for name in ("data", "configs", "models", "adapters/run", "requirements", "src/finetune/__pycache__", "scripts"):
        (tmp_path / name).mkdir(parents=True)
    for name, content in PROGRAM.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "src/finetune/__pycache__/a.pyc").write_bytes(b"compiled")
    (tmp_path / ".env").write_text(f"UID={os.getuid()}\nGID={os.getgid()}\n")
    return tmp_path


PROGRAM = {
    "requirements/h100.lock": b"torch==2.10.0\n",
    "src/train.py": b"print()\n",
    "src/finetune/a.py": b"A = 1\n",
    "scripts/b.sh": b"true\n",
}
ENV_LINES = """\
# LOCK=cpu
UID=1
export GID='2' # mine
UID=3
HF_TOKEN_FILE="$HOME/t#1" # mine
A='$HOME'
B = x # y
C=x#y
"""


def answers() -> bool:
    """Whether an engine of this machine answers, with Compose."""
    return all(docker_host._ask("docker", *it)[0] for it in (("info",), ("compose", "version")))


needs_engine = pytest.mark.skipif(not answers(), reason="no Docker engine with Compose answers here")


def docker(*arguments: str, **options: Any) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def real(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project's folder with compose.yaml, and an image of its own: nothing but the program."""
    shutil.copy(ROOT / "compose.yaml", project)
    # The stand-in's name is not that of a base image: the real one is left alone.
    monkeypatch.setattr(docker_image, "REPOSITORY", f"check-docker-test-{os.getpid()}")
    dockerfile = (
        "FROM scratch\nENV IMAGE_LOCK=h100\nLABEL flash-attn=build\nVOLUME /cache\n"
        "COPY requirements /app/requirements\nCOPY src /app/src\nCOPY scripts /app/scripts\n"
    )
    (project / "Dockerfile").write_text(dockerfile)
    tag = f"{docker_image.REPOSITORY}:h100"
    docker("build", "--quiet", "--tag", tag, str(project))
    yield project
    docker("image", "rm", "--force", tag)
