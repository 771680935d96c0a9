"""The Docker host: driver, engine, Compose, the way to the GPU, `.env`, bound folders. No part of the registry."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable

from packaging.version import Version

from finetune.checks.docker import image
from finetune.checks.docker.image import BUILD, resolved
from finetune.checks.host import DRIVER, OLDEST_DRIVER, nvidia_driver, on_linux
from finetune.checks.runner import Check, Finding, failed, passed, skipped, warned
from finetune.machine.docker_host import DockerHost, Engine, Place, Unreachable, allows, is_folder
from finetune.machine.platforms import accelerator

OLDEST_ENGINE = Version("20.10")  # older ones were not tried
# Tried was 2.26. The youngest word of compose.yaml and its tests is `!reset`, of 2.18; what lies between is expected.
OLDEST_COMPOSE = Version("2.20")

KEYS = "/usr/share/keyrings/nvidia-container-toolkit-keyring.gpg"
NVIDIA = "https://nvidia.github.io/libnvidia-container"
CONFIGURE = "sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"
# As NVIDIA's installation guide has it for Ubuntu and Debian.
TOOLKIT = (
    f"curl -fsSL {NVIDIA}/gpgkey | sudo gpg --dearmor --yes -o {KEYS} && "
    f"curl -fsSL {NVIDIA}/stable/deb/nvidia-container-toolkit.list | "
    f"sed 's#deb https://#deb [signed-by={KEYS}] https://#g' | "
    "sudo tee /etc/apt/sources.list.d/nvidia-container-toolkit.list && "
    f"sudo apt-get update && sudo apt-get install -y nvidia-container-toolkit && {CONFIGURE}"
)
# As Docker's installation guide has it for Ubuntu.
INSTALL = (
    "sudo install -m 0755 -d /etc/apt/keyrings && "
    "sudo curl -fsSL https://download.docker.com/linux/ubuntu/gpg -o /etc/apt/keyrings/docker.asc && "
    'echo "deb [arch=$(dpkg --print-architecture) signed-by=/etc/apt/keyrings/docker.asc] '
    'https://download.docker.com/linux/ubuntu $(. /etc/os-release && echo $VERSION_CODENAME) stable" | '
    "sudo tee /etc/apt/sources.list.d/docker.list && sudo apt-get update && sudo apt-get install -y "
    "docker-ce docker-ce-cli containerd.io docker-buildx-plugin docker-compose-plugin"
)
MEND_ENV = "(echo; id -u | sed s/^/UID=/; id -g | sed s/^/GID=/) >> .env"  # the last one counts, all else stays


# The machine ----------------------------------------------------------------------------------------------------------


def _machine(host: DockerHost) -> Finding:
    found = host.machine.described
    if host.machine.system == "Darwin":
        return failed(f"{found}; a container on a Mac reaches no GPU", "./scripts/setup_m4.sh, which needs no Docker")
    linux = on_linux(host.machine, "train-h100", "rent a Linux machine with an H100")
    if linux.status == "pass" and host.machine.container:
        return warned(f"{found}, in a container: folders and driver seen here are its own", "run this on the host")
    return linux


def _driver(host: DockerHost) -> Finding:
    return nvidia_driver(host.machine, DRIVER, DRIVER)


def _device(host: DockerHost) -> Finding:
    found = accelerator(host.machine)
    if not host.machine.gpus:
        return failed(
            "the driver shows no GPU", "unset CUDA_VISIBLE_DEVICES; if that is not it, sudo dmesg | grep -i nvrm"
        )
    if "H100" not in host.machine.gpus[0]:
        other = "nvidia-smi --query-gpu=compute_cap --format=csv says whether it is 9.0, which flash-attn is built for"
        return warned(found, f"{other}; if not: {BUILD} --build-arg FLASH_ATTN_CUDA_ARCHS=80, for 8.0")
    return passed(found)


# Engine and commands --------------------------------------------------------------------------------------------------


def _engine(host: DockerHost) -> Finding:
    engine = host.engine
    if isinstance(engine, Unreachable):
        return _no_engine(host, engine)
    found = f"Docker {engine.version} (API {engine.api}) on {engine.system}"
    if engine.address:
        here = "unset DOCKER_HOST; docker context use default; or run this there"
        return failed(f"{found} at {engine.address}, another machine, which does not see these folders", here)
    if Version(engine.version) < OLDEST_ENGINE:
        return failed(f"{found}, wanted {OLDEST_ENGINE} or newer", f"on Ubuntu: {INSTALL}")
    if engine.rootless:
        group = "sudo nvidia-ctk config --set nvidia-container-cli.no-cgroups --in-place"
        rest = "take the ulimits out of compose.yaml; (echo; echo UID=0; echo GID=0) >> .env, which is you there"
        text = f"{found}, rootless, which was not tried: a GPU there needs no-cgroups, and memlock may not be raised"
        return warned(text, f"{group}; {rest}")
    return passed(found)


def _no_engine(host: DockerHost, engine: Unreachable) -> Finding:
    mac = host.machine.system == "Darwin"
    return failed(
        *{
            "absent": ("Docker is not installed", "brew install --cask docker" if mac else f"on Ubuntu: {INSTALL}"),
            "stopped": ("Docker's engine does not run", "open -a Docker" if mac else "sudo systemctl start docker"),
            "denied": (
                "permission denied: your user may not use the Docker engine",
                "sudo usermod -aG docker $USER, then log in again (newgrp docker)",
            ),
            "other": (
                f"Docker's engine does not answer: {engine.text}",
                "docker info; docker context ls; echo $DOCKER_HOST",
            ),
        }[engine.why]
    )


def _answering(host: DockerHost) -> Engine:
    assert isinstance(host.engine, Engine)  # what asks needs docker.engine
    return host.engine


def _compose(host: DockerHost) -> Finding:
    fix = "on Ubuntu: sudo apt-get install -y docker-compose-plugin, or docker-compose-v2 beside Ubuntu's own docker.io"
    if host.compose is None:
        return failed("docker compose does not answer", fix)
    if Version(host.compose) < OLDEST_COMPOSE:
        return failed(f"Compose {host.compose}, wanted {OLDEST_COMPOSE} or newer", fix)
    return passed(f"Compose {host.compose}")


def _buildx(host: DockerHost) -> Finding:
    if host.buildx is None:
        fix = "on Ubuntu: sudo apt-get install -y docker-buildx-plugin, or docker-buildx beside Ubuntu's own docker.io"
        return warned("docker buildx does not answer; newer versions of Compose build by it", fix)
    return passed(f"Buildx {host.buildx}")


def _gpu(host: DockerHost) -> Finding:
    """The engine makes its driver "nvidia" from a hook on its PATH when it starts (moby, daemon/nvidia_linux.go)."""
    engine = _answering(host)
    runtime = "nvidia" in engine.runtimes
    if runtime and host.hook:
        return passed("runtime nvidia, with its hook")
    if runtime:
        text = "runtime nvidia, but no nvidia-container-runtime-hook on this PATH, by which the engine starts a GPU"
        return warned(text, TOOLKIT)
    devices = [device for device in engine.cdi_devices if device.startswith("nvidia.com/gpu")]
    if devices:  # engines with moby#50228 start compose.yaml's GPU by these, older ones by the hook only
        found = f"no runtime nvidia, but CDI devices: {', '.join(devices)}"
        return warned(f"{found}; whether this engine starts a GPU by them was not tried", TOOLKIT)
    if engine.folders[0].startswith("/var/snap/"):
        text = "the engine is Ubuntu's snap, which nvidia-ctk does not configure, and has no runtime nvidia"
        return failed(text, f"sudo snap remove docker (its images and volumes go), then {INSTALL}, then {TOOLKIT}")
    if "Docker Desktop" in engine.system:
        text = "Docker Desktop's engine runs in a virtual machine and has no runtime nvidia"
        return failed(text, f"docker context use default, where an engine is installed; else {INSTALL}, then {TOOLKIT}")
    if host.hook:
        return failed(
            "the toolkit is installed, but the engine has no runtime nvidia: not configured, or not restarted",
            CONFIGURE,
        )
    return failed(
        'the engine has no runtime nvidia and no CDI device: could not select device driver "nvidia"', TOOLKIT
    )


# The project ----------------------------------------------------------------------------------------------------------


def _config(host: DockerHost) -> Finding:
    service = host.service
    if isinstance(service, str):
        problem = service.partition(". Type this")[0]  # the recipe in compose.yaml replaces .env, this one adds to it
        fix = MEND_ENV if "required variable" in problem else "docker compose config --quiet"
        return failed(f"Compose refuses compose.yaml or .env: {problem}", fix)
    if not re.fullmatch(r"\d+:\d+", service.user):
        return failed(f"UID:GID is {service.user!r} in .env, wanted numbers", MEND_ENV)
    return passed(f"user {service.user}, image {service.image}")


def _ids(host: DockerHost) -> tuple[int, int]:
    uid, gid = resolved(host).user.split(":")
    return int(uid), int(gid)


def _other_ids(host: DockerHost) -> bool:
    """Whether a container's user is another on this machine, so that modes decide nothing."""
    return isinstance(host.engine, Engine) and (host.engine.rootless or host.engine.remapped)


def _secrets(host: DockerHost) -> Finding:
    (uid, gid), tokens = _ids(host), resolved(host).tokens
    absent = [name for name, it in tokens.items() if not stat.S_ISREG(it.mode or 0)]
    if absent:  # without the path: somebody may have put the token itself there
        fix = "hf auth login makes ~/.cache/huggingface/token; correct .env"
        return failed(f"{' and '.join(absent)} in .env: no such file", fix)
    closed = [] if _other_ids(host) else [it for it in tokens.values() if not allows(it, uid, gid, 4)]
    if closed:
        fix = f"sudo chown {uid} {_names(closed)} && chmod 600 {_names(closed)}"
        return failed(f"UID {uid} cannot read {_listed(closed)}", fix)
    return passed(f"tokens from {', '.join(it.name for it in tokens.values())}" if tokens else "no token file is named")


def _binds(host: DockerHost) -> Finding:
    """Compose is told to refuse folders that are not there; newer ones are reported to make them (compose#13602)."""
    folders = resolved(host).folders
    absent = [folder.name for folder in folders if folder.mode is None]
    if absent:
        return failed(f"not there: {', '.join(absent)}", f"mkdir -p {' '.join(absent)}")
    files = [folder.name for folder in folders if not is_folder(folder)]
    if files:
        return failed(
            f"not a folder: {', '.join(files)}", f"rm {' '.join(files)} && mkdir {' '.join(files)}, if it may go"
        )
    if _other_ids(host):
        return skipped("there; in this engine a container's UID is another here, so modes decide nothing")
    return _modes(folders, *_ids(host))


def _modes(folders: tuple[Place, ...], uid: int, gid: int) -> Finding:
    closed = [it for it in folders if it.writable and not allows(it, uid, gid, 7)]
    if closed:
        fix = f"sudo chown -R {uid}:{gid} adapters; if {uid} is not you: {MEND_ENV}"
        return failed(f"UID {uid}, GID {gid} cannot write {_listed(closed)}", fix)
    closed = [it for it in folders if not allows(it, uid, gid, 5)]
    if closed:
        return failed(f"UID {uid}, GID {gid} cannot read {_listed(closed)}", f"chmod -R a+rX {_names(closed)}")
    read, written = ([it.name for it in folders if it.writable is writable] for writable in (False, True))
    return passed(f"UID {uid} reads {', '.join(read)} and writes {', '.join(written[:1])}")


def _names(places: Iterable[Place]) -> str:
    return " ".join(place.name for place in places)


def _listed(places: Iterable[Place]) -> str:
    return ", ".join(f"{it.name} ({stat.filemode(it.mode or 0)} {it.uid}:{it.gid})" for it in places)


_HOST, _ENGINE, _CONFIG = ("docker.host",), ("docker.engine",), ("docker.config",)
CHECKS: tuple[Check[DockerHost], ...] = (
    Check("docker.host", "Linux on x86_64, not in a container", _machine),
    Check("docker.driver", f"an NVIDIA driver, {OLDEST_DRIVER} or newer", _driver, needs=_HOST),
    Check("docker.device", "an H100", _device, needs=("docker.driver",)),
    Check("docker.engine", f"an engine of this machine answers, {OLDEST_ENGINE} or newer", _engine),
    Check("docker.compose", f"Compose {OLDEST_COMPOSE} or newer", _compose),
    Check("docker.buildx", "Buildx answers", _buildx, level="warn"),
    Check("docker.gpu", "the engine has NVIDIA's runtime or CDI devices", _gpu, needs=(*_HOST, *_ENGINE)),
    Check("docker.config", "Compose takes compose.yaml and .env", _config, needs=("docker.compose",)),
    Check("docker.secrets", "files with tokens are there, and UID may read them", _secrets, needs=_CONFIG),
    Check(
        "docker.binds", "data, configs, models and adapters are there; UID may write adapters", _binds, needs=_CONFIG
    ),
    *image.CHECKS,
)
