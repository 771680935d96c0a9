#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["docker==7.2.0"]
# ///
"""Is this Docker host able to run `docker compose run --rm train-h100`? What was found, and what to type.

It runs where nothing is installed: all it needs is Python 3.10 and docker-py, which it fetches for itself once. So it
imports nothing of the package, which needs Python 3.11 and its libraries. It starts no container.
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
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parents[1]
LOCK = "requirements/h100.lock"
# docker-py and what it needs, whose versions and hashes are in the lock; and the folder that they are fetched into.
DOCKER_PY = ("docker", "requests", "urllib3", "certifi", "idna", "charset-normalizer")
FETCHED = ".venv-docker"
ANSWER_SECONDS = 20
GIB = 2**30

OLDEST_DRIVER = 525  # the first that runs CUDA 12
OLDEST_ENGINE = "20.10"  # older ones were not tried
# Tried was 2.26. The youngest word of compose.yaml and its tests is `!reset`, of 2.18; what lies between is expected.
OLDEST_COMPOSE = "2.20"
IMAGE_GIB = 40  # an expectation: the image, its stages and uv's cache, which the engine keeps beside it
BASE_GIB = 13.5  # three safetensors files of 14.5 GB together

AGAIN = "./scripts/check_docker.py"
BUILD = "docker compose build"
DRIVER = "sudo apt install nvidia-driver-570-server, then restart"
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
IDS = "(echo; id -u | sed s/^/UID=/; id -g | sed s/^/GID=/) >> .env"  # the last line of a name counts, all else stays


# What is known of a host ----------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A file or folder that a container gets, as stat has it; `mode` is 0 where nothing is there."""

    name: str
    writable: bool = False
    mode: int = 0
    uid: int = 0
    gid: int = 0


class Image(NamedTuple):
    """The image of train-h100 and its labels."""

    gib: float
    lock: str
    flash_attn: str


class Host(NamedTuple):
    """A Docker host and the project on it, read once, so that the checks can be tried on recorded ones.

    `engine` is its answer to /info with its Api and Address (empty for a socket of this machine), or why there is
    none: absent, stopped, denied or docker-py's words. `project` is what `docker compose config` resolves, or why it
    refuses; `folders` are those bound and the runs in them, `tokens` the files with keys by the variables that name
    them. `hook` says that nvidia-container-runtime-hook is installed. `disk` is the fullest of the engine's folders
    with its free GiB, None where it cannot be seen from here.
    """

    machine: dict[str, Any]  # system, release, architecture, container, driver, gpus
    engine: dict[str, Any] | str
    project: dict[str, Any] | str
    compose: str | None = None
    buildx: str | None = None
    hook: bool = False
    folders: tuple[Place, ...] = ()
    tokens: dict[str, Place] = {}  # noqa: RUF012  # of a tuple, which nothing changes
    image: Image | None = None
    disk: tuple[str, float] | None = None

    @property
    def service(self) -> dict[str, Any]:
        """train-h100 as Compose resolves it, for checks that need docker.config."""
        assert isinstance(self.project, dict)
        return dict(self.project["services"]["train-h100"])


def read_host(root: Path) -> Host:
    """This host, and the project in `root`; nothing is started."""
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
    """The operating system, and the NVIDIA driver by its own tool."""
    told = ask("nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader").stdout
    gpus = re.findall(r"^([\d.]+), *(.+)$", told, re.MULTILINE)
    return {
        "system": platform.system(),
        "release": platform.mac_ver()[0] or platform.release(),
        "architecture": platform.machine(),
        "container": Path("/.dockerenv").exists() or Path("/run/.containerenv").exists(),
        "driver": gpus[0][0] if gpus else None,
        "gpus": [name for _, name in gpus],
    }


def ask(*command: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """What a command says that may be absent or hang."""
    options: dict[str, Any] = {"capture_output": True, "text": True, "errors": "replace", "check": False}
    try:
        return subprocess.run(command, cwd=folder, timeout=ANSWER_SECONDS, **options)
    except (OSError, subprocess.SubprocessError) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def version(*command: str) -> str | None:
    """The first number with a dot that `command` prints."""
    done = ask(*command)
    found = re.search(r"\d+(\.\d+)+", done.stdout)
    return found[0] if found and not done.returncode else None


def read_project(root: Path) -> dict[str, Any] | str:
    """The project in `root` as Compose resolves it from compose.yaml, `.env` and the shell, or why it refuses.

    Of a mistake in `.env` only the line's number: Compose quotes the line, which may hold a token.
    """
    done = ask("docker", "compose", "--profile", "program", "config", "--format", "json", folder=root)
    if not done.returncode:
        return dict(json.loads(done.stdout))
    if re.search("failed to read|unexpected character|unterminated", done.stderr):
        line = re.search(r"\bline \d+", done.stderr)
        return f".env cannot be read{f', {line[0]}' if line else ''}"
    return next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no reason given")


def read_folders(service: dict[str, Any], root: Path) -> Iterator[Place]:
    """The folders that `service` binds, and those in a folder that it writes: its runs."""
    for bind in service["volumes"]:
        if bind["type"] == "bind":
            folder, writable = Path(bind["source"]), not bind.get("read_only")
            yield place(folder, root, writable)
            if writable and os.access(folder, os.R_OK | os.X_OK):
                yield from (place(run, root, writable) for run in sorted(folder.iterdir()) if run.is_dir())


def place(path: Path, root: Path, writable: bool = False) -> Place:
    """`path`, by its name from `root` where it is in there."""
    name = str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
    try:
        found = path.stat()
    except OSError:  # not there, or in a folder that is closed
        return Place(name, writable)
    return Place(name, writable, found.st_mode, found.st_uid, found.st_gid)


def ask_engine(host: Host) -> dict[str, Any]:
    """The fields of Host that an engine gives."""
    import docker
    from docker.errors import DockerException
    from requests.exceptions import RequestException

    try:
        # As the docker command does, it takes DOCKER_HOST, then the current context.
        with closing(docker.from_env(timeout=ANSWER_SECONDS)) as client:
            url = client.api.base_url
            address = "" if url == "http+docker://localhost" else url  # docker-py's name for every socket
            engine = {**client.info(), "Api": client.api.api_version, "Address": address}
            image = read_image(client, host.service["image"]) if isinstance(host.project, dict) else None
            return {"engine": engine, "image": image, "disk": fullest(engine)}
    except (DockerException, RequestException) as error:
        return {"engine": silence(error)}


def silence(error: BaseException) -> str:
    """Why no engine answers. docker-py says it in words; the system's own error is at the end of what led to it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, PermissionError):
            return "denied"
        if isinstance(cause, (FileNotFoundError, ConnectionRefusedError)):
            return "stopped" if shutil.which("docker") else "absent"
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0]


def fullest(engine: dict[str, Any]) -> tuple[str, float] | None:
    """The folder of the engine's data with the least free GiB; None for one elsewhere or in a virtual machine."""
    folders = [engine["DockerRootDir"]]
    if dict(row[:2] for row in engine.get("DriverStatus") or ()).get("driver-type", "").startswith("io.containerd."):
        folders.append("/var/lib/containerd")
    try:
        free = [(shutil.disk_usage(folder).free / GIB, folder) for folder in folders if not engine["Address"]]
    except OSError:
        return None
    return (min(free)[1], min(free)[0]) if free else None


def read_image(client: Any, name: str) -> Image | None:
    """The image called `name`; None if there is none."""
    from docker.errors import ImageNotFound

    try:
        image = client.images.get(name)
    except ImageNotFound:
        return None
    labels = image.attrs["Config"].get("Labels") or {}
    return Image(image.attrs["Size"] / GIB, labels.get("lock", ""), labels.get("flash-attn", ""))


# Checks: each returns its status, what it found, and where something is wrong what to type ---------------------------

Finding = tuple[str, str, str]


def passed(detail: str) -> Finding:
    """As it should be."""
    return "pass", detail, ""


def number(text: str) -> tuple[int, ...]:
    """Major and minor of a version."""
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


def check_host(host: Host) -> Finding:
    system, release, architecture = (host.machine[name] for name in ("system", "release", "architecture"))
    found = f"{'macOS' if system == 'Darwin' else system} {release} on {architecture}"
    if system == "Darwin":
        return "fail", f"{found}; a container on a Mac reaches no GPU", "./scripts/setup_m4.sh, which needs no Docker"
    if system != "Linux":
        return "fail", f"{found}; train-h100 needs Linux", "rent a Linux machine with an H100"
    if architecture != "x86_64":
        return "warn", f"{found}; {LOCK} was resolved for x86_64", "rent an x86_64 machine"
    if host.machine["container"]:
        return "warn", f"{found}, in a container: folders and driver seen here are its own", "run this on the host"
    return passed(found)


def check_driver(host: Host) -> Finding:
    driver = host.machine["driver"]
    if driver is None:
        return "fail", "nvidia-smi is missing or does not answer: no working NVIDIA driver", DRIVER
    if number(driver) < (OLDEST_DRIVER,):
        return "fail", f"driver {driver}; CUDA 12 needs {OLDEST_DRIVER} or newer", DRIVER
    return passed(f"driver {driver}")


def check_device(host: Host) -> Finding:
    gpu, *others = host.machine["gpus"]
    found = f"{gpu} (the first of {len(others) + 1})" if others else gpu
    if "H100" in gpu:
        return passed(found)
    other = "nvidia-smi --query-gpu=compute_cap --format=csv says whether it is 9.0, which flash-attn is built for"
    fix = f"{other}; if not: {BUILD} --build-arg FLASH_ATTN_CUDA_ARCHS=80, for 8.0"
    return "warn", f"{found}, an NVIDIA GPU but not an H100: hours and memory differ", fix


def check_engine(host: Host) -> Finding:
    if isinstance(host.engine, str):
        return no_engine(host.engine, mac=host.machine["system"] == "Darwin")
    found = "Docker {ServerVersion} (API {Api}) on {OperatingSystem}".format(**host.engine)
    if host.engine["Address"]:
        there = f"{found} at {host.engine['Address']}, another machine, which does not see these folders"
        return "fail", there, "unset DOCKER_HOST; docker context use default; or run this there"
    if number(host.engine["ServerVersion"]) < number(OLDEST_ENGINE):
        return "fail", f"{found}, expected {OLDEST_ENGINE} or newer", f"on Ubuntu: {INSTALL}"
    if "rootless" in options(host):
        text = f"{found}, rootless, which was not tried: a GPU there needs no-cgroups, and memlock may not be raised"
        group = "sudo nvidia-ctk config --set nvidia-container-cli.no-cgroups --in-place"
        return "warn", text, f"{group}; take the ulimits out of compose.yaml"
    return passed(found)


def no_engine(why: str, mac: bool) -> Finding:
    """`why` is Host.engine where no engine answers."""
    group = "sudo usermod -aG docker $USER, then log in again (newgrp docker)"
    detail, fix = {
        "absent": ("Docker is not installed", "brew install --cask docker" if mac else f"on Ubuntu: {INSTALL}"),
        "stopped": ("Docker's engine does not run", "open -a Docker" if mac else "sudo systemctl start docker"),
        "denied": ("permission denied: your user may not use the Docker engine", group),
    }.get(why, (f"Docker's engine does not answer: {why}", "docker info; docker context ls; echo $DOCKER_HOST"))
    return "fail", detail, fix


def options(host: Host) -> set[str]:
    """Names of the engine's security options; none where it does not answer."""
    told = host.engine.get("SecurityOptions") if isinstance(host.engine, dict) else ()
    return {option.split(",")[0].replace("name=", "", 1) for option in told or ()}


def check_compose(host: Host) -> Finding:
    fix = "on Ubuntu: sudo apt-get install -y docker-compose-plugin, or docker-compose-v2 beside Ubuntu's own docker.io"
    if host.compose is None:
        return "fail", "docker compose does not answer", fix
    if number(host.compose) < number(OLDEST_COMPOSE):
        return "fail", f"Compose {host.compose}, expected {OLDEST_COMPOSE} or newer", fix
    return passed(f"Compose {host.compose}")


def check_buildx(host: Host) -> Finding:
    if host.buildx is None:
        fix = "on Ubuntu: sudo apt-get install -y docker-buildx-plugin, or docker-buildx beside Ubuntu's own docker.io"
        return "warn", "docker buildx does not answer; newer versions of Compose build by it", fix
    return passed(f"Buildx {host.buildx}")


def check_gpu(host: Host) -> Finding:
    """The engine makes its driver "nvidia" from a hook on its PATH when it starts (moby, daemon/nvidia_linux.go)."""
    assert isinstance(host.engine, dict)  # needs docker.engine
    if "nvidia" in (host.engine.get("Runtimes") or ()):
        if host.hook:
            return passed("runtime nvidia, with its hook")
        text = "runtime nvidia, but no nvidia-container-runtime-hook on this PATH, by which the engine starts a GPU"
        return "warn", text, TOOLKIT
    devices = [device["ID"] for device in host.engine.get("DiscoveredDevices") or ()]
    ours = ", ".join(device for device in devices if device.startswith("nvidia.com/gpu"))
    if ours:  # engines with moby#50228 start compose.yaml's GPU by these, older ones by the hook only
        text = f"no runtime nvidia, but CDI devices: {ours}; whether this engine starts a GPU by them was not tried"
        return "warn", text, TOOLKIT
    if host.engine["DockerRootDir"].startswith("/var/snap/"):
        text = "the engine is Ubuntu's snap, which nvidia-ctk does not configure, and has no runtime nvidia"
        return "fail", text, f"sudo snap remove docker (its images and volumes go), then {INSTALL}, then {TOOLKIT}"
    if host.hook:
        text = "the toolkit is installed, but the engine has no runtime nvidia: not configured, or not restarted"
        return "fail", text, CONFIGURE
    text = 'the engine has no runtime nvidia and no CDI device: could not select device driver "nvidia"'
    return "fail", text, TOOLKIT


def check_config(host: Host) -> Finding:
    if isinstance(host.project, str):
        return "fail", f"Compose refuses compose.yaml or .env: {host.project}", "docker compose config --quiet"
    user = host.service["user"]
    if not re.fullmatch(r"\d+:\d+", user):
        return "fail", f"UID:GID is {user!r} in .env, expected numbers", IDS
    return passed(f"user {'{}:{}'.format(*ids(host))}, image {host.service['image']}")


def ids(host: Host) -> tuple[int, ...]:
    """User and group as whom the container trains: what starts as root becomes the owner of adapters."""
    uid, gid = map(int, host.service["user"].split(":"))
    adapters = next((folder for folder in host.folders if folder.writable), Place(""))
    return (uid, gid) if uid else (adapters.uid, adapters.gid)


def closed(host: Host, places: Iterable[Place], bits: int) -> list[Place]:
    """Those whose mode denies `bits` (4 read, 2 write, 1 enter) to the container's user. Access lists are not seen.

    Root passes by no mode, for it has no capability there. In an engine that is rootless or has userns-remap the
    container's ids are others here, so modes decide nothing.
    """
    uid, gid = ids(host)
    shifts = {it: 6 if it.uid == uid else 3 if it.gid == gid else 0 for it in places}
    return [it for it, shift in shifts.items() if it.mode >> shift & bits != bits and not remapped(host)]


def remapped(host: Host) -> bool:
    """Whether a container's user is another on this machine."""
    return bool(options(host) & {"rootless", "userns"})


def names(places: Iterable[Place], between: str = " ") -> str:
    """The names of `places`."""
    return between.join(place.name for place in places)


def listed(places: Iterable[Place]) -> str:
    """Each of `places` with its mode and owner."""
    return ", ".join(f"{it.name} ({stat.filemode(it.mode)} {it.uid}:{it.gid})" for it in places)


def check_secrets(host: Host) -> Finding:
    absent = [name for name, token in host.tokens.items() if not stat.S_ISREG(token.mode)]
    if absent:  # without the path: somebody may have put the token itself there
        fix = "hf auth login makes ~/.cache/huggingface/token; correct .env"
        return "fail", f"{' and '.join(absent)} in .env: no such file", fix
    unreadable = closed(host, host.tokens.values(), 4)
    if unreadable:
        uid, paths = ids(host)[0], names(unreadable)
        return "fail", f"UID {uid} cannot read {listed(unreadable)}", f"sudo chown {uid} {paths} && chmod 600 {paths}"
    return passed(f"tokens from {names(host.tokens.values(), ', ')}" if host.tokens else "no token file is named")


def check_binds(host: Host) -> Finding:
    """Compose is told to refuse folders that are not there; newer ones are reported to make them (compose#13602)."""
    absent = [folder for folder in host.folders if not stat.S_ISDIR(folder.mode)]
    if absent:
        return "fail", f"no such folder: {names(absent, ', ')}", f"mkdir -p {names(absent)}"
    if remapped(host):
        return "skip", "there; in this engine a container's UID is another here, so modes decide nothing", ""
    (uid, gid), written = ids(host), [folder for folder in host.folders if folder.writable]
    unwritable, unreadable = closed(host, written, 7), closed(host, host.folders, 5)
    if unwritable:
        fix = f"sudo chown -R {uid}:{gid} {names(unwritable)}; if {uid} is not you: {IDS}"
        return "fail", f"UID {uid}, GID {gid} cannot write {listed(unwritable)}", fix
    if unreadable:
        return "fail", f"UID {uid}, GID {gid} cannot read {listed(unreadable)}", f"chmod -R a+rX {names(unreadable)}"
    read = names((folder for folder in host.folders if not folder.writable), ", ")
    return passed(f"UID {uid} reads {read} and writes {written[0].name}")


def check_image(host: Host) -> Finding:
    lock, name, image = host.service["build"]["args"]["LOCK"], host.service["image"], host.image
    if lock != "h100":
        return "fail", f"LOCK is {lock}, and train-h100 needs h100", f"echo LOCK=h100 >> .env && {BUILD}"
    if image is None:
        return "fail", f"no image {name}", BUILD
    found = f"{name}, {image.gib:.1f} GiB"
    if image.lock != lock:
        return "fail", f"{found}, has the libraries of lock {image.lock or 'none'}", BUILD
    return passed(f"{found}, with the libraries of {LOCK}")


def check_flash_attention(host: Host) -> Finding:
    assert host.image is not None  # needs docker.image
    if host.image.flash_attn in ("", "skip"):
        without = "or do without: docker compose run --rm train-h100 --set model.attn_implementation=torch_varlen"
        return "warn", "the image has no flash-attn", f"echo FLASH_ATTN=build >> .env && {BUILD}; {without}"
    return passed("flash-attn is in the image")


def check_disk(host: Host) -> Finding:
    """Against expectations. The base may be in the cache volume already, which only root can see."""
    if host.disk is None:
        return "skip", "the disk of the engine's data cannot be seen from here", ""
    folder, free_gib = host.disk
    image_gib = 0 if host.image else IMAGE_GIB
    needs = f"{f'{image_gib} for the image, ' if image_gib else ''}{BASE_GIB:g} for the base"
    found = f"{free_gib:.1f} GiB free in {folder}, expected to be needed: {needs}"
    if free_gib >= image_gib + BASE_GIB:
        return passed(found)
    fix = "docker system df shows what uses it; docker image prune; or another data-root in /etc/docker/daemon.json"
    return "warn", f"{found}, unless the cache volume has it" if host.image else found, fix


CHECKS = {  # id: what looks, and the checks without whose success it means nothing
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


# The command ----------------------------------------------------------------------------------------------------------

WORDS = {"pass": ("pass", 32), "warn": ("WARN", 33), "fail": ("FAIL", 31), "skip": ("skip", 2)}  # and their colors


def results(host: Host) -> Iterator[dict[str, Any]]:
    """Each check's result in order, as `--json` has it; one that crashes is one finding, not the end."""
    without: set[str] = set()
    for name, (look, needs) in CHECKS.items():
        started = time.perf_counter()
        missing = [other for other in needs if other in without]
        try:
            status, detail, fix = ("skip", f"needs {missing[0]}", "") if missing else look(host)
        except Exception as error:  # noqa: BLE001  # a bug in one check must not hide what the others find
            status, detail, fix = "fail", f"this check crashed: {type(error).__name__}: {error}", "report it"
        if status in ("fail", "skip"):
            without.add(name)
        seconds = round(time.perf_counter() - started, 3)
        yield {"id": name, "status": status, "detail": detail, "fix": fix, "seconds": seconds}


def in_lines(result: dict[str, Any], color: bool) -> str:
    """A result for the terminal; control characters in what others said are escaped."""
    word, code = WORDS[result["status"]]
    word, arrow = (f"\033[{code}m{text}\033[0m" if color else text for text in (word, "->"))
    text = f"  {word}  {result['id']:<24} {escaped(result['detail'])}"
    return f"{text}\n{'':<33}{arrow} {escaped(result['fix'])}" if result["fix"] else text


def escaped(text: str) -> str:
    """`text` without control characters."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def main() -> int:
    """Make the checks and print them: 3 where one failed, else 0."""
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


def environment(host: Host) -> dict[str, Any]:
    """The machine, and the versions of what was asked; None where it does not answer."""
    engine = host.engine if isinstance(host.engine, dict) else {}
    versions = {"engine": engine.get("ServerVersion"), "api": engine.get("Api")}
    return {"machine": host.machine, "versions": {**versions, "compose": host.compose, "buildx": host.buildx}}


def find_docker_py(root: Path) -> None:
    """Put docker-py on the path: this Python's own, or the lock's, fetched once into FETCHED. Else end with 3."""
    lock = (root / LOCK).read_text(encoding="utf-8")
    pins = "".join(re.findall(rf"^(?:{'|'.join(DOCKER_PY)})==[^#]+", lock, re.MULTILINE))
    installed = [it.version for it in metadata.distributions(name="docker")]
    if installed and f"docker=={installed[0]} " in pins:
        return
    folder = root / FETCHED
    whole = folder / "fetched.txt"
    if not whole.is_file() or whole.read_text(encoding="utf-8") != pins:
        try:
            fetch(pins, folder)
        except OSError as error:
            leave(f"{folder}: {error.strerror}", f"sudo chown $(id -u) {root}, then {AGAIN}")
        whole.write_text(pins, encoding="utf-8")
    sys.path.insert(0, str(folder))


def fetch(pins: str, folder: Path) -> None:
    """Install `pins`, by their hashes, into `folder` alone: by uv, by this Python's pip, or by that of a new venv."""
    uv, pip = shutil.which("uv"), importlib.util.find_spec("pip")
    if not (uv or pip or importlib.util.find_spec("ensurepip")):
        found = f"{sys.executable} has no docker-py, and neither uv nor pip nor venv to fetch it"
        leave(found, f"sudo apt-get update && sudo apt-get install -y python3-venv && {AGAIN}")
    print(f"docker-py is fetched once, into {FETCHED}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "wanted.txt").write_text(pins, encoding="utf-8")
    python = sys.executable
    if not (uv or pip):
        python = str(folder / "venv/bin/python")
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    command = [uv, "pip", "install", "--python", python] if uv else [python, "-m", "pip", "install"]
    alone = ["--no-deps", "--require-hashes", "--target", str(folder), "--requirement", str(folder / "wanted.txt")]
    own = {**os.environ, "PIP_USER": "0"}  # a user's setting that goes with no --target
    done = subprocess.run([*command, *alone], capture_output=True, text=True, env=own, check=False)
    if done.returncode:
        found = f"{done.stderr.strip()}\ndocker-py could not be fetched: see above"
        leave(found, f"curl -I https://pypi.org, until it answers; then {AGAIN}")


def leave(found: str, fix: str) -> NoReturn:
    """End with 3, what was found and what to type."""
    print(f"{found}\ntype: {fix}", file=sys.stderr)
    raise SystemExit(3)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
