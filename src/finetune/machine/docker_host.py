"""What this host's Docker engine, Compose, `.env`, image and bound folders are; read once, by asking, starting nothing.

All of it lands in one `DockerHost`, so that the checks can be shown a recorded one.
"""

from __future__ import annotations

import getpass
import grp
import importlib.util
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

BINDS = ("data", "configs", "models", "adapters")  # what compose.yaml mounts; only the last may be written
SECRETS = ("HF_TOKEN", "WANDB_API_KEY")  # containers get the files that HF_TOKEN_FILE and WANDB_API_KEY_FILE name
LOCAL = "http+docker://localhost"  # docker-py's name for every engine that is reached by a socket


@dataclass(frozen=True)
class Unreachable:
    """Why no engine answers: nothing is installed, it does not run, this user may not ask it, or `text`."""

    why: Literal["absent", "stopped", "denied", "other"]
    text: str = ""


@dataclass(frozen=True)
class Engine:
    """An engine that answers. `address` is where, empty for a socket of this machine.

    `cdi_devices` are those that it found by itself (newer ones tell); `folder` is where it keeps its data.
    `rootless` and `remapped` say that a container's user ids are others on this machine; `containerd`, that images lie
    in containerd's folder instead.
    """

    version: str
    api: str
    system: str
    folder: str
    address: str = ""
    runtimes: tuple[str, ...] = ()
    cdi_devices: tuple[str, ...] = ()
    rootless: bool = False
    remapped: bool = False
    containerd: bool = False


@dataclass(frozen=True)
class Place:
    """What lies at a path: mode, owner and group as stat has them; `mode` is None where nothing is there."""

    name: str
    mode: int | None = None
    uid: int = 0
    gid: int = 0


@dataclass(frozen=True)
class Settings:
    """What `.env`, and the shell before it, give compose.yaml; `problem` is why `.env` cannot be read.

    `token_files` are what the `_FILE` of each of SECRETS names, by that variable; `loose` are those that have a value
    and no file, which no container gets. The values are not kept.
    """

    uid: str = ""
    gid: str = ""
    lock: str = "h100"
    token_files: dict[str, Place] = field(default_factory=dict)
    loose: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Disk:
    """Free space where `folder` lies; `device` tells file systems apart."""

    folder: str
    free_gib: float
    device: int


@dataclass(frozen=True)
class DockerHost:
    """One host. `user` is who asks (before sudo), `in_group` says that the group docker names them.

    `compose` and `buildx` are versions, None where they do not answer; `config_problem` is what Compose has against
    compose.yaml. `hook` says that nvidia-container-runtime-hook is installed.
    """

    machine: Machine
    engine: Engine | Unreachable
    settings: Settings
    user: int
    in_group: bool = False
    compose: str | None = None
    buildx: str | None = None
    config_problem: str = ""
    hook: bool = False
    folders: tuple[Place, ...] = ()
    image: Image | None = None
    image_disk: Disk | None = None
    volume_disk: Disk | None = None


def read_docker_host(root: Path = ROOT) -> DockerHost:
    """Read this host and the project in `root`. Raises CheckFailed where docker-py is not installed."""
    if importlib.util.find_spec("docker") is None:
        found = f"not installed for {sys.executable}: docker"
        raise CheckFailed(found, "type: scripts/make_venv.sh, then run this with .venv/bin/python", between="\n")
    settings = read_settings(root)
    host = DockerHost(
        machine=read_machine(),
        engine=Unreachable("absent"),
        settings=settings,
        user=int(os.environ.get("SUDO_UID", os.getuid())),
        in_group=_in_docker_group(),
        compose=_version("docker", "compose", "version", "--short"),
        buildx=_version("docker", "buildx", "version"),
        config_problem=_config_problem(root),
        hook=shutil.which("nvidia-container-runtime-hook") is not None,
        folders=tuple(read_folders(root)),
    )
    return replace(host, **_engine_facts(root, settings.lock))


# Files here -----------------------------------------------------------------------------------------------------------


def read_settings(root: Path) -> Settings:
    """What compose.yaml gets from `.env` in `root` and from this shell, which Compose asks first."""
    try:
        values = parse_env((root / ".env").read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        return Settings(problem=error.strerror or str(error))
    values.update(os.environ)
    files = {f"{name}_FILE": values.get(f"{name}_FILE", "") for name in SECRETS}
    return Settings(
        uid=values.get("UID", ""),
        gid=values.get("GID", ""),
        lock=values.get("LOCK") or "h100",
        token_files={name: _place(path, root / Path(path).expanduser()) for name, path in files.items() if path},
        loose=tuple(name for name in SECRETS if not files[f"{name}_FILE"] and values.get(name)),
    )


def parse_env(text: str) -> dict[str, str]:
    """Values by name as Compose reads `.env`: the last one counts; quotes and comments are left out."""
    found = {}
    for line in text.splitlines():
        name, equals, value = line.strip().removeprefix("export ").partition("=")
        if equals and not name.startswith("#"):
            quoted = re.match(r"""(["'])(.*?)\1""", value.strip())
            plain = quoted[2] if quoted else re.split(r"\s#", f" {value}")[0].strip()
            found[name.strip()] = plain if quoted and quoted[1] == "'" else os.path.expandvars(plain)
    return found


def read_folders(root: Path) -> Iterator[Place]:
    """What compose.yaml binds, and the folders of the runs that are there."""
    for name in BINDS:
        yield _place(name, root / name)
    adapters = root / "adapters"
    if adapters.is_dir() and os.access(adapters, os.R_OK | os.X_OK):
        yield from (_place(f"adapters/{path.name}", path) for path in sorted(adapters.iterdir()) if path.is_dir())


def _place(name: str, path: Path) -> Place:
    try:
        found = path.stat()
    except OSError:  # not there, or in a folder that is closed
        return Place(name)
    return Place(name, found.st_mode, found.st_uid, found.st_gid)


def _in_docker_group() -> bool:
    """Whether /etc/group puts this user into the group docker, which a session opened before does not know."""
    try:
        return getpass.getuser() in grp.getgrnam("docker").gr_mem
    except (KeyError, OSError):  # no such group, or a user without a name
        return False


# Docker's commands ----------------------------------------------------------------------------------------------------


def _ask(*command: str, folder: Path | None = None) -> tuple[bool, str, str]:
    """(whether it went well, what it printed, its errors) of a command that may not be there or may hang."""
    options: dict[str, Any] = {"capture_output": True, "text": True, "errors": "replace", "timeout": ANSWER_SECONDS}
    try:
        done = subprocess.run(command, cwd=folder, check=False, **options)
    except (OSError, subprocess.SubprocessError) as error:
        return False, "", str(error)
    return done.returncode == 0, done.stdout.strip(), done.stderr.strip()


def _version(*command: str) -> str | None:
    """The first number with a dot that `command` prints."""
    well, text, _ = _ask(*command)
    found = re.search(r"\d+(\.\d+)+", text) if well else None
    return found[0] if found else None


def _config_problem(root: Path) -> str:
    """What Compose has against compose.yaml, nothing where it takes it.

    Of a mistake in `.env` only the line's number: Compose quotes the line, and a token may stand in it.
    """
    well, _, problem = _ask("docker", "compose", "config", "--quiet", folder=root)
    if well:
        return ""
    lines = [line for line in problem.splitlines() if line.strip()]
    text = lines[-1] if lines else "no reason given"
    if re.search("failed to read|unexpected character|unterminated", problem):
        line = re.search(r"\bline \d+", problem)
        return f".env cannot be read{f', {line[0]}' if line else ''}"
    return text


# The engine -----------------------------------------------------------------------------------------------------------


def _engine_facts(root: Path, lock: str) -> dict[str, Any]:
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
        disks = {} if engine.address else _disks(engine)
        return {"engine": engine, "image": read_image(client, root, lock), **disks}
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
    return Engine(
        version=info["ServerVersion"],
        api=api,
        system=info["OperatingSystem"],
        folder=info["DockerRootDir"],
        address="" if base_url == LOCAL else base_url,
        runtimes=tuple(sorted(info.get("Runtimes") or ())),
        cdi_devices=tuple(device["ID"] for device in info.get("DiscoveredDevices") or ()),
        rootless="rootless" in options,
        remapped="userns" in options,
        containerd=store.get("driver-type", "").startswith("io.containerd.snapshotter"),
    )


def _disks(engine: Engine) -> dict[str, Disk | None]:
    """Where the engine keeps images, and volumes."""
    volumes = _disk(engine.folder)
    return {"volume_disk": volumes, "image_disk": _disk("/var/lib/containerd") if engine.containerd else volumes}


def _disk(folder: str) -> Disk | None:
    """None where it cannot be seen from here, as with an engine in a virtual machine."""
    try:
        return Disk(folder, shutil.disk_usage(folder).free / GIB, Path(folder).stat().st_dev)
    except OSError:
        return None


def is_folder(place: Place) -> bool:
    """Whether a folder is there, and nothing else of that name."""
    return place.mode is not None and stat.S_ISDIR(place.mode)


def allows(place: Place, uid: int, gid: int, bits: int) -> bool:
    """Whether `bits` of the mode (4 read, 2 write, 1 enter) are given to a user without any capability, root included.

    compose.yaml drops all capabilities, so root in the container may not pass by modes. Access lists are not seen.
    """
    shift = 6 if place.uid == uid else 3 if place.gid == gid else 0
    return place.mode is not None and (place.mode >> shift) & bits == bits
