"""Docker hosts that lack something, a project for one, and the engine of this machine."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from finetune.checks.docker.host import CHECKS
from finetune.checks.runner import run
from finetune.config.load import ROOT
from finetune.machine import docker_host
from finetune.machine.docker_host import Disk, DockerHost, Engine, Place, Service, Unreachable
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


def service(**changes: Any) -> DockerHost:
    assert isinstance(READY.service, Service)
    return replace(READY, service=replace(READY.service, **changes))


def image(**changes: Any) -> DockerHost:
    assert READY.image is not None
    return replace(READY, image=replace(READY.image, **changes))


def folder(name: str, mode: int | None, uid: int = 1000, gid: int = 1000) -> DockerHost:
    changes = {"mode": mode, "uid": uid, "gid": gid}
    return service(folders=tuple(replace(it, **changes) if it.name == name else it for it in FOLDERS))


def token(mode: int | None, uid: int = 1000) -> DockerHost:
    return service(tokens={"HF_TOKEN_FILE": Place("/home/trainer/token", mode, uid, uid)})


def unreachable(why: str, **changes: Any) -> DockerHost:
    silence = Unreachable(why, "Read timed out") if why == "other" else Unreachable(why)  # type: ignore[arg-type]
    return replace(READY, engine=silence, image=None, disk=None, **changes)


def disk(free_gib: float, **changes: Any) -> DockerHost:
    return replace(READY, disk=Disk("/var/lib/docker", free_gib), **changes)


BUILD = "docker compose build"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's folder with lock, program, .env and bound folders, in a shell that names none of it."""
    for name in ("UID", "GID", "LOCK", "HF_TOKEN_FILE", "WANDB_API_KEY_FILE"):
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


def answers() -> bool:
    """Whether an engine of this machine answers, with Compose."""
    return all(docker_host._ask("docker", *it)[0] for it in (("info",), ("compose", "version")))


needs_engine = pytest.mark.skipif(not answers(), reason="no Docker engine with Compose answers here")


def docker(*arguments: str, **options: Any) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def real(project: Path) -> Iterator[Path]:
    """A project's folder with compose.yaml, and an image of its own: nothing but the program."""
    # The stand-in's name is not that of the real image, which is left alone.
    name = f"check-docker-test-{os.getpid()}"
    compose = (ROOT / "compose.yaml").read_text(encoding="utf-8")
    (project / "compose.yaml").write_text(compose.replace("image: mistral-7b-qlora:", f"image: {name}:"))
    dockerfile = (
        "FROM scratch\nLABEL lock=h100 flash-attn=build\nVOLUME /cache\n"
        "COPY requirements /app/requirements\nCOPY src /app/src\nCOPY scripts /app/scripts\n"
    )
    (project / "Dockerfile").write_text(dockerfile)
    tag = f"{name}:h100"
    docker("build", "--quiet", "--tag", tag, str(project))
    yield project
    docker("image", "rm", "--force", tag)
