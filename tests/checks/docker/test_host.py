"""Checks of a Docker host and of the image on it: on recorded hosts, and on a real engine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from finetune.checks.docker.host import CHECKS, CONFIGURE, INSTALL, MEND_ENV, TOOLKIT
from finetune.machine.docker_host import DockerHost, Engine, Place, Service, read_docker_host
from support.docker_hosts import (
    BUILD,
    IDS,
    Found,
    disk,
    docker,
    engine,
    fail,
    folder,
    found,
    image,
    machine,
    needs_engine,
    service,
    skip,
    token,
    unreachable,
    warn,
)
from support.recorded import A100_80, H100, M4
from support.recorded_docker import FOLDERS, READY


def test_on_a_host_that_is_ready_every_check_passes_and_says_what_it_saw() -> None:
    details = {
        "docker.host": "Linux 5.15.0-119-generic on x86_64",
        "docker.driver": "driver 550.90.07",
        "docker.device": "NVIDIA H100 80GB HBM3",
        "docker.engine": "Docker 28.2.2 (API 1.50) on Ubuntu 22.04.5 LTS",
        "docker.compose": "Compose 2.36.2",
        "docker.buildx": "Buildx 0.24.0",
        "docker.gpu": "runtime nvidia, with its hook",
        "docker.config": "user 1000:1000, image mistral-7b-qlora:h100",
        "docker.secrets": "no token file is named",
        "docker.binds": "UID 1000 reads configs, data, models and writes adapters",
        "docker.image": "mistral-7b-qlora:h100, 14.2 GiB, made from requirements/h100.lock",
        "docker.source": "src and scripts in the image are those here",
        "docker.flash_attention": "flash-attn is in the image",
        "docker.disk": "412.3 GiB free in /var/lib/docker, expected to be needed: 13.5 for the base",
    }
    assert found(READY) == [Found(id_, "pass", detail, "") for id_, detail in details.items()]


NO_IMAGE = [skip(name, "needs docker.image") for name in ("source", "flash_attention")]
NO_ENGINE = [
    skip("gpu", "needs docker.engine"),
    skip("image", "needs docker.engine"),
    *NO_IMAGE,
    skip("disk", "needs docker.engine"),
]
NO_GPU = [skip("driver", "needs docker.host"), skip("device", "needs docker.driver")]
NO_CONFIG = [*(skip(name, "needs docker.config") for name in ("secrets", "binds", "image")), *NO_IMAGE]
NO_COMPOSE = [skip("config", "needs docker.compose"), *NO_CONFIG]
DRIVER = "sudo apt install nvidia-driver-570-server, then restart"
COMPOSE = "on Ubuntu: sudo apt-get install -y docker-compose-plugin, or docker-compose-v2 beside Ubuntu's own docker.io"
BUILDX = "on Ubuntu: sudo apt-get install -y docker-buildx-plugin, or docker-buildx beside Ubuntu's own docker.io"
NO_BUILDX = warn("buildx", "docker buildx does not answer; newer versions of Compose build by it", BUILDX)
A_MAC = fail(
    "host", "macOS 15.1 on arm64; a container on a Mac reaches no GPU", "./scripts/setup_m4.sh, which needs no Docker"
)
CHOWN = f"sudo chown -R 1000:1000 adapters; if 1000 is not you: {MEND_ENV}"
MODES = "there; in this engine a container's UID is another here, so modes decide nothing"
FREE = "docker system df shows what uses it; docker image prune; or another data-root in /etc/docker/daemon.json"
MADE = "mistral-7b-qlora:h100, 14.2 GiB"

NO_UID = (
    "error while interpolating services.plan.user: required variable UID is missing a value: .env does not say who you "
    "are. Type this, in the project's folder -- (cat .env.example) > .env"
)
FAULTS: dict[str, tuple[DockerHost, list[Found]]] = {
    "a Mac": (replace(unreachable("stopped"), machine=M4),
        [A_MAC, *NO_GPU, fail("engine", "Docker's engine does not run", "open -a Docker"),
        skip("gpu", "needs docker.host"), *NO_ENGINE[1:]]),
    "a Mac without Docker": (replace(unreachable("absent"), machine=M4, compose=None, buildx=None),
        [A_MAC, *NO_GPU, fail("engine", "Docker is not installed", "brew install --cask docker"),
        fail("compose", "docker compose does not answer", COMPOSE), NO_BUILDX, skip("gpu", "needs docker.host"),
        *NO_COMPOSE[:3], *NO_ENGINE[1:]]),
    "another system": (machine(system="FreeBSD", release="14.1"),
        [fail("host", "FreeBSD 14.1 on x86_64; train-h100 needs Linux", "rent a Linux machine with an H100"), *NO_GPU,
        skip("gpu", "needs docker.host")]),
    "another processor": (machine(architecture="aarch64"),
        [warn("host", "Linux 5.15.0-119-generic on aarch64; requirements/h100.lock was resolved for x86_64",
        "rent an x86_64 machine")]),
    "asked in a container": (machine(container=True),
        [warn("host", "Linux 5.15.0-119-generic on x86_64, in a container: folders and driver seen here are its own",
        "run this on the host")]),
    "no driver": (machine(driver=None, gpus=()),
        [fail("driver", "nvidia-smi is not there or does not answer: no NVIDIA driver that works", DRIVER),
        skip("device", "needs docker.driver")]),
    "an old driver": (machine(driver="470.256.02"),
        [fail("driver", "driver 470.256.02; CUDA 12 needs 525 or newer", DRIVER),
        skip("device", "needs docker.driver")]),
    "a driver without a GPU": (machine(gpus=()),
        [fail("device", "the driver shows no GPU",
        "unset CUDA_VISIBLE_DEVICES; if that is not it, sudo dmesg | grep -i nvrm")]),
    "another GPU": (machine(gpus=A100_80.gpus),
        [warn("device", "NVIDIA A100-SXM4-80GB, an NVIDIA GPU, but no H100: hours and memory differ",
        "nvidia-smi --query-gpu=compute_cap --format=csv says whether it is 9.0, which flash-attn is built for; "
        "if not: docker compose build --build-arg FLASH_ATTN_CUDA_ARCHS=80, for 8.0")]),
    "no Docker": (unreachable("absent"),
        [fail("engine", "Docker is not installed", f"on Ubuntu: {INSTALL}"), *NO_ENGINE]),
    "an engine that was not started": (unreachable("stopped"),
        [fail("engine", "Docker's engine does not run", "sudo systemctl start docker"), *NO_ENGINE]),
    "a user outside of the group": (unreachable("denied"),
        [fail("engine", "permission denied: your user may not use the Docker engine",
        "sudo usermod -aG docker $USER, then log in again (newgrp docker)"), *NO_ENGINE]),
    "an engine that hangs": (unreachable("other"),
        [fail("engine", "Docker's engine does not answer: Read timed out",
        "docker info; docker context ls; echo $DOCKER_HOST"), *NO_ENGINE]),
    "an engine elsewhere": (engine(address="http://gpu-7:2375"),
        [fail("engine", "Docker 28.2.2 (API 1.50) on Ubuntu 22.04.5 LTS at http://gpu-7:2375, another machine, "
        "which does not see these folders", "unset DOCKER_HOST; docker context use default; or run this there"),
        *NO_ENGINE]),
    "an old engine": (engine(version="19.03.15", api="1.40"),
        [fail("engine", "Docker 19.03.15 (API 1.40) on Ubuntu 22.04.5 LTS, wanted 20.10 or newer",
        f"on Ubuntu: {INSTALL}"), *NO_ENGINE]),
    "a rootless engine": (engine(rootless=True),
        [warn("engine", "Docker 28.2.2 (API 1.50) on Ubuntu 22.04.5 LTS, rootless, which was not tried: "
        "a GPU there needs no-cgroups, and memlock may not be raised",
        "sudo nvidia-ctk config --set nvidia-container-cli.no-cgroups --in-place; "
        "take the ulimits out of compose.yaml; (echo; echo UID=0; echo GID=0) >> .env, which is you there"),
        skip("binds", MODES)]),
    "no Compose": (replace(READY, compose=None),
        [fail("compose", "docker compose does not answer", COMPOSE), *NO_COMPOSE]),
    "an old Compose": (replace(READY, compose="2.17.3"),
        [fail("compose", "Compose 2.17.3, wanted 2.20 or newer", COMPOSE), *NO_COMPOSE]),
    "no Buildx": (replace(READY, buildx=None), [NO_BUILDX]),
    "no NVIDIA toolkit": (replace(engine(runtimes=("runc",)), hook=False),
        [fail("gpu", 'the engine has no runtime nvidia and no CDI device: could not select device driver "nvidia"',
        TOOLKIT)]),
    "a toolkit that the engine does not know": (engine(runtimes=("runc",)),
        [fail("gpu",
        "the toolkit is installed, but the engine has no runtime nvidia: not configured, or not restarted",
        CONFIGURE)]),
    "a runtime whose toolkit is gone": (replace(READY, hook=False),
        [warn("gpu",
        "runtime nvidia, but no nvidia-container-runtime-hook on this PATH, by which the engine starts a GPU",
        TOOLKIT)]),
    "CDI only": (replace(engine(runtimes=("runc",), cdi_devices=("nvidia.com/gpu=0", "nvidia.com/gpu=all")),
        hook=False),
        [warn("gpu", "no runtime nvidia, but CDI devices: nvidia.com/gpu=0, nvidia.com/gpu=all; whether this engine "
        "starts a GPU by them was not tried", TOOLKIT)]),
    "CDI devices of another maker": (replace(engine(runtimes=("runc",), cdi_devices=("amd.com/gpu=0",)), hook=False),
        [fail("gpu", 'the engine has no runtime nvidia and no CDI device: could not select device driver "nvidia"',
        TOOLKIT)]),
    "Ubuntu's snap": (replace(engine(runtimes=("runc",), folders=("/var/snap/docker/common/var-lib-docker",)),
        hook=False),
        [fail("gpu", "the engine is Ubuntu's snap, which nvidia-ctk does not configure, and has no runtime nvidia",
        f"sudo snap remove docker (its images and volumes go), then {INSTALL}, then {TOOLKIT}")]),
    "Docker Desktop": (engine(runtimes=("runc",), system="Docker Desktop"),
        [fail("gpu", "Docker Desktop's engine runs in a virtual machine and has no runtime nvidia",
        f"docker context use default, where an engine is installed; else {INSTALL}, then {TOOLKIT}")]),
    "no .env": (replace(READY, service=NO_UID),
        [fail("config", f"Compose refuses compose.yaml or .env: {NO_UID.partition('. Type')[0]}", MEND_ENV),
        *NO_CONFIG]),
    "a compose.yaml that Compose refuses": (replace(READY,
        service="services.plan Additional property netwrk_mode is not allowed"),
        [fail("config",
        "Compose refuses compose.yaml or .env: services.plan Additional property netwrk_mode is not allowed",
        "docker compose config --quiet"), *NO_CONFIG]),
    "a .env without numbers": (service(user="$(id -u):1000"),
        [fail("config", "UID:GID is '$(id -u):1000' in .env, wanted numbers", MEND_ENV), *NO_CONFIG]),
    "a token file that is not there": (token(None),
        [fail("secrets", "HF_TOKEN_FILE in .env: no such file",
        "hf auth login makes ~/.cache/huggingface/token; correct .env")]),
    "a folder in a token file's place": (token(0o040700),
        [fail("secrets", "HF_TOKEN_FILE in .env: no such file",
        "hf auth login makes ~/.cache/huggingface/token; correct .env")]),
    "a token file of root's": (token(0o100600, uid=0),
        [fail("secrets", "UID 1000 cannot read /home/trainer/token (-rw------- 0:0)",
        "sudo chown 1000 /home/trainer/token && chmod 600 /home/trainer/token")]),
    "folders that are not there": (service(folders=(*FOLDERS[:2], Place("models"), Place("adapters"))),
        [fail("binds", "not there: models, adapters", "mkdir -p models adapters")]),
    "a file in a folder's place": (folder("models", 0o100644),
        [fail("binds", "not a folder: models", "rm models && mkdir models, if it may go")]),
    "adapters of root's": (folder("adapters", 0o040755, 0, 0),
        [fail("binds", "UID 1000, GID 1000 cannot write adapters (drwxr-xr-x 0:0)",
        CHOWN)]),
    "a run of another group's": (folder("adapters/mistral-7b-qlora-h100", 0o040755, 1001, 1000),
        [fail("binds", "UID 1000, GID 1000 cannot write adapters/mistral-7b-qlora-h100 (drwxr-xr-x 1001:1000)",
        CHOWN)]),
    "root without capabilities": (service(user="0:0"),
        [fail("binds", "UID 0, GID 0 cannot write adapters (drwxr-xr-x 1000:1000), adapters/mistral-7b-qlora-h100 "
        "(drwxr-xr-x 1000:1000)", CHOWN.replace("1000", "0"))]),
    "closed data": (folder("data", 0o040700, 0, 0),
        [fail("binds", "UID 1000, GID 1000 cannot read data (drwx------ 0:0)", "chmod -R a+rX data")]),
    "remapped users": (engine(remapped=True),
        [skip("binds", MODES)]),
    "no image": (replace(READY, image=None), [fail("image", "no image mistral-7b-qlora:h100", BUILD), *NO_IMAGE]),
    "the demo's image": (service(lock="cpu"),
        [fail("image", "LOCK is cpu: an image without CUDA, which train-h100 needs",
        "echo LOCK=h100 >> .env && docker compose build"), *NO_IMAGE]),
    "a lock that there is not": (service(lock="h10"),
        [fail("image", "LOCK is h10: wanted h100", "echo LOCK=h100 >> .env && docker compose build"), *NO_IMAGE]),
    "an image from another lock": (image(lock="cpu"),
        [fail("image", f"{MADE}, says that it was made from cpu lock", BUILD), *NO_IMAGE]),
    "an image of somebody else's": (image(lock=""),
        [fail("image", f"{MADE}, says that it was made from no lock", BUILD), *NO_IMAGE]),
    "an image from an older lock": (image(changed=("requirements/h100.lock", "src/train.py")),
        [fail("image", f"{MADE}, was made from another requirements/h100.lock than the one here", BUILD), *NO_IMAGE]),
    "an image that cannot be opened": (image(problem="no space left on device"),
        [fail("image", f"{MADE}, cannot be looked into: no space left on device", BUILD), *NO_IMAGE]),
    "an image of an older program": (image(changed=("src/train.py", *(f"scripts/{name}.py" for name in "abcd"))),
        [warn("source", "other in the image than here: src/train.py, scripts/a.py, scripts/b.py and 2 more", BUILD)]),
    "an image without flash-attn": (image(flash_attn="skip"),
        [warn("flash_attention", "the image has no flash-attn", "echo FLASH_ATTN=build >> .env && docker compose "
        "build; or do without: docker compose run --rm train-h100 --set model.attn_implementation=torch_varlen")]),
    "a disk too small to build": (disk(30.0, image=None),
        [fail("image", "no image mistral-7b-qlora:h100", BUILD), *NO_IMAGE,
        warn("disk", "30.0 GiB free in /var/lib/docker, expected to be needed: 40 for the image, 13.5 for the base",
        FREE)]),
    "a disk that may be too small for the base": (disk(3.0),
        [warn("disk",
        "3.0 GiB free in /var/lib/docker, expected to be needed: 13.5 for the base, unless the cache volume has it",
        FREE)]),
    "a disk in a virtual machine": (replace(READY, disk=None),
        [skip("disk", "the disk of the engine's data cannot be seen from here")]),
}  # fmt: skip


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
        ("docker.binds", folder("adapters", 0o040770, 0, 1000), ""),
        ("docker.binds", folder("adapters", 0o040777, 0, 0), ""),
        ("docker.secrets", token(0o100600), "tokens from /home/trainer/token"),
        ("docker.secrets", replace(token(0o100600, uid=0), engine=engine(remapped=True).engine), ""),
        ("docker.disk", disk(53.5, image=None), ""),
        ("docker.driver", machine(driver="525.60.13"), "driver 525.60.13"),
        ("docker.engine", engine(version="20.10.24+dfsg1"), ""),
        ("docker.device", machine(gpus=H100.gpus * 8), "NVIDIA H100 80GB HBM3 (the first of 8)"),
    ],
)  # fmt: skip
def test_what_is_just_good_enough_passes(name: str, host: DockerHost, detail: str) -> None:
    [it] = [it for it in found(host) if it.id == name]
    assert it.status == "pass", it
    assert not detail or it.detail == detail


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
    for command in (TOOLKIT, INSTALL, CONFIGURE, MEND_ENV):
        assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0


def test_what_mends_env_keeps_its_lines_and_sets_numbers_last(tmp_path: Path) -> None:
    env = tmp_path / ".env"
    env.write_text("UID=$(id -u)\nHF_TOKEN_FILE=token", encoding="utf-8")  # as many editors leave it, without an end
    subprocess.run(["bash", "-c", MEND_ENV], cwd=tmp_path, check=True)
    lines = env.read_text(encoding="utf-8").split("\n")
    assert lines == ["UID=$(id -u)", "HF_TOKEN_FILE=token", f"UID={os.getuid()}", f"GID={os.getgid()}", ""]


@pytest.mark.slow
@needs_engine
def test_the_whole_table_on_the_engine_of_this_machine(real: Path) -> None:
    host = read_docker_host(real)
    assert isinstance(host.service, Service)
    assert docker("ps", "--all", "--quiet", "--filter", f"ancestor={host.service.image}") == ""
    assert isinstance(host.engine, Engine)
    assert host.image is not None
    assert host.disk is not None
    info = json.loads(docker("info", "--format", "{{json .}}"))
    server = json.loads(docker("version", "--format", "{{json .Server}}"))
    compose = docker("compose", "version", "--short").removeprefix("v").split("-")[0]
    buildx = docker("buildx", "version").split()[1].removeprefix("v").split("+")[0]
    uid, free_gib = os.getuid(), host.disk.free_gib
    assert abs(shutil.disk_usage(info["DockerRootDir"]).free / 2**30 - free_gib) < 5  # others write, too
    wanted = {
        "engine": f"Docker {server['Version']} (API {server['ApiVersion']}) on {info['OperatingSystem']}",
        "compose": f"Compose {compose}",
        "buildx": f"Buildx {buildx}",
        "config": f"user {uid}:{os.getgid()}, image {host.service.image}",
        "secrets": "no token file is named",
        "binds": f"UID {uid} reads configs, data, models and writes adapters",
        "image": f"{host.service.image}, {host.image.size_gib:.1f} GiB, made from requirements/h100.lock",
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
