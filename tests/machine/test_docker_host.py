"""What is read of a Docker host: settings, folders, commands and engine, fake and real."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import docker
import pytest
from docker.errors import APIError

from finetune.config.load import ROOT
from finetune.errors import CheckFailed
from finetune.files import GIB
from finetune.machine import docker_host
from finetune.machine.docker_host import Disk, Engine, Place, Service, Unreachable, read_docker_host
from support.as_nobody import as_nobody
from support.docker_hosts import needs_engine
from support.recorded_docker import INFO_20, INFO_BARE, INFO_CDI, INFO_NVIDIA, INFO_ROOTLESS


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Sockets have short paths, and another user must be able to reach the socket."""
    with tempfile.TemporaryDirectory(prefix="check-docker-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def commands(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a command `docker` with this text on the PATH, beside nothing else of Docker."""

    def put(script: str) -> None:
        folder = short_folder / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "docker").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "docker").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")

    return put


def test_the_service_is_what_compose_resolves(project: Path) -> None:
    (project / "data").rmdir()
    (project / "adapters/notes.txt").write_text("")
    (project / "token").write_text("hf_secret")
    (project / "token").chmod(0o640)
    owner = (project / "token").stat()
    here = {"uid": owner.st_uid, "gid": owner.st_gid}
    found = docker_host.service_of(resolved(project), project)
    modes = {it.name: it.mode for it in found.folders}
    assert modes.pop("data") is None
    assert found == Service(
        image="mistral-7b-qlora:cpu",
        lock="cpu",
        user="1:2",
        folders=(
            *(
                Place(name, modes[name], **here) if name in modes else Place(name)
                for name in ("configs", "data", "models")
            ),
            *(Place(name, modes[name], **here, writable=True) for name in ("adapters", "adapters/run")),
        ),
        tokens={"HF_TOKEN_FILE": Place("token", 0o100640, **here)},
    )
    assert all(docker_host.is_folder(it) for it in found.folders if it.name != "data")
    assert "secret" not in repr(found)


def resolved(project: Path) -> dict[str, Any]:
    """What Compose 2.26 answered to `config --format json`, shortened."""
    binds = [
        {"type": "bind", "source": f"{project}/{name}", "target": f"/app/{name}", "read_only": True, "bind": {}}
        for name in ("configs", "data", "models")
    ]
    adapters = {"type": "bind", "source": f"{project}/adapters", "target": "/app/adapters", "bind": {}}
    service = {
        "build": {"args": {"FLASH_ATTN": "build", "GIT_COMMIT": "", "LOCK": "cpu", "MAX_JOBS": ""}},
        "image": "mistral-7b-qlora:cpu",
        "user": "1:2",
        "volumes": [*binds, adapters, {"type": "volume", "source": "cache", "target": "/cache"}],
    }
    secrets = {"hf_token": {"file": f"{project}/token"}, "wandb_api_key": {"file": "/dev/null"}}
    return {"services": {"train-h100": service}, "secrets": secrets}


@pytest.mark.parametrize(
    ("script", "version"),
    [
        ("echo 2.26.1-4", "2.26.1"),
        ("echo v2.36.2", "2.36.2"),
        ("echo Docker Compose version v5.1.0", "5.1.0"),
        ("echo 2.26.1; exit 125", None),
        ("echo dev", None),
    ],
)
def test_a_version_is_the_first_number_with_a_dot(
    script: str, version: str | None, commands: Callable[[str], None]
) -> None:
    commands(script)
    assert docker_host._version("docker", "compose", "version", "--short") == version


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        (
            "echo warning >&2; echo; echo services.plan must be a mapping >&2; exit 15",
            "services.plan must be a mapping",
        ),
        ("echo 'failed to read /p/.env: line 4: \"hf_secret\nother' >&2; exit 1", ".env cannot be read, line 4"),
        ("echo 'unexpected character near \"hf_secret' >&2; exit 1", ".env cannot be read"),
        ("exit 1", "no reason given"),
    ],
)
def test_what_compose_says_of_env_never_shows_its_lines(
    script: str, problem: str, commands: Callable[[str], None], tmp_path: Path
) -> None:
    commands(script)
    assert docker_host.read_service(tmp_path) == problem


def test_a_command_that_is_not_there_or_hangs_is_no_answer(
    commands: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands("exec sleep 5")
    monkeypatch.setattr(docker_host, "ANSWER_SECONDS", 0.1)
    assert docker_host._version("docker", "buildx", "version") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert docker_host._version("docker", "buildx", "version") is None


@pytest.mark.parametrize(
    ("info", "wanted"),
    [
        (INFO_20,
            Engine(*("20.10.24+dfsg1", "1.41", "Debian GNU/Linux 12 (bookworm)", ("/var/lib/docker",)),
            runtimes=("io.containerd.runc.v2", "runc"))),
        (INFO_NVIDIA, Engine("28.2.2", "1.41", "Ubuntu 22.04.5 LTS", ("/var/lib/docker",),
            runtimes=("nvidia", "runc"))),
        (INFO_CDI,
            Engine(*("29.0.1", "1.41", "Ubuntu 22.04.5 LTS", ("/var/lib/docker", "/var/lib/containerd")),
            runtimes=("runc",), cdi_devices=("nvidia.com/gpu=0", "nvidia.com/gpu=all"))),
        (INFO_ROOTLESS,
            Engine(*("28.2.2", "1.41", "Debian GNU/Linux 12 (bookworm)", ("/home/trainer/.local/share/docker",)),
            runtimes=("io.containerd.runc.v2", "runc"), rootless=True)),
        (INFO_BARE, Engine("24.0.0-rc.1", "1.41", "Alpine", ("/data",))),
    ],
    ids=["20.10", "nvidia", "cdi", "rootless", "bare"],
)  # fmt: skip
def test_an_engine_is_what_it_says(info: dict[str, Any], wanted: Engine) -> None:
    assert docker_host.engine_of(info, "1.41", docker_host.LOCAL) == wanted
    assert docker_host.engine_of(info, "1.41", "http://gpu-7:2375").address == "http://gpu-7:2375"


def test_an_engine_that_fails_over_info_does_not_answer(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def info(_: object) -> None:
        raise APIError("500 Server Error", explanation="out of order")

    monkeypatch.setattr(docker, "from_env", lambda **_: docker.DockerClient("unix:///nowhere", version="1.41"))
    monkeypatch.setattr(docker.DockerClient, "info", info)
    assert read_docker_host(project).engine == Unreachable("other", '500 Server Error ("out of order")')


def test_the_disk_is_the_fullest_of_those_with_the_engines_data(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"/var/lib/docker": 2 * GIB, "/var/lib/containerd": GIB}

    def usage(folder: str) -> SimpleNamespace:
        if folder not in free:
            raise FileNotFoundError(folder)
        return SimpleNamespace(free=free[folder])

    monkeypatch.setattr(shutil, "disk_usage", usage)
    engine = docker_host.engine_of(INFO_CDI, "1.41", docker_host.LOCAL)
    assert docker_host._disk(engine) == Disk("/var/lib/containerd", 1.0)
    assert docker_host._disk(replace(engine, address="http://gpu-7:2375")) is None
    assert docker_host._disk(replace(engine, folders=("/var/lib/docker", "/not/there"))) is None


@pytest.mark.parametrize(
    ("host", "wanted"),
    [
        ("unix:///nowhere/docker.sock", "stopped"), ("unix://{folder}/dead.sock", "stopped"),
        ("unix://{folder}/closed.sock", "denied"), ("tcp://127.0.0.1:1", "stopped"), ("ssh://gpu-7", "other"),
        ("nonsense", "other"),
    ],
)  # fmt: skip
def test_why_no_engine_answers_is_told_apart(
    host: str, wanted: str, short_folder: Path, project: Path, commands: Callable[[str], None]
) -> None:
    commands("exit 1")
    for name in ("dead", "closed"):
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(short_folder / f"{name}.sock"))
    (short_folder / "dead.sock").chmod(0o777)
    (short_folder / "closed.sock").chmod(0)
    with pytest.MonkeyPatch.context() as patch, as_nobody():
        patch.setenv("DOCKER_HOST", host.format(folder=short_folder))
        read = docker_host._engine_facts(project, "no service")
    assert [it.why for it in read.values()] == [wanted]


def test_without_the_docker_command_it_is_not_installed(
    short_folder: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{short_folder}/docker.sock")
    monkeypatch.setenv("PATH", str(short_folder))
    assert read_docker_host(project).engine == Unreachable("absent")


def test_without_docker_py_two_lines_say_what_to_type(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(CheckFailed) as failure:
        read_docker_host(project)
    assert str(failure.value) == (
        f"not installed for {sys.executable}: docker\ntype: scripts/make_venv.sh, then run this with .venv/bin/python"
    )


@pytest.mark.slow
@needs_engine
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("UID=1\nGID=1\nHF_TOKEN='hf_secret\n", ".env cannot be read, line 4"),
        ("UID=1\nGID=1\nmy token: hf_secret\n", ".env cannot be read, line 3"),
        ("GID=1\n", "required variable UID is missing a value"),
    ],
)
def test_what_real_compose_has_against_an_env_file_is_told_without_its_tokens(
    text: str, problem: str, project: Path
) -> None:
    shutil.copy(ROOT / "compose.yaml", project)
    (project / ".env").write_text(text)
    told = str(docker_host.read_service(project))
    assert problem in told
    assert "secret" not in told
