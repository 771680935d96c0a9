"""Recorded Docker hosts and their possible faults; and the engine of this machine.

The answers to /info are shortened. Those of an H100's host were composed from the fields in Docker's documentation.
"""

from __future__ import annotations

import subprocess
from typing import Any, NamedTuple

import pytest

from support.commands import load_script

check_docker = load_script("check_docker")
Place, Image = check_docker.Place, check_docker.Image
Host = Any  # check_docker.Host, which is not known before the script is loaded

FOLDERS = tuple(
    Place(name, name.startswith("adapters"), 0o040755, 1000, 1000)
    for name in ("configs", "data", "models", "adapters", "adapters/mistral-7b-qlora-h100")
)
ENGINE = {
    "ServerVersion": "28.2.2",
    "OperatingSystem": "Ubuntu 22.04.5 LTS",
    "DockerRootDir": "/var/lib/docker",
    "DriverStatus": [["Backing Filesystem", "extfs"], ["Supports d_type", "true"]],
    "Runtimes": {"nvidia": {"path": "nvidia-container-runtime"}, "runc": {"path": "runc"}},
    "SecurityOptions": ["name=apparmor", "name=seccomp,profile=builtin", "name=cgroupns"],
    "Api": "1.50",
    "Address": "",
}
CDI = [{"Source": "cdi", "ID": "nvidia.com/gpu=0"}, {"Source": "cdi", "ID": "nvidia.com/gpu=all"}]
SERVICE = {
    "image": "mistral-7b-qlora:h100",
    "user": "1000:1000",
    "build": {"args": {"CUDA": None, "FLASH_ATTN": "build", "LOCK": "h100", "MAX_JOBS": ""}},
    "volumes": [],
}
READY = check_docker.Host(
    machine={
        "system": "Linux", "release": "5.15.0-119-generic", "architecture": "x86_64", "container": False,
        "driver": "550.90.07", "gpus": ["NVIDIA H100 80GB HBM3"],
    },
    engine=ENGINE,
    project={"services": {"train-h100": SERVICE}},
    compose="2.36.2",
    buildx="0.24.0",
    hook=True,
    folders=FOLDERS,
    image=Image(14.2, "h100", "build"),
    disk=("/var/lib/docker", 412.3),
)  # fmt: skip
MAC = READY.machine | {"system": "Darwin", "release": "15.1", "architecture": "arm64", "driver": None, "gpus": []}


class Found(NamedTuple):
    """A check's expected finding."""

    id: str
    status: str
    detail: str
    fix: str = ""


def found(host: Host) -> list[Found]:
    return [Found(it["id"], it["status"], it["detail"], it["fix"]) for it in check_docker.results(host)]


def host(**changes: Any) -> Host:
    return READY._replace(**changes)


def engine(more: dict[str, Any], **changes: Any) -> Host:
    return host(engine=ENGINE | more, **changes)


def machine(**changes: Any) -> Host:
    return host(machine=READY.machine | changes)


def service(user: str = "1000:1000", lock: str = "h100", **changes: Any) -> Host:
    changed = SERVICE | {"user": user, "build": {"args": {"LOCK": lock}}}
    return host(project={"services": {"train-h100": changed}}, **changes)


def image(**changes: Any) -> Host:
    return host(image=READY.image._replace(**changes))


def folder(name: str, mode: int, uid: int = 1000, gid: int = 1000, user: str = "1000:1000") -> Host:
    changed = [it._replace(mode=mode, uid=uid, gid=gid) if it.name == name else it for it in FOLDERS]
    return service(user, folders=tuple(changed))


def token(mode: int, uid: int = 1000) -> Host:
    return host(tokens={"HF_TOKEN_FILE": Place("/home/trainer/token", False, mode, uid, uid)})


def silent(why: str, **changes: Any) -> Host:
    """A host whose engine does not answer."""
    return host(engine=why, image=None, disk=None, **changes)


def docker(*arguments: str, **options: Any) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def answers() -> bool:
    """Whether an engine of this machine answers, with Compose."""
    return not any(check_docker.ask("docker", *it).returncode for it in (("info",), ("compose", "version")))


needs_engine = pytest.mark.skipif(not answers(), reason="no Docker engine with Compose answers here")
