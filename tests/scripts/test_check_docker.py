"""The checks of a Docker host: on recorded hosts, a real engine, and a bare Python 3.10."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import docker.errors
import pytest

from finetune.checks import host as host_checks
from finetune.checks import paths
from finetune.config.load import ROOT
from support.as_nobody import as_nobody
from support.docker_hosts import (
    CDI,
    ENGINE,
    FOLDERS,
    MAC,
    READY,
    Found,
    Host,
    Place,
    check_docker,
    engine,
    folder,
    found,
    host,
    image,
    machine,
    needs_engine,
    service,
    silent,
    token,
)
from support.docker_hosts import docker as run_docker

CONFIGURE, INSTALL, TOOLKIT = check_docker.CONFIGURE, check_docker.INSTALL, check_docker.TOOLKIT
IDS_HERE, BUILD, DRIVER = check_docker.IDS, check_docker.BUILD, check_docker.DRIVER
IDS = list(check_docker.CHECKS)
SCRIPT = ROOT / "scripts" / "check_docker.py"


# Checks on recorded hosts ---------------------------------------------------------------------------------------------


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
        "docker.image": "mistral-7b-qlora:h100, 14.2 GiB, with the libraries of requirements/h100.lock",
        "docker.flash_attention": "flash-attn is in the image",
        "docker.disk": "412.3 GiB free in /var/lib/docker, expected need: 13.5 for the base",
    }
    assert found(READY) == [Found(id_, "pass", detail) for id_, detail in details.items()]


def warn(name: str, detail: str, fix: str) -> Found:
    return Found(f"docker.{name}", "warn", detail, fix)


def fail(name: str, detail: str, fix: str) -> Found:
    return Found(f"docker.{name}", "fail", detail, fix)


def skip(name: str, detail: str) -> Found:
    return Found(f"docker.{name}", "skip", detail)


NO_IMAGE = [skip("flash_attention", "needs docker.image")]
NO_ENGINE = [
    *(skip(name, "needs docker.engine") for name in ("gpu", "image")), *NO_IMAGE, skip("disk", "needs docker.engine"),
]  # fmt: skip
NO_GPU = [skip("driver", "needs docker.host"), skip("device", "needs docker.driver")]
NO_CONFIG = [*(skip(name, "needs docker.config") for name in ("secrets", "binds", "image")), *NO_IMAGE]
NO_COMPOSE = [skip("config", "needs docker.compose"), *NO_CONFIG]
COMPOSE = "on Ubuntu: sudo apt-get install -y docker-compose-plugin (with Ubuntu's docker.io: docker-compose-v2)"
BUILDX = "on Ubuntu: sudo apt-get install -y docker-buildx-plugin (with Ubuntu's docker.io: docker-buildx)"
ABSENT = fail("compose", "docker compose is missing or does not answer", COMPOSE)
NO_BUILDX = warn(
    "buildx", "docker buildx is missing or does not answer; newer versions of Compose need it to build", BUILDX
)
A_MAC = fail(
    "host", "macOS 15.1 on arm64; containers on a Mac have no GPU", "./scripts/setup_m4.sh, which needs no Docker"
)
NO_WAY = 'the engine has no runtime nvidia and no CDI device: could not select device driver "nvidia"'
MODES = "the folders exist; this engine maps users to other ids, so modes prove nothing"
FREE = "docker system df shows what uses it; docker image prune; or another data-root in /etc/docker/daemon.json"
MADE = "mistral-7b-qlora:h100, 14.2 GiB"
RUNC = {"runc": {"path": "runc"}}
RUN = "adapters/mistral-7b-qlora-h100"
FAULTS: dict[str, tuple[Host, list[Found]]] = {
    "a Mac": (silent("stopped", machine=MAC),
        [A_MAC, *NO_GPU, fail("engine", "the Docker engine is not running", "open -a Docker"),
        skip("gpu", "needs docker.host"), *NO_ENGINE[1:]]),
    "a Mac without Docker": (silent("absent", machine=MAC, compose=None, buildx=None),
        [A_MAC, *NO_GPU, fail("engine", "Docker is not installed", "brew install --cask docker"),
        ABSENT, NO_BUILDX, skip("gpu", "needs docker.host"),
        *NO_COMPOSE[:3], *NO_ENGINE[1:]]),
    "another system": (machine(system="FreeBSD", release="14.1"),
        [fail("host", "FreeBSD 14.1 on x86_64; train-h100 needs Linux", "rent a Linux machine with an H100"), *NO_GPU,
        skip("gpu", "needs docker.host")]),
    "another processor": (machine(architecture="aarch64"),
        [warn("host", "Linux 5.15.0-119-generic on aarch64; requirements/h100.lock was resolved for x86_64",
        "rent an x86_64 machine")]),
    "asked in a container": (machine(container=True),
        [warn("host", "Linux 5.15.0-119-generic on x86_64, in a container, which has its own folders and driver",
        "run this on the host")]),
    "no driver": (machine(driver=None, gpus=[]),
        [fail("driver", "nvidia-smi is missing or does not answer: no working NVIDIA driver", DRIVER),
        skip("device", "needs docker.driver")]),
    "an old driver": (machine(driver="470.256.02"),
        [fail("driver", "driver 470.256.02; CUDA 12 needs 525 or newer", DRIVER),
        skip("device", "needs docker.driver")]),
    "another GPU": (machine(gpus=["NVIDIA A100-SXM4-80GB"]),
        [warn("device", "NVIDIA A100-SXM4-80GB is not an H100: hours and memory differ",
        "nvidia-smi --query-gpu=compute_cap --format=csv; flash-attn is built for 9.0, "
        "for 8.0 with: docker compose build --build-arg FLASH_ATTN_CUDA_ARCHS=80")]),
    "no Docker": (silent("absent"),
        [fail("engine", "Docker is not installed", f"on Ubuntu: {INSTALL}"), *NO_ENGINE]),
    "an engine that was not started": (silent("stopped"),
        [fail("engine", "the Docker engine is not running", "sudo systemctl start docker"), *NO_ENGINE]),
    "a user outside of the group": (silent("denied"),
        [fail("engine", "permission denied: your user may not use the Docker engine",
        "sudo usermod -aG docker $USER, then log in again (newgrp docker)"), *NO_ENGINE]),
    "an engine that hangs": (silent("Read timed out"),
        [fail("engine", "the Docker engine does not answer: Read timed out",
        "docker info; docker context ls; echo $DOCKER_HOST"), *NO_ENGINE]),
    "an engine elsewhere": (engine({"Address": "http://gpu-7:2375"}),
        [fail("engine", "Docker 28.2.2 (API 1.50) on Ubuntu 22.04.5 LTS at http://gpu-7:2375, another machine, "
        "which cannot mount these folders",
        "unset DOCKER_HOST; docker context use default; or run this on that machine"), *NO_ENGINE]),
    "an old engine": (engine({"ServerVersion": "19.03.15", "Api": "1.40"}),
        [fail("engine", "Docker 19.03.15 (API 1.40) on Ubuntu 22.04.5 LTS, expected 20.10 or newer",
        f"on Ubuntu: {INSTALL}"), *NO_ENGINE]),
    "a rootless engine": (engine({"SecurityOptions": ["name=seccomp,profile=builtin", "name=rootless"]}),
        [warn("engine", "Docker 28.2.2 (API 1.50) on Ubuntu 22.04.5 LTS, rootless, which is untested: "
        "a GPU needs no-cgroups there, and raising memlock may be denied",
        "sudo nvidia-ctk config --set nvidia-container-cli.no-cgroups --in-place; remove the ulimits from "
        "compose.yaml"), skip("binds", MODES)]),
    "no Compose": (host(compose=None), [ABSENT, *NO_COMPOSE]),
    "an old Compose": (host(compose="2.17.3"),
        [fail("compose", "Compose 2.17.3, expected 2.20 or newer", COMPOSE), *NO_COMPOSE]),
    "no Buildx": (host(buildx=None), [NO_BUILDX]),
    "no NVIDIA toolkit": (engine({"Runtimes": RUNC}, hook=False), [fail("gpu", NO_WAY, TOOLKIT)]),
    "an engine that names no runtime": (engine({"Runtimes": None}, hook=False), [fail("gpu", NO_WAY, TOOLKIT)]),
    "a toolkit that the engine does not know": (engine({"Runtimes": RUNC}),
        [fail("gpu",
        "the toolkit is installed, but the engine has no runtime nvidia: not configured, or not restarted",
        CONFIGURE)]),
    "a runtime whose toolkit is gone": (host(hook=False),
        [warn("gpu",
        "runtime nvidia, but nvidia-container-runtime-hook, which the engine needs, is not on this PATH",
        TOOLKIT)]),
    "CDI only": (engine({"Runtimes": RUNC, "DiscoveredDevices": CDI}, hook=False),
        [warn("gpu", "no runtime nvidia, but CDI devices: nvidia.com/gpu=0, nvidia.com/gpu=all; this engine is "
        "untested with them", TOOLKIT)]),
    "Ubuntu's snap": (engine({"Runtimes": RUNC, "DockerRootDir": "/var/snap/docker/common/var-lib-docker"}),
        [fail("gpu", "the engine is Ubuntu's snap, which has no runtime nvidia and which nvidia-ctk cannot configure",
        f"sudo snap remove docker (deletes its images and volumes), then {INSTALL}, then {TOOLKIT}")]),
    "a compose.yaml that Compose refuses": (host(
        project="services.plan Additional property netwrk_mode is not allowed"),
        [fail("config",
        "Compose rejects compose.yaml or .env: services.plan Additional property netwrk_mode is not allowed",
        "docker compose config --quiet"), *NO_CONFIG]),
    "a .env without numbers": (service("$(id -u):1000"),
        [fail("config", "UID:GID is '$(id -u):1000' in .env, expected numbers", IDS_HERE), *NO_CONFIG]),
    "a token file that is not there": (token(0),
        [fail("secrets", "HF_TOKEN_FILE in .env: no such file",
        "hf auth login creates ~/.cache/huggingface/token; correct .env")]),
    "a token file of root's": (token(0o100600, uid=0),
        [fail("secrets", "UID 1000 cannot read /home/trainer/token (-rw------- 0:0)",
        "sudo chown 1000 /home/trainer/token && chmod 600 /home/trainer/token")]),
    "folders that are not there": (host(folders=(*FOLDERS[:2], Place("models"), Place("adapters", True))),
        [fail("binds", "no such folder: models, adapters", "mkdir -p models adapters")]),
    "adapters of root's, and a UID": (folder("adapters", 0o040755, 0, 0),
        [fail("binds", "UID 1000, GID 1000 cannot write adapters (drwxr-xr-x 0:0)",
        f"sudo chown -R 1000:1000 adapters; if your UID is not 1000: {IDS_HERE}")]),
    "a run of another user's": (folder(RUN, 0o040755, 0, 0, user="0:0"),
        [fail("binds", f"UID 1000, GID 1000 cannot write {RUN} (drwxr-xr-x 0:0)",
        f"sudo chown -R 1000:1000 {RUN}; if your UID is not 1000: {IDS_HERE}")]),
    "closed data": (folder("data", 0o040700, 0, 0),
        [fail("binds", "UID 1000, GID 1000 cannot read data (drwx------ 0:0)", "chmod -R a+rX data")]),
    "data that root may not read without capabilities": (folder("adapters", 0o040755, 0, 0, user="0:0")._replace(
        folders=(Place("data", False, 0o040700, 1000, 1000), Place("adapters", True, 0o040755))),
        [fail("binds", "UID 0, GID 0 cannot read data (drwx------ 1000:1000)", "chmod -R a+rX data")]),
    "remapped users": (engine({"SecurityOptions": ["name=userns"]}), [skip("binds", MODES)]),
    "no image": (host(image=None), [fail("image", "no image mistral-7b-qlora:h100", BUILD), *NO_IMAGE]),
    "the demo's image": (service(lock="cpu"),
        [fail("image", "LOCK is cpu, but train-h100 needs h100", "echo LOCK=h100 >> .env && docker compose build"),
        *NO_IMAGE]),
    "somebody else's image": (image(lock=""),
        [fail("image", f"{MADE}, was built with lock none, expected h100", BUILD), *NO_IMAGE]),
    "an image of another lock": (image(lock="cpu"),
        [fail("image", f"{MADE}, was built with lock cpu, expected h100", BUILD), *NO_IMAGE]),
    "an image without flash-attn": (image(flash_attn="skip"),
        [warn("flash_attention", "the image has no flash-attn",
        f"echo FLASH_ATTN=build >> .env && {BUILD}; or train without it: "
        "docker compose run --rm train-h100 --set model.attn_implementation=torch_varlen")]),
    "a disk too small to build": (host(image=None, disk=("/var/lib/docker", 30.0)),
        [fail("image", "no image mistral-7b-qlora:h100", BUILD), *NO_IMAGE,
        warn("disk", "30.0 GiB free in /var/lib/docker, expected need: 40 for the image, 13.5 for the base",
        FREE)]),
    "a disk that may be too small for the base": (host(disk=("/var/lib/docker", 3.0)),
        [warn("disk",
        "3.0 GiB free in /var/lib/docker, expected need: 13.5 for the base, unless the cache volume has it",
        FREE)]),
    "a disk in a virtual machine": (host(disk=None),
        [skip("disk", "the engine's data folder is not visible from here")]),
    "a version that is none": (host(compose=2),
        [fail("compose", "this check crashed: TypeError: expected string or bytes-like object, got 'int'",
        "report it"), *NO_COMPOSE]),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_with_what_to_type_and_all_else_passes(name: str) -> None:
    recorded, wanted = FAULTS[name]
    assert [it for it in found(recorded) if it.status != "pass"] == wanted


def test_every_check_has_a_fault() -> None:
    assert {it.id for _, wanted in FAULTS.values() for it in wanted if it.status in ("warn", "fail")} == {*IDS}


@pytest.mark.parametrize(
    ("name", "recorded", "detail"),
    [
        ("docker.config", service("0:0"), "user 1000:1000, image mistral-7b-qlora:h100"),
        ("docker.config", service("0:0", folders=()), "user 0:0, image mistral-7b-qlora:h100"),
        ("docker.binds", folder("adapters", 0o040700, 4711, 4711, user="0:0")._replace(folders=(
            Place("data", False, 0o040755), Place("adapters", True, 0o040700, 4711, 4711))),
            "UID 4711 reads data and writes adapters"),
        ("docker.binds", folder("adapters", 0o040770, 0, 1000), ""),
        ("docker.binds", folder("adapters", 0o040777, 0, 0), ""),
        ("docker.secrets", token(0o100600), "tokens from /home/trainer/token"),
        ("docker.secrets", token(0o100600, uid=0)._replace(engine=ENGINE | {"SecurityOptions": ["name=userns"]}), ""),
        ("docker.disk", host(image=None, disk=("/var/lib/docker", 53.5)), ""),
        ("docker.driver", machine(driver="525.60.13"), "driver 525.60.13"),
        ("docker.engine", engine({"ServerVersion": "20.10.24+dfsg1"}), ""),
        ("docker.compose", host(compose="5.1.0"), ""),
        ("docker.device", machine(gpus=READY.machine["gpus"] * 8), "NVIDIA H100 80GB HBM3 (the first of 8)"),
    ],
)  # fmt: skip
def test_what_is_just_good_enough_passes(name: str, recorded: Host, detail: str) -> None:
    [it] = [it for it in found(recorded) if it.id == name]
    assert it.status == "pass", it
    assert not detail or it.detail == detail


def test_commands_to_type_are_what_a_shell_takes() -> None:
    for command in (TOOLKIT, INSTALL, CONFIGURE, IDS_HERE):
        assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0


def test_ids_are_added_to_env_below_the_lines_it_has(tmp_path: Path) -> None:
    env = tmp_path / ".env"
    env.write_text("UID=$(id -u)\nHF_TOKEN_FILE=token", encoding="utf-8")  # as many editors leave it, without an end
    subprocess.run(["bash", "-c", IDS_HERE], cwd=tmp_path, check=True)
    lines = env.read_text(encoding="utf-8").split("\n")
    assert lines == ["UID=$(id -u)", "HF_TOKEN_FILE=token", f"UID={os.getuid()}", f"GID={os.getgid()}", ""]


def test_what_the_package_knows_too_is_the_same_here() -> None:
    assert (check_docker.OLDEST_DRIVER, DRIVER) == (host_checks.OLDEST_DRIVER, host_checks.DRIVER)
    assert check_docker.BASE_GIB == paths.BASE_GIB


# What is read of a host -----------------------------------------------------------------------------------------------


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Sockets have short paths, and another user must be able to reach the socket."""
    with tempfile.TemporaryDirectory(prefix="check-docker-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def command(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a command with this text on the PATH, where nothing else of Docker is."""

    def put(name: str, script: str) -> None:
        folder = short_folder / "bin"
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")

    return put


def test_the_driver_and_all_gpus_are_what_nvidia_smi_prints(command: Callable[[str, str], None]) -> None:
    command("nvidia-smi", "echo '550.90.07, NVIDIA H100 80GB HBM3'; echo '550.90.07, NVIDIA H100, NVL'")
    read = check_docker.read_machine()
    assert (read["driver"], read["gpus"]) == ("550.90.07", ["NVIDIA H100 80GB HBM3", "NVIDIA H100, NVL"])
    command("nvidia-smi", "echo 'Failed to initialize NVML: Driver/library version mismatch'")
    assert check_docker.read_machine()["driver"] is None


@pytest.mark.parametrize(
    ("script", "version"),
    [
        ("echo 2.26.1-4", "2.26.1"),
        ("echo Docker Compose version v5.1.0", "5.1.0"),
        ("echo 2.26.1; exit 125", None),
        ("echo dev", None),
        ("exec sleep 5", None),
    ],
)
def test_a_version_is_the_first_number_with_a_dot(
    script: str, version: str | None, command: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    command("docker", script)
    monkeypatch.setattr(check_docker, "ANSWER_SECONDS", 2)
    assert check_docker.version("docker", "compose", "version", "--short") == version


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("echo warning >&2; echo; echo services.plan must be a mapping >&2; exit 15",
            "services.plan must be a mapping"),
        ("echo 'failed to read /p/.env: line 4: \"hf_secret\nother' >&2; exit 1", ".env cannot be read, line 4"),
        ("echo 'unexpected character near \"hf_secret' >&2; exit 1", ".env cannot be read"),
        ("exit 1", "no reason given"),
    ],
)  # fmt: skip
def test_what_compose_says_of_env_never_shows_its_lines(
    script: str, problem: str, command: Callable[[str, str], None], tmp_path: Path
) -> None:
    command("docker", script)
    assert check_docker.read_project(tmp_path) == problem


def test_the_disk_is_the_fullest_of_those_with_the_engines_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {"/var/lib/docker": 2 * 2**30, "/var/lib/containerd": 2**30}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, free[folder]))
    containerd = ENGINE | {"DriverStatus": [["driver-type", "io.containerd.snapshotter.v1"]]}
    assert check_docker.fullest(ENGINE) == ("/var/lib/docker", 2.0)
    assert check_docker.fullest(containerd) == ("/var/lib/containerd", 1.0)
    assert check_docker.fullest(ENGINE | {"Address": "http://gpu-7:2375"}) is None
    monkeypatch.undo()
    assert check_docker.fullest(ENGINE | {"DockerRootDir": str(tmp_path / "of-a-virtual-machine")}) is None


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("unix:///nowhere/docker.sock", "stopped"), ("unix://{folder}/dead.sock", "stopped"),
        ("unix://{folder}/closed.sock", "denied"), ("tcp://127.0.0.1:1", "stopped"),
        ("nonsense", "Invalid bind address format: port is required: nonsense"),
    ],
)  # fmt: skip
def test_why_no_engine_answers_is_told_apart(
    address: str, why: str, short_folder: Path, command: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    command("docker", "exit 1")
    for name in ("dead", "closed"):
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(short_folder / f"{name}.sock"))
    (short_folder / "dead.sock").chmod(0o777)
    (short_folder / "closed.sock").chmod(0)
    monkeypatch.setenv("DOCKER_HOST", address.format(folder=short_folder))
    with as_nobody():
        assert check_docker.ask_engine(silent("", project="none")) == {"engine": why}
    assert check_docker.silence(docker.errors.APIError("500 Server Error", explanation="full")) == (
        '500 Server Error ("full")'
    )


# A real engine --------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project with compose.yaml, none of whose variables the shell sets, and an image of the program alone."""
    for name in ("UID", "GID", "LOCK", "HF_TOKEN_FILE", "WANDB_API_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("data", "configs", "models", "adapters/run", "requirements", "src/__pycache__", "scripts"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("requirements/h100.lock", "src/train.py", "scripts/b.sh"):
        (tmp_path / name).write_text(name)
    # Another name, so that the real image stays untouched.
    tag = f"check-docker-test-{os.getpid()}:h100"
    compose = (ROOT / "compose.yaml").read_text(encoding="utf-8")
    (tmp_path / "compose.yaml").write_text(re.sub(r"image: \$\{IMAGE.*", f"image: {tag}", compose))
    (tmp_path / "Dockerfile").write_text(
        "FROM scratch\nLABEL lock=h100 flash-attn=build\nVOLUME /cache\n"
        "COPY requirements /app/requirements\nCOPY src /app/src\nCOPY scripts /app/scripts\n"
    )
    run_docker("build", "--quiet", "--tag", tag, str(tmp_path))
    (tmp_path / "src/__pycache__/train.pyc").write_text("compiled since")
    yield tmp_path
    run_docker("image", "rm", "--force", tag)


@pytest.mark.slow
@needs_engine
def test_the_whole_table_on_the_engine_of_this_machine(project: Path) -> None:
    read, uid = check_docker.read_host(project), os.getuid()  # without .env, so as the owner of adapters
    tag = read.service["image"]
    assert run_docker("ps", "--all", "--quiet", "--filter", f"ancestor={tag}") == ""  # none is left
    info = json.loads(run_docker("info", "--format", "{{json .}}"))
    server = json.loads(run_docker("version", "--format", "{{json .Server}}"))
    compose = run_docker("compose", "version", "--short").removeprefix("v").split("-")[0]
    buildx = run_docker("buildx", "version").split()[1].removeprefix("v").split("+")[0]
    free_gib, mounted = read.disk[1], ", ".join(it.name for it in read.folders if not it.writable)
    assert abs(shutil.disk_usage(info["DockerRootDir"]).free / 2**30 - free_gib) < 5  # others write, too
    wanted = {
        "engine": f"Docker {server['Version']} (API {server['ApiVersion']}) on {info['OperatingSystem']}",
        "compose": f"Compose {compose}",
        "buildx": f"Buildx {buildx}",
        "config": f"user {uid}:{os.getgid()}, image {tag}",
        "secrets": "no token file is named",
        "binds": f"UID {uid} reads {mounted} and writes adapters",
        "image": f"{tag}, {read.image.gib:.1f} GiB, with the libraries of requirements/h100.lock",
        "flash_attention": "flash-attn is in the image",
        "disk": f"{free_gib:.1f} GiB free in {info['DockerRootDir']}, expected need: 13.5 for the base",
    }
    made = {it.id.removeprefix("docker."): it for it in found(read)}
    assert {name: made[name][1:] for name in wanted} == {name: ("pass", it, "") for name, it in wanted.items()}
    if "nvidia" not in info["Runtimes"] and not info.get("DiscoveredDevices") and not read.hook:
        assert made["gpu"] == fail("gpu", NO_WAY, TOOLKIT)
    with check_docker.closing(docker.from_env()) as client:
        assert check_docker.read_image(client, "no-such-image:h100") is None


@pytest.mark.slow
@needs_engine
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("LOCK=h100\nHF_TOKEN='hf_secret\n", ".env cannot be read, line 3"),
        ("LOCK=h100\nmy token: hf_secret\n", ".env cannot be read, line 2"),
    ],
)
def test_what_real_compose_has_against_an_env_file_is_told_without_its_tokens(
    text: str, problem: str, tmp_path: Path
) -> None:
    shutil.copy(ROOT / "compose.yaml", tmp_path)
    (tmp_path / ".env").write_text(text)
    assert check_docker.read_project(tmp_path) == problem


@needs_engine
def test_folders_and_token_files_are_those_that_real_compose_resolves(tmp_path: Path) -> None:
    shutil.copy(ROOT / "compose.yaml", tmp_path)
    for name in ("data", "configs", "adapters/run"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "adapters/notes.txt").write_text("")
    (tmp_path / "token").write_text("hf_secret")
    (tmp_path / ".env").write_text("UID=1\nGID=2\nHF_TOKEN_FILE=token\n")
    read = check_docker.read_host(tmp_path)
    modes = {it.name: (it.writable, it.mode) for it in read.folders}
    here = (tmp_path / "data").stat().st_mode
    wanted = {"configs": (False, here), "data": (False, here), "models": (False, 0), "adapters": (True, here)}
    assert modes.items() >= (wanted | {"adapters/run": (True, here)}).items()
    assert {name: (it.name, it.uid) for name, it in read.tokens.items()} == {"HF_TOKEN_FILE": ("token", os.getuid())}
    assert read.service["user"] == "1:2"
    assert "hf_secret" not in repr(read)


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command on a recorded host; exit code, stdout, stderr."""

    def running(recorded: Host, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(check_docker, "read_host", lambda _: recorded)
        monkeypatch.setattr(sys, "argv", ["check_docker.py", *arguments])
        code = check_docker.main()
        written = capsys.readouterr()
        return code, written.out, written.err

    return running


def test_a_ready_host_is_0_and_the_next_command(shown: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = shown(READY)
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0] == "check_docker: this host, for docker compose run --rm train-h100"
    assert [line.split()[:2] for line in lines[1:-1]] == [["pass", id_] for id_ in IDS]
    assert lines[-1] == "13 passed, 0 warnings, 0 failed, 0 skipped; next: docker compose run --rm validate"


def test_a_failure_is_3_with_what_to_type_under_it(shown: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = shown(host(image=None, disk=("/var/lib/\033docker", 412.3)))
    assert code == 3
    assert out.splitlines()[-5:] == [
        "  FAIL  docker.image             no image mistral-7b-qlora:h100",
        "                                 -> docker compose build",
        "  skip  docker.flash_attention   needs docker.image",
        "  pass  docker.disk              412.3 GiB free in /var/lib/\\x1bdocker, "
        "expected need: 40 for the image, 13.5 for the base",
        "11 passed, 0 warnings, 1 failed, 1 skipped; fix the failed checks, then run: ./scripts/check_docker.py",
    ]


def test_json_is_one_document_of_the_shape_that_validate_has(shown: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = shown(host(buildx=None), "--json")
    document = json.loads(out)
    assert code == 0
    assert err.splitlines()[-1].startswith("12 passed, 1 warning, 0 failed, 0 skipped; next: ")
    assert list(document) == ["schema_version", "status", "checks", "environment"]
    assert (document["schema_version"], document["status"]) == (1, "warn")
    assert [row["id"] for row in document["checks"]] == IDS
    assert {tuple(row) for row in document["checks"]} == {("id", "status", "detail", "fix", "seconds")}
    versions = {"engine": "28.2.2", "api": "1.50", "compose": "2.36.2", "buildx": None}
    assert document["environment"] == {"machine": READY.machine, "versions": versions}


# A host where nothing is installed ------------------------------------------------------------------------------------


def bare(tmp_path: Path, *options: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    """Run the command with a Python without libraries, in a project of script and lock, where no engine answers."""
    for name in ("scripts/check_docker.py", check_docker.LOCK):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    own = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "REQUESTS_", "UV_"))}
    environment = own | {"PATH": "/nowhere", "HOME": str(tmp_path), "DOCKER_HOST": f"unix://{tmp_path}/docker.sock"}
    command = [python, *options, str(tmp_path / "scripts/check_docker.py"), "--json"]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False)


def as_if(change: str) -> str:
    """Code that makes `change`, then runs the script in the first argument."""
    imports = "import importlib.util as util, runpy, sys; from importlib import metadata"
    return f"{imports}; {change}; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"


def ubuntus_python() -> str:
    """A Python 3.10, like Ubuntu 22.04's, if this machine has one; pyenv's are not on the PATH."""
    found = [shutil.which("python3.10"), *map(str, Path.home().glob(".pyenv/versions/3.10.*/bin/python3.10"))]
    return next(
        (it for it in found if it and (check_docker.version(it, "--version") or "").startswith("3.10.")), sys.executable
    )


@pytest.mark.slow
def test_a_bare_python_fetches_docker_py_once_and_answers(tmp_path: Path) -> None:
    first, again = (bare(tmp_path, "-S", python=ubuntus_python()) for _ in range(2))  # -S: no pip, so by a venv
    assert first.stderr.splitlines()[0] == "downloading docker-py into .venv-docker, once"
    assert "docker-py" not in again.stderr
    for done in (first, again):
        assert done.returncode == 3, done.stderr
        made = {row["id"]: row["detail"] for row in json.loads(done.stdout)["checks"]}
        assert made["docker.engine"] == "Docker is not installed"
        assert made["docker.compose"] == ABSENT.detail


def test_a_python_that_can_fetch_nothing_says_what_to_type(tmp_path: Path) -> None:
    done = bare(tmp_path, "-S", "-c", as_if("util.find_spec = {}.get"))  # neither pip nor ensurepip, as on Ubuntu
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == (
        f"{sys.executable} has no docker-py and no uv, pip or venv to install it\n"
        "type: sudo apt-get update && sudo apt-get install -y python3-venv && ./scripts/check_docker.py\n"
    )


def test_a_package_index_that_does_not_answer_is_named_with_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("CONFIG_FILE", os.devnull), ("INDEX_URL", "http://127.0.0.1:1/simple"), ("RETRIES", "0")):
        monkeypatch.setenv(f"PIP_{name}", value)
    done = bare(tmp_path, "-c", as_if("metadata.distributions = lambda **_: []"))
    assert (done.returncode, done.stdout) == (3, "")
    assert "ERROR: No matching distribution found for certifi==" in done.stderr
    assert done.stderr.endswith(
        "docker-py could not be downloaded: see above\n"
        "type: curl -I https://pypi.org, until it answers; then ./scripts/check_docker.py\n"
    )
    assert not (tmp_path / ".venv-docker/complete.txt").exists()


def test_wrong_usage_is_2() -> None:
    done = subprocess.run([SCRIPT, "--skip", "x"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == "check_docker.py: error: unrecognized arguments: --skip x"


def test_it_imports_nothing_but_docker_py_that_python_3_10_has_not(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mypy", "--python-version", "3.10", "--cache-dir", str(tmp_path), str(SCRIPT)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    code = f"import sys; sys.path[:0] = [{str(SCRIPT.parent)!r}]; import check_docker; print(*sys.modules)"
    brought = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True).stdout
    assert {name.split(".")[0] for name in brought.split()} - {"__main__", "check_docker"} <= sys.stdlib_module_names


def test_what_uv_run_installs_is_what_the_lock_has() -> None:
    [pin] = re.findall(r'^# dependencies = \["(docker==[\d.]+)"\]$', SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
    assert f"\n{pin} \\\n" in (ROOT / check_docker.LOCK).read_text(encoding="utf-8")
