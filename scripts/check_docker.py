#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["docker==7.2.0"]
# ///
"""Check whether this Docker host can run `docker compose run --rm train-h100`; print what to type for each problem.

It needs only Python 3.10 and docker-py, which it downloads once, so it runs before anything is installed. Therefore it
imports nothing from the package, which needs Python 3.11 and its libraries. It starts no container.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parents[1]
LOCK = "requirements/h100.lock"
DOCKER_PY = ("docker", "requests", "urllib3", "certifi", "idna", "charset-normalizer")  # docker-py, its dependencies
DOWNLOADED = ".venv-docker"
ANSWER_SECONDS = 20
GIB = 2**30

OLDEST_DRIVER = 525  # the first that runs CUDA 12
OLDEST_ENGINE = "20.10"  # older ones are untested
# Tested: 2.26. compose.yaml and its tests need `!reset`, in 2.18; versions in between are expected to work.
OLDEST_COMPOSE = "2.20"
IMAGE_GIB = 40  # an expectation: the image, its stages and uv's cache, all kept by the engine
BASE_GIB = 13.5  # three safetensors files, 14.5 GB together

AGAIN = "./scripts/check_docker.py"
BUILD = "docker compose build"
DRIVER = "sudo apt install nvidia-driver-570-server, then restart"
KEYS = "/usr/share/keyrings/nvidia-container-toolkit-keyring.gpg"
NVIDIA = "https://nvidia.github.io/libnvidia-container"
CONFIGURE = "sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"
# From NVIDIA's installation guide for Ubuntu and Debian.
TOOLKIT = (
    f"curl -fsSL {NVIDIA}/gpgkey | sudo gpg --dearmor --yes -o {KEYS} && "
    f"curl -fsSL {NVIDIA}/stable/deb/nvidia-container-toolkit.list | "
    f"sed 's#deb https://#deb [signed-by={KEYS}] https://#g' | "
    "sudo tee /etc/apt/sources.list.d/nvidia-container-toolkit.list && "
    f"sudo apt-get update && sudo apt-get install -y nvidia-container-toolkit && {CONFIGURE}"
)
# From Docker's installation guide for Ubuntu.
INSTALL = (
    "sudo install -m 0755 -d /etc/apt/keyrings && "
    "sudo curl -fsSL https://download.docker.com/linux/ubuntu/gpg -o /etc/apt/keyrings/docker.asc && "
    'echo "deb [arch=$(dpkg --print-architecture) signed-by=/etc/apt/keyrings/docker.asc] '
    'https://download.docker.com/linux/ubuntu $(. /etc/os-release && echo $VERSION_CODENAME) stable" | '
    "sudo tee /etc/apt/sources.list.d/docker.list && sudo apt-get update && sudo apt-get install -y "
    "docker-ce docker-ce-cli containerd.io docker-buildx-plugin docker-compose-plugin"
)
PLUGIN = "on Ubuntu: sudo apt-get install -y docker-{0}-plugin (with Ubuntu's docker.io: docker-{1})"
IDS = "(echo; id -u | sed s/^/UID=/; id -g | sed s/^/GID=/) >> .env"  # the last line with a name counts


# Find docker-py -------------------------------------------------------------------------------------------------------


def find_docker_py(root: Path) -> None:
    """Make docker-py importable: this Python's own, or the lock's version, downloaded once. Exit with 3 on failure."""
    lock = (root / LOCK).read_text(encoding="utf-8")
    pins = "".join(re.findall(rf"^(?:{'|'.join(DOCKER_PY)})==[^#]+", lock, re.MULTILINE))
    installed = [found.version for found in metadata.distributions(name="docker")]
    if installed and f"docker=={installed[0]} " in pins:
        return
    folder = root / DOWNLOADED
    complete = folder / "complete.txt"
    if not complete.is_file() or complete.read_text(encoding="utf-8") != pins:
        try:
            download(pins, folder)
        except OSError as error:
            leave(f"{folder}: {error.strerror}", f"sudo chown $(id -u) {root}, then {AGAIN}")
        complete.write_text(pins, encoding="utf-8")
    sys.path.insert(0, str(folder))


def download(pins: str, folder: Path) -> None:
    """Install `pins`, verified by their hashes, into `folder`: with uv, this Python's pip, or the pip of a new venv."""
    uv, pip = shutil.which("uv"), importlib.util.find_spec("pip")
    if not (uv or pip or importlib.util.find_spec("ensurepip")):
        found = f"{sys.executable} has no docker-py and no uv, pip or venv to install it"
        leave(found, f"sudo apt-get update && sudo apt-get install -y python3-venv && {AGAIN}")
    print(f"downloading docker-py into {DOWNLOADED}, once", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    requirements = folder / "requirements.txt"
    requirements.write_text(pins, encoding="utf-8")
    python = sys.executable
    if not (uv or pip):
        python = str(folder / "venv/bin/python")
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    command = [uv, "pip", "install", "--python", python] if uv else [python, "-m", "pip", "install"]
    command += ["--no-deps", "--require-hashes", "--target", str(folder), "--requirement", str(requirements)]
    variables = {**os.environ, "PIP_USER": "0"}  # pip's --user conflicts with --target
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    if done.returncode:
        found = f"{done.stderr.strip()}\ndocker-py could not be downloaded: see above"
        leave(found, f"curl -I https://pypi.org, until it answers; then {AGAIN}")


def leave(found: str, fix: str) -> NoReturn:
    """Print the problem and what to type, and exit with 3."""
    print(f"{found}\ntype: {fix}", file=sys.stderr)
    raise SystemExit(3)


# Read the host --------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A file or folder that the container uses, with the mode and owner from stat; `mode` is 0 if it does not exist."""

    name: str
    writable: bool = False
    mode: int = 0
    uid: int = 0
    gid: int = 0

    def denies(self, bits: int, uid: int, gid: int) -> bool:
        """Return whether the mode denies this user any of `bits` (4 read, 2 write, 1 enter); ignores access lists.

        This holds for root, too, which has no capabilities in the container.
        """
        shift = 6 if self.uid == uid else 3 if self.gid == gid else 0
        return self.mode >> shift & bits != bits


class Image(NamedTuple):
    """The image of train-h100: its size and two of its labels."""

    gib: float
    lock: str
    flash_attn: str


class Host(NamedTuple):
    """A Docker host and the project on it, read once, so that tests can check recorded hosts.

    `engine` is its answer to /info plus Api and Address (empty for a local socket), or why there is none: absent,
    stopped, denied, or docker-py's message. `project` is the output of `docker compose config`, or Compose's error.
    `hook` is whether nvidia-container-runtime-hook is installed. `folders` are the bind mounts and the runs in them;
    `tokens` maps variables to the token files they name. `disk` is the engine's folder with the least free space, and
    its free GiB; None if it is not visible from here.
    """

    machine: dict[str, Any]  # system, release, architecture, container, driver, gpus
    engine: dict[str, Any] | str
    project: dict[str, Any] | str
    compose: str | None = None
    buildx: str | None = None
    hook: bool = False
    folders: tuple[Place, ...] = ()
    tokens: dict[str, Place] = {}  # noqa: RUF012  # never changed
    image: Image | None = None
    disk: tuple[str, float] | None = None

    @property
    def service(self) -> dict[str, Any]:
        """train-h100 as Compose resolves it; only for a project that Compose accepts."""
        assert isinstance(self.project, dict)
        return dict(self.project["services"]["train-h100"])

    @property
    def user(self) -> tuple[int, int]:
        """The UID and GID that train: as root, the container switches to the owner of adapters."""
        uid, gid = map(int, self.service["user"].split(":"))
        adapters = next((folder for folder in self.folders if folder.writable), Place(""))
        return (uid, gid) if uid else (adapters.uid, adapters.gid)

    @property
    def security(self) -> set[str]:
        """Names of the engine's security options; empty if it does not answer."""
        options = self.engine.get("SecurityOptions") if isinstance(self.engine, dict) else ()
        return {option.split(",")[0].replace("name=", "", 1) for option in options or ()}

    @property
    def remapped(self) -> bool:
        """Whether the engine maps the container's users to other ids of the host, so that modes prove nothing."""
        return bool(self.security & {"rootless", "userns"})


def read_host(root: Path) -> Host:
    """Read this host and the project in `root` without starting anything."""
    host = Host(
        machine=read_machine(),
        engine="absent",
        project=read_project(root),
        compose=version("docker", "compose", "version", "--short"),
        buildx=version("docker", "buildx", "version"),
        hook=shutil.which("nvidia-container-runtime-hook") is not None,
    )
    if isinstance(host.project, dict):
        files = {name: Path(secret["file"]) for name, secret in host.project["secrets"].items()}
        tokens = {f"{name.upper()}_FILE": place(path, root) for name, path in files.items() if str(path) != os.devnull}
        host = host._replace(folders=tuple(read_folders(host.service, root)), tokens=tokens)
    return host._replace(**ask_engine(host))


def read_machine() -> dict[str, Any]:
    """Return facts about the operating system, and the NVIDIA driver and GPUs that nvidia-smi lists."""
    listed = ask("nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader").stdout
    gpus = re.findall(r"^([\d.]+), *(.+)$", listed, re.MULTILINE)
    return {
        "system": platform.system(),
        "release": platform.mac_ver()[0] or platform.release(),
        "architecture": platform.machine(),
        "container": Path("/.dockerenv").exists() or Path("/run/.containerenv").exists(),
        "driver": gpus[0][0] if gpus else None,
        "gpus": [name for _, name in gpus],
    }


def ask(*command: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command that may be missing or hang; both end with exit code 1."""
    options: dict[str, Any] = {"capture_output": True, "text": True, "errors": "replace", "check": False}
    try:
        return subprocess.run(command, cwd=folder, timeout=ANSWER_SECONDS, **options)
    except (OSError, subprocess.SubprocessError) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def version(*command: str) -> str | None:
    """Return the first dotted number that `command` prints; None if it fails."""
    done = ask(*command)
    found = re.search(r"\d+(\.\d+)+", done.stdout)
    return found[0] if found and not done.returncode else None


def read_project(root: Path) -> dict[str, Any] | str:
    """Return the project in `root` as Compose resolves it from compose.yaml, `.env` and the shell, or Compose's error.

    For an error in `.env` only the line number: Compose quotes the line, which may contain a token.
    """
    done = ask("docker", "compose", "--profile", "program", "config", "--format", "json", folder=root)
    if not done.returncode:
        return dict(json.loads(done.stdout))
    if re.search("failed to read|unexpected character|unterminated", done.stderr):
        line = re.search(r"\bline \d+", done.stderr)
        return f".env cannot be read{f', {line[0]}' if line else ''}"
    return next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no reason given")


def read_folders(service: dict[str, Any], root: Path) -> Iterator[Place]:
    """Yield the folders that `service` mounts, and the runs in those that it writes."""
    for bind in service["volumes"]:
        if bind["type"] == "bind":
            folder, writable = Path(bind["source"]), not bind.get("read_only")
            yield place(folder, root, writable)
            if writable and os.access(folder, os.R_OK | os.X_OK):
                yield from (place(run, root, writable) for run in sorted(folder.iterdir()) if run.is_dir())


def place(path: Path, root: Path, writable: bool = False) -> Place:
    """Describe `path`, named relative to `root` if it is inside."""
    name = str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
    try:
        found = path.stat()
    except OSError:  # missing, or in a folder that may not be entered
        return Place(name, writable)
    return Place(name, writable, found.st_mode, found.st_uid, found.st_gid)


def ask_engine(host: Host) -> dict[str, Any]:
    """Return the engine's fields of Host: engine, image and disk."""
    import docker
    from docker.errors import DockerException
    from requests.exceptions import RequestException

    try:
        # Like the docker command, docker-py uses DOCKER_HOST, else the current context.
        with closing(docker.from_env(timeout=ANSWER_SECONDS)) as client:
            url = client.api.base_url
            address = "" if url == "http+docker://localhost" else url  # docker-py's name for every socket
            engine = {**client.info(), "Api": client.api.api_version, "Address": address}
            image = read_image(client, host.service["image"]) if isinstance(host.project, dict) else None
            return {"engine": engine, "image": image, "disk": fullest(engine)}
    except (DockerException, RequestException) as error:
        return {"engine": silence(error)}


def silence(error: BaseException) -> str:
    """Return why no engine answers; the operating system's error is at the end of docker-py's chain of causes."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, PermissionError):
            return "denied"
        if isinstance(cause, (FileNotFoundError, ConnectionRefusedError)):
            return "stopped" if shutil.which("docker") else "absent"
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0]


def read_image(client: Any, name: str) -> Image | None:
    """Return the image called `name`, or None."""
    from docker.errors import ImageNotFound

    try:
        image = client.images.get(name)
    except ImageNotFound:
        return None
    labels = image.attrs["Config"].get("Labels") or {}
    return Image(image.attrs["Size"] / GIB, labels.get("lock", ""), labels.get("flash-attn", ""))


def fullest(engine: dict[str, Any]) -> tuple[str, float] | None:
    """Return the engine's data folder with the least free GiB; None on another machine or in a virtual one."""
    folders = [engine["DockerRootDir"]]
    if dict(row[:2] for row in engine.get("DriverStatus") or ()).get("driver-type", "").startswith("io.containerd."):
        folders.append("/var/lib/containerd")
    try:
        free = [(folder, shutil.disk_usage(folder).free / GIB) for folder in folders if not engine["Address"]]
    except OSError:
        return None
    return min(free, key=lambda row: row[1], default=None)


# The checks -----------------------------------------------------------------------------------------------------------


class Finding(NamedTuple):
    """What a check found: a status and its detail; for a warning or a failure also what to type."""

    status: str
    detail: str
    fix: str = ""


passed = partial(Finding, "pass")
warned = partial(Finding, "warn")  # train-h100 runs, but look at it first
failed = partial(Finding, "fail")  # train-h100 cannot run


def number(text: str) -> tuple[int, ...]:
    """Return major and minor of a version."""
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


def names(places: Iterable[Place], separator: str = " ") -> str:
    """Join the names of `places`."""
    return separator.join(place.name for place in places)


def described(places: Iterable[Place]) -> str:
    """Join `places`, each with its mode and owner: `adapters (drwxr-xr-x 0:0)`."""
    return ", ".join(f"{it.name} ({stat.filemode(it.mode)} {it.uid}:{it.gid})" for it in places)


def check_host(host: Host) -> Finding:
    system, release, architecture = (host.machine[name] for name in ("system", "release", "architecture"))
    found = f"{'macOS' if system == 'Darwin' else system} {release} on {architecture}"
    if system == "Darwin":
        return failed(f"{found}; containers on a Mac have no GPU", "./scripts/setup_m4.sh, which needs no Docker")
    if system != "Linux":
        return failed(f"{found}; train-h100 needs Linux", "rent a Linux machine with an H100")
    if architecture != "x86_64":
        return warned(f"{found}; {LOCK} was resolved for x86_64", "rent an x86_64 machine")
    if host.machine["container"]:
        return warned(f"{found}, in a container, which has its own folders and driver", "run this on the host")
    return passed(found)


def check_driver(host: Host) -> Finding:
    driver = host.machine["driver"]
    if driver is None:
        return failed("nvidia-smi is missing or does not answer: no working NVIDIA driver", DRIVER)
    if number(driver) < (OLDEST_DRIVER,):
        return failed(f"driver {driver}; CUDA 12 needs {OLDEST_DRIVER} or newer", DRIVER)
    return passed(f"driver {driver}")


def check_device(host: Host) -> Finding:
    gpu, *others = host.machine["gpus"]
    found = f"{gpu} (the first of {len(others) + 1})" if others else gpu
    if "H100" in gpu:
        return passed(found)
    fix = (
        "nvidia-smi --query-gpu=compute_cap --format=csv; flash-attn is built for 9.0, "
        f"for 8.0 with: {BUILD} --build-arg FLASH_ATTN_CUDA_ARCHS=80"
    )
    return warned(f"{found} is not an H100: hours and memory differ", fix)


def check_engine(host: Host) -> Finding:
    if isinstance(host.engine, str):
        return no_engine(host.engine, mac=host.machine["system"] == "Darwin")
    found = "Docker {ServerVersion} (API {Api}) on {OperatingSystem}".format(**host.engine)
    if host.engine["Address"]:
        found += f" at {host.engine['Address']}, another machine, which cannot mount these folders"
        return failed(found, "unset DOCKER_HOST; docker context use default; or run this on that machine")
    if number(host.engine["ServerVersion"]) < number(OLDEST_ENGINE):
        return failed(f"{found}, expected {OLDEST_ENGINE} or newer", f"on Ubuntu: {INSTALL}")
    if "rootless" in host.security:
        found += ", rootless, which is untested: a GPU needs no-cgroups there, and raising memlock may be denied"
        no_cgroups = "sudo nvidia-ctk config --set nvidia-container-cli.no-cgroups --in-place"
        return warned(found, f"{no_cgroups}; remove the ulimits from compose.yaml")
    return passed(found)


def no_engine(why: str, mac: bool) -> Finding:
    """Explain Host.engine for an engine that does not answer."""
    if why == "absent":
        return failed("Docker is not installed", "brew install --cask docker" if mac else f"on Ubuntu: {INSTALL}")
    if why == "stopped":
        return failed("the Docker engine is not running", "open -a Docker" if mac else "sudo systemctl start docker")
    if why == "denied":
        fix = "sudo usermod -aG docker $USER, then log in again (newgrp docker)"
        return failed("permission denied: your user may not use the Docker engine", fix)
    return failed(f"the Docker engine does not answer: {why}", "docker info; docker context ls; echo $DOCKER_HOST")


def check_compose(host: Host) -> Finding:
    fix = PLUGIN.format("compose", "compose-v2")
    if host.compose is None:
        return failed("docker compose is missing or does not answer", fix)
    if number(host.compose) < number(OLDEST_COMPOSE):
        return failed(f"Compose {host.compose}, expected {OLDEST_COMPOSE} or newer", fix)
    return passed(f"Compose {host.compose}")


def check_buildx(host: Host) -> Finding:
    if host.buildx is None:
        found = "docker buildx is missing or does not answer; newer versions of Compose need it to build"
        return warned(found, PLUGIN.format("buildx", "buildx"))
    return passed(f"Buildx {host.buildx}")


def check_gpu(host: Host) -> Finding:
    """Check for the driver "nvidia", which needs a hook on the engine's PATH (moby, daemon/nvidia_linux.go)."""
    assert isinstance(host.engine, dict)  # needs docker.engine
    if "nvidia" in (host.engine.get("Runtimes") or ()):
        if host.hook:
            return passed("runtime nvidia, with its hook")
        found = "runtime nvidia, but nvidia-container-runtime-hook, which the engine needs, is not on this PATH"
        return warned(found, TOOLKIT)
    devices = [device["ID"] for device in host.engine.get("DiscoveredDevices") or ()]
    cdi = ", ".join(device for device in devices if device.startswith("nvidia.com/gpu"))
    if cdi:  # engines with moby#50228 use these for compose.yaml's GPU, older ones only the hook
        return warned(f"no runtime nvidia, but CDI devices: {cdi}; this engine is untested with them", TOOLKIT)
    if host.engine["DockerRootDir"].startswith("/var/snap/"):
        found = "the engine is Ubuntu's snap, which has no runtime nvidia and which nvidia-ctk cannot configure"
        remove = "sudo snap remove docker (deletes its images and volumes)"
        return failed(found, f"{remove}, then {INSTALL}, then {TOOLKIT}")
    if host.hook:
        found = "the toolkit is installed, but the engine has no runtime nvidia: not configured, or not restarted"
        return failed(found, CONFIGURE)
    found = 'the engine has no runtime nvidia and no CDI device: could not select device driver "nvidia"'
    return failed(found, TOOLKIT)


def check_config(host: Host) -> Finding:
    if isinstance(host.project, str):
        return failed(f"Compose rejects compose.yaml or .env: {host.project}", "docker compose config --quiet")
    user = host.service["user"]
    if not re.fullmatch(r"\d+:\d+", user):
        return failed(f"UID:GID is {user!r} in .env, expected numbers", IDS)
    return passed(f"user {'{}:{}'.format(*host.user)}, image {host.service['image']}")


def check_secrets(host: Host) -> Finding:
    missing = [name for name, token in host.tokens.items() if not stat.S_ISREG(token.mode)]
    if missing:  # without the path, which may be the token itself by mistake
        fix = "hf auth login creates ~/.cache/huggingface/token; correct .env"
        return failed(f"{' and '.join(missing)} in .env: no such file", fix)
    uid, gid = host.user
    unreadable = [token for token in host.tokens.values() if token.denies(4, uid, gid) and not host.remapped]
    if unreadable:
        found, paths = f"UID {uid} cannot read {described(unreadable)}", names(unreadable)
        return failed(found, f"sudo chown {uid} {paths} && chmod 600 {paths}")
    return passed(f"tokens from {names(host.tokens.values(), ', ')}" if host.tokens else "no token file is named")


def check_binds(host: Host) -> Finding:
    """Check the mounted folders: Compose may create missing ones although compose.yaml forbids it (compose#13602)."""
    missing = [folder for folder in host.folders if not stat.S_ISDIR(folder.mode)]
    if missing:
        return failed(f"no such folder: {names(missing, ', ')}", f"mkdir -p {names(missing)}")
    if host.remapped:
        return Finding("skip", "the folders exist; this engine maps users to other ids, so modes prove nothing")
    uid, gid = host.user
    written = [folder for folder in host.folders if folder.writable]
    unwritable = [folder for folder in written if folder.denies(7, uid, gid)]
    if unwritable:
        fix = f"sudo chown -R {uid}:{gid} {names(unwritable)}; if your UID is not {uid}: {IDS}"
        return failed(f"UID {uid}, GID {gid} cannot write {described(unwritable)}", fix)
    unreadable = [folder for folder in host.folders if folder.denies(5, uid, gid)]
    if unreadable:
        found = f"UID {uid}, GID {gid} cannot read {described(unreadable)}"
        return failed(found, f"chmod -R a+rX {names(unreadable)}")
    read = names((folder for folder in host.folders if not folder.writable), ", ")
    return passed(f"UID {uid} reads {read} and writes {written[0].name}")


def check_image(host: Host) -> Finding:
    lock, name, image = host.service["build"]["args"]["LOCK"], host.service["image"], host.image
    if lock != "h100":
        return failed(f"LOCK is {lock}, but train-h100 needs h100", f"echo LOCK=h100 >> .env && {BUILD}")
    if image is None:
        return failed(f"no image {name}", BUILD)
    found = f"{name}, {image.gib:.1f} GiB"
    if image.lock != lock:
        return failed(f"{found}, was built with lock {image.lock or 'none'}, expected {lock}", BUILD)
    return passed(f"{found}, with the libraries of {LOCK}")


def check_flash_attention(host: Host) -> Finding:
    assert host.image is not None  # needs docker.image
    if host.image.flash_attn in ("", "skip"):
        without = "docker compose run --rm train-h100 --set model.attn_implementation=torch_varlen"
        fix = f"echo FLASH_ATTN=build >> .env && {BUILD}; or train without it: {without}"
        return warned("the image has no flash-attn", fix)
    return passed("flash-attn is in the image")


def check_disk(host: Host) -> Finding:
    """Compare free space with the expected need; only root could see whether the cache volume has the base already."""
    if host.disk is None:
        return Finding("skip", "the engine's data folder is not visible from here")
    folder, free_gib = host.disk
    image_gib = 0 if host.image else IMAGE_GIB
    needs = f"{'' if host.image else f'{image_gib} for the image, '}{BASE_GIB:g} for the base"
    found = f"{free_gib:.1f} GiB free in {folder}, expected need: {needs}"
    if free_gib >= image_gib + BASE_GIB:
        return passed(found)
    fix = "docker system df shows what uses it; docker image prune; or another data-root in /etc/docker/daemon.json"
    return warned(f"{found}, unless the cache volume has it" if host.image else found, fix)


CHECKS = {  # id: its function, and the checks that must succeed first
    "docker.host": (check_host, ()),
    "docker.driver": (check_driver, ("docker.host",)),
    "docker.device": (check_device, ("docker.driver",)),
    "docker.engine": (check_engine, ()),
    "docker.compose": (check_compose, ()),
    "docker.buildx": (check_buildx, ()),
    "docker.gpu": (check_gpu, ("docker.host", "docker.engine")),
    "docker.config": (check_config, ("docker.compose",)),
    "docker.secrets": (check_secrets, ("docker.config",)),
    "docker.binds": (check_binds, ("docker.config",)),
    "docker.image": (check_image, ("docker.engine", "docker.config")),
    "docker.flash_attention": (check_flash_attention, ("docker.image",)),
    "docker.disk": (check_disk, ("docker.engine",)),
}


# Run the checks and print them ----------------------------------------------------------------------------------------

WORDS = {"pass": ("pass", 32), "warn": ("WARN", 33), "fail": ("FAIL", 31), "skip": ("skip", 2)}  # and their colors


def results(host: Host) -> Iterator[dict[str, Any]]:
    """Yield each check's result, as in `--json`; a check that crashes is a failure, and the others still run."""
    unsuccessful: set[str] = set()
    for name, (check, needs) in CHECKS.items():
        started = time.perf_counter()
        missing = [other for other in needs if other in unsuccessful]
        try:
            finding = Finding("skip", f"needs {missing[0]}") if missing else check(host)
        except Exception as error:  # noqa: BLE001  # a bug in one check must not hide the findings of the others
            finding = failed(f"this check crashed: {type(error).__name__}: {error}", "report it")
        if finding.status in ("fail", "skip"):
            unsuccessful.add(name)
        yield {"id": name, **finding._asdict(), "seconds": round(time.perf_counter() - started, 3)}


def in_lines(result: dict[str, Any], color: bool) -> str:
    """Format a result for the terminal; control characters in it are escaped."""
    word, code = WORDS[result["status"]]
    word, arrow = (f"\033[{code}m{text}\033[0m" if color else text for text in (word, "->"))
    text = f"  {word}  {result['id']:<24} {escaped(result['detail'])}"
    return f"{text}\n{'':<33}{arrow} {escaped(result['fix'])}" if result["fix"] else text


def escaped(text: str) -> str:
    """Escape the control characters in `text`."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def environment(host: Host) -> dict[str, Any]:
    """Return the machine and the versions of engine, API, Compose and Buildx; None for one that does not answer."""
    engine = host.engine if isinstance(host.engine, dict) else {}
    versions = {"engine": engine.get("ServerVersion"), "api": engine.get("Api")}
    return {"machine": host.machine, "versions": {**versions, "compose": host.compose, "buildx": host.buildx}}


def main() -> int:
    """Run the checks and print them; return 3 if one failed, else 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, text on stderr")
    as_json = parser.parse_args().json
    stream = sys.stderr if as_json else sys.stdout
    find_docker_py(ROOT)
    host, made = read_host(ROOT), []
    print("check_docker: this host, for docker compose run --rm train-h100", file=stream)
    for result in results(host):
        print(in_lines(result, stream.isatty() and "NO_COLOR" not in os.environ), file=stream, flush=True)
        made.append(result)
    count = Counter(result["status"] for result in made)
    warnings = f"{count['warn']} warning{'' if count['warn'] == 1 else 's'}"
    then = f"fix the failed checks, then run: {AGAIN}" if count["fail"] else "next: docker compose run --rm validate"
    print(f"{count['pass']} passed, {warnings}, {count['fail']} failed, {count['skip']} skipped; {then}", file=stream)
    if as_json:
        worst = next((status for status in ("fail", "warn") if count[status]), "pass")
        document = {"schema_version": 1, "status": worst, "checks": made, "environment": environment(host)}
        print(json.dumps(document, indent=2, ensure_ascii=False))
    return 3 if count["fail"] else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of stdout left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
