"""The command that says whether this Docker host can train: on recorded hosts, on a fake engine, and on a real one."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from finetune.checks.docker.host import CHECKS, CONFIGURE, INSTALL, MAKE_ENV, MEND_ENV, TOOLKIT
from finetune.checks.runner import run
from finetune.cli import PYTHON
from finetune.config.load import ROOT
from finetune.errors import CheckFailed
from finetune.machine import docker_host, docker_image
from finetune.machine.docker_host import DockerHost, Engine, Place, Settings, Unreachable, read_docker_host
from finetune.machine.docker_image import Image
from support.commands import load_script
from support.recorded import A100_80, H100, M4
from support.recorded_docker import (
    FOLDERS,
    INFO_20,
    INFO_BARE,
    INFO_CDI,
    INFO_NVIDIA,
    INFO_ROOTLESS,
    READY,
    FakeEngine,
    fake_engine,
)

SCRIPT = ROOT / "scripts" / "check_docker.py"
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


# Recorded hosts -------------------------------------------------------------------------------------------------------


def test_on_a_host_that_is_ready_every_check_passes_and_says_what_it_saw() -> None:
    details = {
        "docker.host": "Linux 5.15.0-119-generic on x86_64",
        "docker.driver": "driver 550.90.07",
        "docker.device": "NVIDIA H100 80GB HBM3",
        "docker.engine": "Docker 28.2.2 (API 1.50) on Ubuntu 22.04.5 LTS",
        "docker.compose": "Compose 2.36.2",
        "docker.buildx": "Buildx 0.24.0",
        "docker.gpu": "runtime nvidia, with its hook",
        "docker.env": "UID 1000, GID 1000, LOCK h100",
        "docker.secrets": "no token is given",
        "docker.binds": "UID 1000 reads data, configs, models and writes adapters",
        "docker.config": "Compose takes compose.yaml",
        "docker.image": "mistral-7b-qlora:h100, 14.2 GiB, made from requirements/h100.lock",
        "docker.source": "src and scripts in the image are those here",
        "docker.flash_attention": "flash-attn is in the image",
        "docker.disk": "412.3 GiB free in /var/lib/docker, expected to be needed: 13.5 for the base",
    }
    assert found(READY) == [Found(id_, "pass", detail, "") for id_, detail in details.items()]


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


NO_ENGINE = [
    skip("gpu", "needs docker.engine"),
    skip("image", "needs docker.engine"),
    skip("source", "needs docker.image"),
    skip("flash_attention", "needs docker.image"),
    skip("disk", "needs docker.engine"),
]
NO_GPU = [skip("driver", "needs docker.host"), skip("device", "needs docker.driver")]
NO_IMAGE = [skip("source", "needs docker.image"), skip("flash_attention", "needs docker.image")]
NO_ENV = [
    skip("secrets", "needs docker.env"),
    skip("binds", "needs docker.env"),
    skip("config", "needs docker.env"),
    skip("image", "needs docker.env"),
    *NO_IMAGE,
]
DRIVER = "sudo apt install nvidia-driver-570-server, then restart"
COMPOSE = "on Ubuntu: sudo apt-get install -y docker-compose-plugin, or docker-compose-v2 beside Ubuntu's own docker.io"
BUILDX = "on Ubuntu: sudo apt-get install -y docker-buildx-plugin, or docker-buildx beside Ubuntu's own docker.io"
BUILD = "docker compose build"
FREE = "docker system df shows what holds it; docker image prune; or another data-root in /etc/docker/daemon.json"
MADE = "mistral-7b-qlora:h100, 14.2 GiB"

FAULTS: dict[str, tuple[DockerHost, list[Found]]] = {
    "a Mac": (
        replace(unreachable("stopped"), machine=M4),
        [
            fail(
                "host",
                "macOS 15.1 on arm64; a container on a Mac reaches no GPU",
                "./scripts/setup_m4.sh, which needs no Docker",
            ),
            *NO_GPU,
            fail("engine", "Docker's engine does not run", "open -a Docker"),
            skip("gpu", "needs docker.host"),
            *NO_ENGINE[1:],
        ],
    ),
    "a Mac without Docker": (
        replace(unreachable("absent"), machine=M4, compose=None, buildx=None),
        [
            fail(
                "host",
                "macOS 15.1 on arm64; a container on a Mac reaches no GPU",
                "./scripts/setup_m4.sh, which needs no Docker",
            ),
            *NO_GPU,
            fail("engine", "Docker is not installed", "brew install --cask docker"),
            fail("compose", "docker compose does not answer", COMPOSE),
            warn(
                "buildx",
                "docker buildx does not answer; newer versions of Compose build by it",
                BUILDX,
            ),
            skip("gpu", "needs docker.host"),
            skip("config", "needs docker.compose"),
            *NO_ENGINE[1:],
        ],
    ),
    "another system": (
        machine(system="FreeBSD", release="14.1"),
        [
            fail("host", "FreeBSD 14.1 on x86_64; train-h100 needs Linux", "rent a Linux machine with an H100"),
            *NO_GPU,
            skip("gpu", "needs docker.host"),
        ],
    ),
    "another processor": (
        machine(architecture="aarch64"),
        [
            warn(
                "host",
                "Linux 5.15.0-119-generic on aarch64; requirements/h100.lock was resolved for x86_64",
                "rent an x86_64 machine",
            )
        ],
    ),
    "asked in a container": (
        machine(container=True),
        [
            warn(
                "host",
                "Linux 5.15.0-119-generic on x86_64, in a container: folders and driver seen here are its own",
                "run this on the host",
            )
        ],
    ),
    "no driver": (
        machine(driver=None, gpus=()),
        [
            fail("driver", "nvidia-smi is not there or does not answer: no NVIDIA driver that works", DRIVER),
            skip("device", "needs docker.driver"),
        ],
    ),
    "an old driver": (
        machine(driver="470.256.02"),
        [
            fail("driver", "driver 470.256.02; CUDA 12 needs 525 or newer", DRIVER),
            skip("device", "needs docker.driver"),
        ],
    ),
    "a driver without a GPU": (
        machine(gpus=()),
        [
            fail(
                "device",
                "the driver shows no GPU",
                "unset CUDA_VISIBLE_DEVICES; if that is not it, sudo dmesg | grep -i nvrm",
            )
        ],
    ),
    "another GPU": (
        machine(gpus=A100_80.gpus),
        [
            warn(
                "device",
                "NVIDIA A100-SXM4-80GB, an NVIDIA GPU, but no H100: hours and memory differ",
                "nvidia-smi --query-gpu=compute_cap --format=csv says whether it is 9.0, which flash-attn is built for"
                "; if not: docker compose build --build-arg FLASH_ATTN_CUDA_ARCHS=80, for 8.0",
            )
        ],
    ),
    "no Docker": (
        unreachable("absent"),
        [fail("engine", "Docker is not installed", f"on Ubuntu: {INSTALL}"), *NO_ENGINE],
    ),
    "an engine that was not started": (
        unreachable("stopped"),
        [fail("engine", "Docker's engine does not run", "sudo systemctl start docker"), *NO_ENGINE],
    ),
    "a user outside of the group": (
        unreachable("denied", in_group=False),
        [
            fail(
                "engine",
                "you may not ask Docker's engine",
                "sudo usermod -aG docker $USER, then log in again (newgrp docker)",
            ),
            *NO_ENGINE,
        ],
    ),
    "a session from before the group": (
        unreachable("denied"),
        [
            fail(
                "engine",
                "this session does not know yet that you are in the group docker",
                "newgrp docker, or log in again",
            ),
            *NO_ENGINE,
        ],
    ),
    "an engine that hangs": (
        unreachable("other"),
        [
            fail(
                "engine",
                "Docker's engine does not answer: Read timed out",
                "docker info; docker context ls; echo $DOCKER_HOST",
            ),
            *NO_ENGINE,
        ],
    ),
    "an engine elsewhere": (
        engine(address="http://gpu-7:2375"),
        [
            fail(
                "engine",
                "Docker 28.2.2 (API 1.50) on Ubuntu 22.04.5 LTS at http://gpu-7:2375, another machine, "
                "which does not see these folders",
                "unset DOCKER_HOST; docker context use default; or run this there",
            ),
            *NO_ENGINE,
        ],
    ),
    "an old engine": (
        engine(version="19.03.15", api="1.40"),
        [
            fail(
                "engine",
                "Docker 19.03.15 (API 1.40) on Ubuntu 22.04.5 LTS, wanted 20.10 or newer",
                f"on Ubuntu: {INSTALL}",
            ),
            *NO_ENGINE,
        ],
    ),
    "a rootless engine with a UID": (
        engine(rootless=True),
        [
            warn(
                "engine",
                "Docker 28.2.2 (API 1.50) on Ubuntu 22.04.5 LTS, rootless, which was not tried: "
                "a GPU there needs no-cgroups, and memlock may not be raised",
                "sudo nvidia-ctk config --set nvidia-container-cli.no-cgroups --in-place; "
                "and take the ulimits out of compose.yaml",
            ),
            fail(
                "env",
                "UID 1000, GID 1000, LOCK h100; in a rootless engine only 0 is you",
                "(echo; echo UID=0; echo GID=0) >> .env",
            ),
            *NO_ENV,
        ],
    ),
    "no Compose": (
        replace(READY, compose=None),
        [fail("compose", "docker compose does not answer", COMPOSE), skip("config", "needs docker.compose")],
    ),
    "an old Compose": (
        replace(READY, compose="2.17.3"),
        [fail("compose", "Compose 2.17.3, wanted 2.20 or newer", COMPOSE), skip("config", "needs docker.compose")],
    ),
    "no Buildx": (
        replace(READY, buildx=None),
        [
            warn(
                "buildx",
                "docker buildx does not answer; newer versions of Compose build by it",
                BUILDX,
            )
        ],
    ),
    "no NVIDIA toolkit": (
        replace(engine(runtimes=("runc",)), hook=False),
        [
            fail(
                "gpu",
                'the engine has no runtime nvidia and no CDI device: could not select device driver "nvidia"',
                TOOLKIT,
            )
        ],
    ),
    "a toolkit that the engine does not know": (
        engine(runtimes=("runc",)),
        [
            fail(
                "gpu",
                "the toolkit is installed, but the engine has no runtime nvidia: not configured, or not restarted",
                CONFIGURE,
            )
        ],
    ),
    "a runtime whose toolkit is gone": (
        replace(READY, hook=False),
        [
            warn(
                "gpu",
                "runtime nvidia, but no nvidia-container-runtime-hook on this PATH, by which the engine starts a GPU",
                TOOLKIT,
            )
        ],
    ),
    "CDI only": (
        replace(engine(runtimes=("runc",), cdi_devices=("nvidia.com/gpu=0", "nvidia.com/gpu=all")), hook=False),
        [
            warn(
                "gpu",
                "no runtime nvidia, but CDI devices: nvidia.com/gpu=0, nvidia.com/gpu=all; "
                "whether this engine starts a GPU by them was not tried",
                TOOLKIT,
            )
        ],
    ),
    "CDI devices of another maker": (
        replace(engine(runtimes=("runc",), cdi_devices=("amd.com/gpu=0",)), hook=False),
        [
            fail(
                "gpu",
                'the engine has no runtime nvidia and no CDI device: could not select device driver "nvidia"',
                TOOLKIT,
            )
        ],
    ),
    "Ubuntu's snap": (
        replace(engine(runtimes=("runc",), folder="/var/snap/docker/common/var-lib-docker"), hook=False),
        [
            fail(
                "gpu",
                "the engine is Ubuntu's snap, which nvidia-ctk does not configure, and has no runtime nvidia",
                f"sudo snap remove docker (its images and volumes go), then {INSTALL}, then {TOOLKIT}",
            )
        ],
    ),
    "Docker Desktop": (
        engine(runtimes=("runc",), system="Docker Desktop"),
        [
            fail(
                "gpu",
                "Docker Desktop's engine runs in a virtual machine and has no runtime nvidia",
                f"docker context use default, where an engine is installed; else {INSTALL}, then {TOOLKIT}",
            )
        ],
    ),
    "no .env": (
        replace(READY, settings=Settings(problem="No such file or directory")),
        [fail("env", ".env: No such file or directory", MAKE_ENV), *NO_ENV],
    ),
    "a .env without numbers": (
        settings(uid="", gid="$(id -g)"),
        [fail("env", "UID is '', GID is '$(id -g)' in .env, wanted numbers", MEND_ENV), *NO_ENV],
    ),
    "a lock that there is not": (
        settings(lock="h200"),
        [fail("env", "LOCK is 'h200' in .env, wanted h100 or cpu", "echo LOCK=h100 >> .env"), *NO_ENV],
    ),
    "another user's numbers": (
        replace(settings(uid="1001"), folders=()),
        [
            warn(
                "env", "UID 1001, GID 1000, LOCK h100; you are 1000, and what a run writes would not be yours", MEND_ENV
            )
        ],
    ),
    "a token file that is not there": (
        token(None),
        [
            fail(
                "secrets",
                "no file lies where HF_TOKEN_FILE in .env says",
                "hf auth login makes ~/.cache/huggingface/token; mend .env",
            )
        ],
    ),
    "a folder in a token file's place": (
        token(0o040700),
        [
            fail(
                "secrets",
                "no file lies where HF_TOKEN_FILE in .env says",
                "hf auth login makes ~/.cache/huggingface/token; mend .env",
            )
        ],
    ),
    "a token file of root's": (
        token(0o100600, uid=0),
        [
            fail(
                "secrets",
                "UID 1000 cannot read /home/trainer/token (-rw------- 0:0)",
                "sudo chown 1000 /home/trainer/token && chmod 600 /home/trainer/token",
            )
        ],
    ),
    "a token that no container gets": (
        settings(loose=("HF_TOKEN", "WANDB_API_KEY")),
        [
            warn(
                "secrets",
                "HF_TOKEN and WANDB_API_KEY set, but no container gets that, only what a file holds",
                "put it into a file that only you can read, "
                "and HF_TOKEN_FILE=FILE and WANDB_API_KEY_FILE=FILE into .env",
            )
        ],
    ),
    "folders that are not there": (
        replace(READY, folders=(*FOLDERS[:2], Place("models"), Place("adapters"))),
        [fail("binds", "not there: models, adapters", "mkdir -p models adapters")],
    ),
    "a file in a folder's place": (
        folder("models", 0o100644),
        [fail("binds", "not a folder: models", "rm models && mkdir models, if it may go")],
    ),
    "adapters of root's": (
        folder("adapters", 0o040755, 0, 0),
        [
            fail(
                "binds",
                "UID 1000, GID 1000 cannot write adapters (drwxr-xr-x 0:0)",
                "sudo chown -R 1000:1000 adapters",
            )
        ],
    ),
    "a run of another group's": (
        folder("adapters/mistral-7b-qlora-h100", 0o040755, 1001, 1000),
        [
            fail(
                "binds",
                "UID 1000, GID 1000 cannot write adapters/mistral-7b-qlora-h100 (drwxr-xr-x 1001:1000)",
                "sudo chown -R 1000:1000 adapters",
            )
        ],
    ),
    "root without capabilities": (
        replace(settings(uid="0", gid="0"), user=0),
        [
            fail(
                "binds",
                "UID 0, GID 0 cannot write adapters (drwxr-xr-x 1000:1000), "
                "adapters/mistral-7b-qlora-h100 (drwxr-xr-x 1000:1000)",
                "sudo chown -R 0:0 adapters",
            )
        ],
    ),
    "closed data": (
        folder("data", 0o040700, 0, 0),
        [fail("binds", "UID 1000, GID 1000 cannot read data (drwx------ 0:0)", "chmod -R a+rX data")],
    ),
    "remapped users": (
        engine(remapped=True),
        [skip("binds", "there; with userns-remap a container's UID is another here, so modes tell nothing")],
    ),
    "a compose.yaml that Compose refuses": (
        replace(READY, config_problem="services.plan Additional property netwrk_mode is not allowed"),
        [
            fail(
                "config",
                "Compose refuses compose.yaml: services.plan Additional property netwrk_mode is not allowed",
                "docker compose config --quiet",
            )
        ],
    ),
    "no image": (
        replace(READY, image=None),
        [fail("image", "no image mistral-7b-qlora:h100", BUILD), *NO_IMAGE],
    ),
    "the demo's image": (
        settings(lock="cpu"),
        [
            fail(
                "image",
                "LOCK is cpu: an image without CUDA, which train-h100 needs",
                "echo LOCK=h100 >> .env && docker compose build",
            ),
            *NO_IMAGE,
        ],
    ),
    "an image from another lock": (
        image(lock="cpu"),
        [fail("image", f"{MADE}, says that it was made from cpu lock", BUILD), *NO_IMAGE],
    ),
    "an image of somebody else's": (
        image(lock=""),
        [fail("image", f"{MADE}, says that it was made from no lock", BUILD), *NO_IMAGE],
    ),
    "an image from an older lock": (
        image(changed=("requirements/h100.lock", "src/train.py")),
        [
            fail("image", f"{MADE}, was made from another requirements/h100.lock than the one here", BUILD),
            *NO_IMAGE,
        ],
    ),
    "an image that cannot be opened": (
        image(problem="no space left on device"),
        [fail("image", f"{MADE}, cannot be looked into: no space left on device", BUILD), *NO_IMAGE],
    ),
    "an image of an older program": (
        image(changed=("src/train.py", *(f"scripts/{name}.py" for name in "abcd"))),
        [
            warn(
                "source",
                "other in the image than here: src/train.py, scripts/a.py, scripts/b.py and 2 more",
                BUILD,
            )
        ],
    ),
    "an image without flash-attn": (
        image(flash_attn="skip"),
        [
            warn(
                "flash_attention",
                "the image has no flash-attn",
                "echo FLASH_ATTN=build >> .env && docker compose build; or do without: "
                "docker compose run --rm train-h100 --set model.attn_implementation=sdpa",
            )
        ],
    ),
    "a disk too small to build": (
        disk(30.0, image=None),
        [
            fail("image", "no image mistral-7b-qlora:h100", BUILD),
            *NO_IMAGE,
            warn(
                "disk",
                "30.0 GiB free in /var/lib/docker, expected to be needed: 40 for the image, 13.5 for the base",
                FREE,
            ),
        ],
    ),
    "two disks, one too small": (
        disk(25.0, 12.0, image=None),
        [
            fail("image", "no image mistral-7b-qlora:h100", BUILD),
            *NO_IMAGE,
            warn(
                "disk",
                "25.0 GiB free in /var/lib/docker, expected to be needed: 40 for the image; "
                "12.0 GiB free in /mnt/docker, expected to be needed: 13.5 for the base",
                FREE,
            ),
        ],
    ),
    "a disk that may be too small for the base": (
        disk(3.0),
        [
            warn(
                "disk",
                "3.0 GiB free in /var/lib/docker, expected to be needed: 13.5 for the base, "
                "unless the cache volume holds it",
                FREE,
            )
        ],
    ),
    "a disk in a virtual machine": (
        replace(READY, image_disk=None, volume_disk=None),
        [skip("disk", "where Docker keeps its data cannot be seen from here")],
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_with_what_to_type_and_all_else_passes(name: str) -> None:
    host, wanted = FAULTS[name]
    assert [it for it in found(host) if it.status != "pass"] == wanted


def test_every_check_has_a_fault_and_one_of_level_warn_never_fails() -> None:
    findings = {it.id: set[str]() for _, wanted in FAULTS.values() for it in wanted}
    for _, wanted in FAULTS.values():
        for it in wanted:
            findings[it.id].add(it.status)
    assert [id_ for id_ in IDS if not findings[id_] & {"warn", "fail"}] == []
    assert {check.id for check in CHECKS if check.level == "fail"} == {id_ for id_ in IDS if "fail" in findings[id_]}


@pytest.mark.parametrize(
    ("name", "host", "detail"),
    [
        ("docker.env", replace(settings(uid="1001"), folders=FOLDERS[:3]), None),
        (
            "docker.env",
            replace(folder("adapters", 0o040755, 1001, 0), settings=replace(READY.settings, uid="1001")),
            "",
        ),
        ("docker.binds", folder("adapters", 0o040770, 0, 1000), ""),
        ("docker.binds", folder("adapters", 0o040777, 0, 0), ""),
        ("docker.secrets", token(0o100600), "tokens from /home/trainer/token"),
        (
            "docker.secrets",
            settings(token_files={"HF_TOKEN_FILE": Place("/dev/null", 0o020666, 0, 0)}),
            "tokens from /dev/null",
        ),
        ("docker.secrets", replace(token(0o100600, uid=0), engine=engine(remapped=True).engine), ""),
        ("docker.disk", disk(40.0, 13.5, image=None), ""),
        ("docker.disk", disk(53.5, image=None), ""),
        ("docker.driver", machine(driver="525.60.13"), "driver 525.60.13"),
        ("docker.engine", engine(version="20.10.24+dfsg1"), ""),
        ("docker.device", machine(gpus=H100.gpus * 8), "NVIDIA H100 80GB HBM3 (the first of 8)"),
    ],
)
def test_what_is_just_good_enough_passes(name: str, host: DockerHost, detail: str | None) -> None:
    [it] = [it for it in found(host) if it.id == name]
    assert it.status == ("warn" if detail is None else "pass"), it
    assert not detail or it.detail == detail


def test_in_a_rootless_engine_root_is_who_asks() -> None:
    host = replace(engine(rootless=True), settings=replace(READY.settings, uid="0", gid="0"))
    by_id = {it.id: it for it in found(host)}
    assert (by_id["docker.env"].status, by_id["docker.binds"].status) == ("pass", "pass")
    assert by_id["docker.binds"].detail == "UID 1000 reads data, configs, models and writes adapters"


def test_the_long_commands_are_what_docker_and_nvidia_say_for_ubuntu() -> None:
    assert TOOLKIT == (
        "curl -fsSL https://nvidia.github.io/libnvidia-container/gpgkey | sudo gpg --dearmor --yes "
        "-o /usr/share/keyrings/nvidia-container-toolkit-keyring.gpg && "
        "curl -fsSL https://nvidia.github.io/libnvidia-container/stable/deb/nvidia-container-toolkit.list | "
        "sed 's#deb https://#deb [signed-by=/usr/share/keyrings/nvidia-container-toolkit-keyring.gpg] https://#g' | "
        "sudo tee /etc/apt/sources.list.d/nvidia-container-toolkit.list && "
        "sudo apt-get update && sudo apt-get install -y nvidia-container-toolkit && "
        "sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"
    )
    assert INSTALL == (
        "sudo install -m 0755 -d /etc/apt/keyrings && "
        "sudo curl -fsSL https://download.docker.com/linux/ubuntu/gpg -o /etc/apt/keyrings/docker.asc && "
        'echo "deb [arch=$(dpkg --print-architecture) signed-by=/etc/apt/keyrings/docker.asc] '
        'https://download.docker.com/linux/ubuntu $(. /etc/os-release && echo $VERSION_CODENAME) stable" | '
        "sudo tee /etc/apt/sources.list.d/docker.list && sudo apt-get update && "
        "sudo apt-get install -y docker-ce docker-ce-cli containerd.io docker-buildx-plugin docker-compose-plugin"
    )
    for command in (TOOLKIT, INSTALL, CONFIGURE, MAKE_ENV, MEND_ENV):
        assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0


def test_the_line_that_makes_env_is_the_one_in_its_example_and_gives_a_good_one(tmp_path: Path) -> None:
    assert MAKE_ENV in (ROOT / ".env.example").read_text(encoding="utf-8")
    shutil.copy(ROOT / ".env.example", tmp_path)
    wanted = Settings(uid=str(os.getuid()), gid=str(os.getgid()))
    subprocess.run(["bash", "-c", MAKE_ENV], cwd=tmp_path, check=True)
    assert docker_host.read_settings(tmp_path) == wanted
    subprocess.run(["sed", "-i", "s/ID=.*/ID=nobody/", ".env"], cwd=tmp_path, check=True)
    subprocess.run(["bash", "-c", MEND_ENV], cwd=tmp_path, check=True)
    assert docker_host.read_settings(tmp_path) == wanted


# What is read ---------------------------------------------------------------------------------------------------------


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


def test_an_env_file_is_read_as_compose_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/trainer")
    assert docker_host.parse_env(f"{ENV_LINES}bad\n") == {
        "UID": "3",
        "GID": "2",
        "HF_TOKEN_FILE": "/home/trainer/t#1",
        "A": "$HOME",
        "B": "x",
        "C": "x#y",
    }


def test_the_shell_comes_before_the_env_file(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / ".env").write_text("UID=1\nGID=2\nLOCK=h100\n")
    monkeypatch.setenv("LOCK", "cpu")
    assert docker_host.read_settings(project) == Settings(uid="1", gid="2", lock="cpu")


def test_of_tokens_only_files_and_names_are_kept(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(project))
    (project / "token").write_text("hf_secret")
    (project / "token").chmod(0o640)
    (project / ".env").write_text("UID=1\nGID=2\nHF_TOKEN=hf_loose\nHF_TOKEN_FILE=~/token\nWANDB_API_KEY=w_secret\n")
    read = docker_host.read_settings(project)
    owner = (project / "token").stat()
    assert read.token_files == {"HF_TOKEN_FILE": Place("~/token", 0o100640, owner.st_uid, owner.st_gid)}
    assert read.loose == ("WANDB_API_KEY",)
    assert "secret" not in repr(read)
    assert "loose" not in repr(read).replace("loose=", "")


def test_an_env_file_that_is_a_folder_is_a_problem(project: Path) -> None:
    (project / ".env").unlink()
    (project / ".env").mkdir()
    assert docker_host.read_settings(project) == Settings(problem="Is a directory")


def test_folders_are_those_that_are_bound_and_those_of_runs(project: Path) -> None:
    (project / "data").rmdir()
    (project / "models").rmdir()
    (project / "models").write_text("")
    (project / "adapters/notes.txt").write_text("")
    read = list(docker_host.read_folders(project))
    assert [it.name for it in read] == ["data", "configs", "models", "adapters", "adapters/run"]
    assert [docker_host.is_folder(it) for it in read] == [False, True, False, True, True]
    assert read[0].mode is None


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a command `docker` with this text on the PATH, beside nothing else of Docker."""

    def put(script: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "docker").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "docker").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")

    return put


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
        ("exit 0", ""),
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
    assert docker_host._config_problem(tmp_path) == problem


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
        (
            INFO_20,
            Engine(
                *("20.10.24+dfsg1", "1.41", "Debian GNU/Linux 12 (bookworm)", "/var/lib/docker"),
                runtimes=("io.containerd.runc.v2", "runc"),
            ),
        ),
        (
            INFO_NVIDIA,
            Engine("28.2.2", "1.41", "Ubuntu 22.04.5 LTS", "/var/lib/docker", runtimes=("nvidia", "runc")),
        ),
        (
            INFO_CDI,
            Engine(
                *("29.0.1", "1.41", "Ubuntu 22.04.5 LTS", "/var/lib/docker"),
                runtimes=("runc",),
                cdi_devices=("nvidia.com/gpu=0", "nvidia.com/gpu=all"),
                containerd=True,
            ),
        ),
        (
            INFO_ROOTLESS,
            Engine(
                *("28.2.2", "1.41", "Debian GNU/Linux 12 (bookworm)", "/home/trainer/.local/share/docker"),
                runtimes=("io.containerd.runc.v2", "runc"),
                rootless=True,
            ),
        ),
        (INFO_BARE, Engine("24.0.0-rc.1", "1.41", "Alpine", "/data")),
    ],
    ids=["20.10", "nvidia", "cdi", "rootless", "bare"],
)
def test_an_engine_is_what_it_says(info: dict[str, Any], wanted: Engine) -> None:
    assert docker_host.engine_of(info, "1.41", docker_host.LOCAL) == wanted
    assert docker_host.engine_of(info, "1.41", "http://gpu-7:2375").address == "http://gpu-7:2375"


# A fake engine --------------------------------------------------------------------------------------------------------


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


def test_an_image_of_this_program_differs_in_nothing(fake: FakeEngine, project: Path) -> None:
    fake.hold(PROGRAM)
    read = read_docker_host(project)
    assert read.engine == docker_host.engine_of(INFO_NVIDIA, "1.41", docker_host.LOCAL)
    assert read.image == Image(3.0, "h100", "build")


def test_an_image_says_itself_which_lock_it_was_made_from(fake: FakeEngine, project: Path) -> None:
    fake.hold(PROGRAM, lock="cpu", flash_attn="skip")
    assert read_docker_host(project).image == Image(3.0, "cpu", "skip")


def test_files_that_were_changed_added_or_removed_since_are_named(fake: FakeEngine, project: Path) -> None:
    fake.hold(PROGRAM | {"scripts/old.py": b"", "src/finetune/__pycache__/a.pyc": b"", "src/train.py": b"old"})
    (project / "src/new.py").write_text("")
    (project / "requirements/h100.lock").write_text("torch==2.11.0\n")
    read = read_docker_host(project)
    assert read.image is not None
    assert read.image.changed == ("requirements/h100.lock", "src/new.py", "src/train.py", "scripts/old.py")


def test_an_image_without_the_program_differs_in_all_of_it(fake: FakeEngine, project: Path) -> None:
    fake.hold({})
    read = read_docker_host(project)
    assert read.image is not None
    assert sorted(read.image.changed) == sorted(PROGRAM)


def test_the_container_is_made_and_removed_with_its_volumes_and_never_started(fake: FakeEngine, project: Path) -> None:
    fake.hold(PROGRAM)
    read_docker_host(project)
    changing = [request for request in fake.requests if request.startswith(("POST", "PUT", "DELETE"))]
    assert changing == ["POST /v1.41/containers/create", "DELETE /v1.41/containers/1?v=True&link=False&force=True"]


def test_the_image_is_the_one_that_the_lock_of_env_names(fake: FakeEngine, project: Path) -> None:
    (project / ".env").write_text("UID=1\nGID=1\nLOCK=cpu\n")
    read = read_docker_host(project)
    assert isinstance(read.engine, Engine)
    assert read.image is None
    assert [request for request in fake.requests if "/images/" in request] == [
        "GET /v1.41/images/mistral-7b-qlora:cpu/json"
    ]


def test_an_engine_without_room_for_a_container_is_a_finding_about_the_image(fake: FakeEngine, project: Path) -> None:
    fake.hold(PROGRAM)
    fake.full = True
    read = read_docker_host(project)
    assert read.image is not None
    assert read.image.problem.endswith('Internal Server Error ("no space left on device")')


def test_an_engine_that_fails_over_info_does_not_answer(fake: FakeEngine, project: Path) -> None:
    fake.info_status, fake.info = 500, {"message": "out of order"}
    read = read_docker_host(project)
    assert isinstance(read.engine, Unreachable)
    assert read.engine.why == "other"
    assert read.engine.text.endswith('Internal Server Error ("out of order")')


@pytest.mark.parametrize(
    ("host", "wanted"),
    [
        ("unix:///nowhere/docker.sock", "stopped"),
        ("unix://{folder}/dead.sock", "stopped"),
        ("unix://{folder}/closed.sock", "denied"),
        ("tcp://127.0.0.1:1", "stopped"),
        ("ssh://gpu-7", "other"),
        ("nonsense", "other"),
    ],
)
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
        read = docker_host._engine_facts(project, "h100")
    assert [it.why for it in read.values()] == [wanted]


def test_without_the_docker_command_it_is_not_installed(
    short_folder: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{short_folder}/docker.sock")
    monkeypatch.setenv("PATH", str(short_folder))
    assert read_docker_host(project).engine == Unreachable("absent")


class as_nobody:
    """Root may open what is closed; whoever runs the tests as root is nobody for a while."""

    def __enter__(self) -> None:
        if os.getuid() == 0:
            os.seteuid(65534)

    def __exit__(self, *_: object) -> None:
        os.seteuid(os.getuid())


def test_without_docker_py_two_lines_say_what_to_type(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(CheckFailed) as failure:
        read_docker_host(project)
    assert str(failure.value) == (
        f"not installed for {sys.executable}: docker\ntype: scripts/make_venv.sh, then run this with .venv/bin/python"
    )


# As a person runs it --------------------------------------------------------------------------------------------------


@pytest.fixture
def script() -> ModuleType:
    return load_script("check_docker")


@pytest.fixture
def shown(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """(exit code, stdout, stderr) of the command on a recorded host."""

    def running(host: DockerHost, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(script, "read_docker_host", lambda: host)
        monkeypatch.setattr(sys, "argv", ["check_docker.py", *arguments])
        code = 0
        try:
            script.main()
        except SystemExit as end:
            assert isinstance(end.code, int)
            code = end.code
        written = capsys.readouterr()
        return code, written.out, written.err

    return running


def test_a_ready_host_is_0_and_the_next_command(shown: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = shown(READY)
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0] == "check_docker: this host, for docker compose run --rm train-h100"
    assert [line.split()[:2] for line in lines[1:-1]] == [["pass", id_] for id_ in IDS]
    assert lines[-1] == "15 passed, 0 warnings, 0 failed, 0 skipped; next: docker compose run --rm validate"


def test_a_failure_is_3_with_what_to_type_under_it(shown: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = shown(replace(READY, image=None))
    assert code == 3
    assert out.splitlines()[-6:] == [
        "  FAIL  docker.image             no image mistral-7b-qlora:h100",
        "                                 -> docker compose build",
        "  skip  docker.source            needs docker.image",
        "  skip  docker.flash_attention   needs docker.image",
        "  pass  docker.disk              412.3 GiB free in /var/lib/docker, "
        "expected to be needed: 40 for the image, 13.5 for the base",
        f"12 passed, 0 warnings, 1 failed, 2 skipped; mend what is marked, then: {PYTHON} scripts/check_docker.py",
    ]


def test_json_is_one_document_of_the_shape_that_validate_has(shown: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = shown(replace(READY, buildx=None), "--json")
    document = json.loads(out)
    assert code == 0
    assert err.splitlines()[-1].startswith("14 passed, 1 warning, 0 failed, 0 skipped; next: ")
    assert list(document) == ["schema_version", "status", "checks", "environment"]
    assert (document["schema_version"], document["status"]) == (1, "warn")
    assert [row["id"] for row in document["checks"]] == IDS
    assert {tuple(row) for row in document["checks"]} == {("id", "status", "detail", "fix", "seconds")}
    assert document["environment"]["machine"]["driver"] == "550.90.07"
    versions = {"engine": "28.2.2", "api": "1.50", "compose": "2.36.2", "buildx": None}
    assert document["environment"]["versions"] == versions


def test_json_of_a_host_without_docker_fails_and_knows_no_versions(
    shown: Callable[..., tuple[int, str, str]],
) -> None:
    code, out, _ = shown(unreachable("absent", compose=None, buildx=None), "--json")
    document = json.loads(out)
    assert (code, document["status"]) == (3, "fail")
    assert set(document["environment"]["versions"].values()) == {None}


def test_a_check_that_crashes_is_one_finding_and_names_no_flag(shown: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = shown(replace(READY, compose="two"))
    assert code == 3
    assert "this check crashed: InvalidVersion: Invalid version: 'two'\n" in out
    assert "-> report it\n" in out


def test_wrong_usage_is_2() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--skip", "x"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == "check_docker.py: error: unrecognized arguments: --skip x"


def test_where_docker_is_not_it_ends_with_3_and_no_traceback(tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path), "DOCKER_HOST": f"unix://{tmp_path}/docker.sock"}
    command = [sys.executable, str(SCRIPT), "--json"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (3, False), done.stderr
    by_id = {row["id"]: row for row in json.loads(done.stdout)["checks"]}
    assert by_id["docker.engine"]["detail"] == "Docker is not installed"
    assert by_id["docker.compose"]["detail"] == "docker compose does not answer"


# A real engine --------------------------------------------------------------------------------------------------------


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


@pytest.mark.slow
@needs_engine
def test_the_whole_table_on_the_engine_of_this_machine(real: Path) -> None:
    host = read_docker_host(real)
    assert docker("ps", "--all", "--quiet", "--filter", f"ancestor={docker_image.REPOSITORY}:h100") == ""
    assert isinstance(host.engine, Engine)
    assert host.image is not None
    assert host.volume_disk is not None
    info = json.loads(docker("info", "--format", "{{json .}}"))
    server = json.loads(docker("version", "--format", "{{json .Server}}"))
    compose = docker("compose", "version", "--short").removeprefix("v").split("-")[0]
    buildx = docker("buildx", "version").split()[1].removeprefix("v").split("+")[0]
    uid, free_gib = os.getuid(), host.volume_disk.free_gib
    assert abs(shutil.disk_usage(info["DockerRootDir"]).free / 2**30 - free_gib) < 5  # others write, too
    wanted = {
        "engine": f"Docker {server['Version']} (API {server['ApiVersion']}) on {info['OperatingSystem']}",
        "compose": f"Compose {compose}",
        "buildx": f"Buildx {buildx}",
        "env": f"UID {uid}, GID {os.getgid()}, LOCK h100",
        "secrets": "no token is given",
        "binds": f"UID {uid} reads data, configs, models and writes adapters",
        "config": "Compose takes compose.yaml",
        "image": f"mistral-7b-qlora:h100, {host.image.size_gib:.1f} GiB, made from requirements/h100.lock",
        "source": "src and scripts in the image are those here",
        "flash_attention": "flash-attn is in the image",
        "disk": f"{free_gib:.1f} GiB free in {info['DockerRootDir']}, expected to be needed: 13.5 for the base",
    }
    results = found(host)
    assert [it.id for it in results] == IDS
    theirs = [it for it in results if it.id.removeprefix("docker.") in wanted]
    assert theirs == [Found(f"docker.{name}", "pass", detail, "") for name, detail in wanted.items()]
    if "nvidia" not in info["Runtimes"] and not host.engine.cdi_devices and not host.hook:
        text = 'the engine has no runtime nvidia and no CDI device: could not select device driver "nvidia"'
        assert fail("gpu", text, TOOLKIT) in results
    if host.machine.driver is None:
        text = "nvidia-smi is not there or does not answer: no NVIDIA driver that works"
        assert fail("driver", text, DRIVER) in results
        assert skip("device", "needs docker.driver") in results


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
    told = docker_host._config_problem(project)
    assert problem in told
    assert "secret" not in told


@pytest.mark.slow
@needs_engine
def test_real_compose_reads_an_env_file_as_we_do(project: Path) -> None:
    (project / ".env").write_text(ENV_LINES)
    names = ("UID", "GID", "HF_TOKEN_FILE", "A", "B", "C")
    lines = "".join(f'      {name}: "${{{name}}}"\n' for name in names)
    (project / "compose.yaml").write_text(f"services:\n  a:\n    image: x\n    environment:\n{lines}")
    document = json.loads(docker("compose", "config", "--format", "json", cwd=project))
    read = {name: value.replace("$$", "$") for name, value in document["services"]["a"]["environment"].items()}
    assert read == docker_host.parse_env((project / ".env").read_text())
