"""What this host's Docker engine, Compose, the service train-h100 and its image are; read by asking, starting nothing.

Everything is read once into a `DockerHost`, so that the checks can be tested on recorded ones.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from finetune.errors import CheckFailed
from finetune.files import GIB, ROOT
from finetune.machine.docker_image import Image, read_image
from finetune.machine.inspect import ANSWER_SECONDS, Machine, read_machine
from finetune.wording import first_line

SERVICE = "train-h100"
LOCAL = "http+docker://localhost"  # docker-py's name for every engine that is reached by a socket


@dataclass(frozen=True)
class Unreachable:
    """Why no engine answers: nothing is installed, it does not run, this user may not ask it, or `text`."""

    why: Literal["absent", "stopped", "denied", "other"]
    text: str = ""


@dataclass(frozen=True)
class Engine:
    """An engine that answers. `address` is where, empty for a socket of this machine.

    `cdi_devices` are those that it found by itself (newer ones report them); `folders` are where it keeps volumes and
    images. With `rootless` or `remapped`, a container's user ids are others on this machine.
    """

    version: str
    api: str
    system: str
    folders: tuple[str, ...]
    address: str = ""
    runtimes: tuple[str, ...] = ()
    cdi_devices: tuple[str, ...] = ()
    rootless: bool = False
    remapped: bool = False


@dataclass(frozen=True)
class Place:
    """A path that a container gets: mode, owner and group as stat has them; `mode` is None where nothing is there."""

    name: str
    mode: int | None = None
    uid: int = 0
    gid: int = 0
    writable: bool = False


@dataclass(frozen=True)
class Service:
    """train-h100 as Compose resolves it from compose.yaml, `.env` and the shell.

    `user` is UID:GID; `folders` are those bound, and those of the runs in them; `tokens` are the files named by the
    variables HF_TOKEN_FILE and WANDB_API_KEY_FILE. What the files hold is not read.
    """

    image: str
    lock: str
    user: str
    folders: tuple[Place, ...] = ()
    tokens: dict[str, Place] = field(default_factory=dict)


@dataclass(frozen=True)
class Disk:
    """The free space of `folder`, the fullest of those where the engine keeps its data."""

    folder: str
    free_gib: float


@dataclass(frozen=True)
class DockerHost:
    """One host. `service` is a text where Compose refuses compose.yaml or `.env`: its reason.

    `compose` and `buildx` are versions, None where they do not answer. `hook` says that nvidia-container-runtime-hook
    is installed.
    """

    machine: Machine
    engine: Engine | Unreachable
    service: Service | str
    compose: str | None = None
    buildx: str | None = None
    hook: bool = False
    image: Image | None = None
    disk: Disk | None = None


def read_docker_host(root: Path = ROOT) -> DockerHost:
    """Read this host and the project in `root`. Raises CheckFailed where docker-py is not installed."""
    if importlib.util.find_spec("docker") is None:
        found = f"not installed for {sys.executable}: docker"
        raise CheckFailed(found, "type: scripts/make_venv.sh, then run this with .venv/bin/python", between="\n")
    host = DockerHost(
        machine=read_machine(),
        engine=Unreachable("absent"),
        service=read_service(root),
        compose=_version("docker", "compose", "version", "--short"),
        buildx=_version("docker", "buildx", "version"),
        hook=shutil.which("nvidia-container-runtime-hook") is not None,
    )
    return replace(host, **_engine_facts(root, host.service))


# Docker's commands ----------------------------------------------------------------------------------------------------


def _ask(*command: str, folder: Path | None = None) -> tuple[bool, str, str]:
    """(whether it succeeded, its stdout, its stderr) of a command that may be absent or hang."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=ANSWER_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return False, "", str(error)
    text, problem = (stream.decode(errors="replace").strip() for stream in (done.stdout, done.stderr))
    return done.returncode == 0, text, problem


def _version(*command: str) -> str | None:
    """The first number with a dot that `command` prints."""
    well, text, _ = _ask(*command)
    found = re.search(r"\d+(\.\d+)+", text) if well else None
    return found[0] if found else None


def read_service(root: Path) -> Service | str:
    """The service as Compose resolves it in the folder `root`, or why Compose refuses.

    Of a mistake in `.env` only the line's number: Compose quotes the line, which may hold a token.
    """
    well, text, problem = _ask("docker", "compose", "--profile", "program", "config", "--format", "json", folder=root)
    if well:
        return service_of(json.loads(text), root)
    if re.search("failed to read|unexpected character|unterminated", problem):
        line = re.search(r"\bline \d+", problem)
        return f".env cannot be read{f', {line[0]}' if line else ''}"
    return next((line for line in reversed(problem.splitlines()) if line.strip()), "no reason given")


def service_of(document: dict[str, Any], root: Path) -> Service:
    """What `document`, the answer of `docker compose config`, says of the service; paths are looked at from `root`."""
    found = document["services"][SERVICE]
    binds = [it for it in found["volumes"] if it["type"] == "bind"]
    folders = [_place(it["source"], root, writable=not it.get("read_only")) for it in binds]
    runs = [run for folder in folders if folder.writable for run in _folders_in(folder, root)]
    files = {f"{name.upper()}_FILE": it["file"] for name, it in document["secrets"].items() if it["file"] != os.devnull}
    return Service(
        image=found["image"],
        lock=found["build"]["args"]["LOCK"],
        user=found["user"],
        folders=(*folders, *runs),
        tokens={name: _place(path, root) for name, path in files.items()},
    )


def _folders_in(place: Place, root: Path) -> Iterator[Place]:
    path = root / place.name
    if is_folder(place) and os.access(path, os.R_OK | os.X_OK):
        yield from (_place(str(it), root, writable=True) for it in sorted(path.iterdir()) if it.is_dir())


def _place(source: str, root: Path, writable: bool = False) -> Place:
    """`source` by its path from `root` where it is in there."""
    path = Path(source)
    name = str(path.relative_to(root)) if path.is_relative_to(root) else source
    try:
        found = path.stat()
    except OSError:  # not there, or in a folder that is closed
        return Place(name, writable=writable)
    return Place(name, found.st_mode, found.st_uid, found.st_gid, writable)


# The engine -----------------------------------------------------------------------------------------------------------


def _engine_facts(root: Path, service: Service | str) -> dict[str, Any]:
    """The fields of DockerHost that an engine gives."""
    import docker
    from docker.errors import DockerException
    from requests.exceptions import RequestException

    try:
        # As the docker command does, it takes DOCKER_HOST, then the current context.
        client = docker.from_env(timeout=ANSWER_SECONDS)
    except (DockerException, RequestException) as error:
        return {"engine": _unreachable(error)}
    try:
        engine = engine_of(client.info(), client.api.api_version, client.api.base_url)
        image = None if isinstance(service, str) else read_image(client, root, service.image, service.lock)
        return {"engine": engine, "image": image, "disk": _disk(engine)}
    except (DockerException, RequestException) as error:
        return {"engine": Unreachable("other", first_line(error))}
    finally:
        client.close()


def _unreachable(error: BaseException) -> Unreachable:
    """docker-py tells the reason in words only; the system's own error is at the end of what led to it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, PermissionError):
            return Unreachable("denied")
        if isinstance(cause, FileNotFoundError | ConnectionRefusedError):
            return Unreachable("stopped" if shutil.which("docker") else "absent")
        cause = cause.__cause__ or cause.__context__
    return Unreachable("other", first_line(error))


def engine_of(info: dict[str, Any], api: str, base_url: str) -> Engine:
    """What `info`, the engine's answer to `docker info`, says; engines leave out what they do not know."""
    options = {option.split(",")[0].removeprefix("name=") for option in info.get("SecurityOptions") or ()}
    store = dict(row[:2] for row in info.get("DriverStatus") or ())
    containerd = store.get("driver-type", "").startswith("io.containerd.snapshotter")
    return Engine(
        version=info["ServerVersion"],
        api=api,
        system=info["OperatingSystem"],
        folders=(info["DockerRootDir"], *(["/var/lib/containerd"] if containerd else [])),
        address="" if base_url == LOCAL else base_url,
        runtimes=tuple(sorted(info.get("Runtimes") or ())),
        cdi_devices=tuple(device["ID"] for device in info.get("DiscoveredDevices") or ()),
        rootless="rootless" in options,
        remapped="userns" in options,
    )


def _disk(engine: Engine) -> Disk | None:
    """None where it cannot be seen from here, as with an engine in a virtual machine or on another one."""
    if engine.address:
        return None
    try:
        disks = [Disk(folder, shutil.disk_usage(folder).free / GIB) for folder in engine.folders]
    except OSError:
        return None
    return min(disks, key=lambda disk: disk.free_gib)


def is_folder(place: Place) -> bool:
    """Whether a folder is there, and nothing else of that name."""
    return place.mode is not None and stat.S_ISDIR(place.mode)


def allows(place: Place, uid: int, gid: int, bits: int) -> bool:
    """Whether `bits` of the mode (4 read, 2 write, 1 enter) are given to a user without any capability, root included.

    compose.yaml drops all capabilities, so root in the container may not pass by modes. Access lists are not seen.
    """
    shift = 6 if place.uid == uid else 3 if place.gid == gid else 0
    return place.mode is not None and (place.mode >> shift) & bits == bits
