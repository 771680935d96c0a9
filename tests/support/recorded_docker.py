"""A Docker host that is ready for train-h100, what engines answer to /info, and an engine that says what it is told.

The answers are shortened. That of 20.10 was recorded; the others were put together from the fields that Docker names.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from threading import Thread
from typing import Any

from finetune.machine.docker_host import Disk, DockerHost, Engine, Place, Settings
from finetune.machine.docker_image import Image
from support.recorded import H100

FOLDERS = tuple(
    Place(name, 0o040755, 1000, 1000)
    for name in ("data", "configs", "models", "adapters", "adapters/mistral-7b-qlora-h100")
)
READY = DockerHost(
    machine=replace(H100, container=False),
    engine=Engine("28.2.2", "1.50", "Ubuntu 22.04.5 LTS", "/var/lib/docker", runtimes=("nvidia", "runc")),
    settings=Settings(uid="1000", gid="1000"),
    user=1000,
    in_group=True,
    compose="2.36.2",
    buildx="0.24.0",
    hook=True,
    folders=FOLDERS,
    image=Image(14.2, "h100", "build"),
    image_disk=Disk("/var/lib/docker", 412.3, 66),
    volume_disk=Disk("/var/lib/docker", 412.3, 66),
)

INFO_20 = {
    "ServerVersion": "20.10.24+dfsg1",
    "OperatingSystem": "Debian GNU/Linux 12 (bookworm)",
    "DockerRootDir": "/var/lib/docker",
    "Driver": "overlay2",
    "DriverStatus": [["Backing Filesystem", "extfs"], ["Supports d_type", "true"]],
    "Runtimes": {"io.containerd.runc.v2": {"path": "runc"}, "runc": {"path": "runc"}},
    "SecurityOptions": ["name=seccomp,profile=default"],
}
INFO_NVIDIA = {
    **INFO_20,
    "ServerVersion": "28.2.2",
    "OperatingSystem": "Ubuntu 22.04.5 LTS",
    "Runtimes": {"nvidia": {"path": "nvidia-container-runtime"}, "runc": {"path": "runc"}},
    "SecurityOptions": ["name=apparmor", "name=seccomp,profile=builtin", "name=cgroupns"],
}
INFO_CDI = {
    **INFO_NVIDIA,
    "ServerVersion": "29.0.1",
    "DriverStatus": [["driver-type", "io.containerd.snapshotter.v1"]],
    "Runtimes": {"runc": {"path": "runc"}},
    "DiscoveredDevices": [{"Source": "cdi", "ID": "nvidia.com/gpu=0"}, {"Source": "cdi", "ID": "nvidia.com/gpu=all"}],
}
INFO_ROOTLESS = {
    **INFO_20,
    "ServerVersion": "28.2.2",
    "DockerRootDir": "/home/trainer/.local/share/docker",
    "SecurityOptions": ["name=seccomp,profile=builtin", "name=rootless", "name=cgroupns"],
}
INFO_BARE = {
    "ServerVersion": "24.0.0-rc.1", "OperatingSystem": "Alpine", "DockerRootDir": "/data", "SecurityOptions": None,
    "DriverStatus": None, "Runtimes": None,
}  # fmt: skip


def archive(files: dict[str, bytes], name: str) -> bytes | None:
    """What an engine sends of /app/`name`: a tar whose paths begin with the last part of it; None: it is not there."""
    below = {path: content for path, content in files.items() if path == name or path.startswith(f"{name}/")}
    parent = name.rpartition("/")[0]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for path, content in below.items():
            member = tarfile.TarInfo(path.removeprefix(f"{parent}/") if parent else path)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue() if below else None


class Answers(BaseHTTPRequestHandler):
    """The few addresses that check_docker asks; each request is noted."""

    server: FakeEngine
    protocol_version = "HTTP/1.1"

    def address_string(self) -> str:
        return "socket"

    def log_message(self, format: str, *arguments: object) -> None:
        self.server.requests.append(self.requestline.removesuffix(" HTTP/1.1"))

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def answer_json(self, document: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(document).encode(), Content_Type="application/json")

    def do_GET(self) -> None:
        engine, path = self.server, self.path.partition("?")[0]
        if path.endswith("/version"):
            self.answer_json({"ApiVersion": "1.41"})
        elif path.endswith("/info"):
            self.answer_json(engine.info, engine.info_status)
        elif "/images/" in path and engine.image is not None:
            self.answer_json({"Id": "sha256:1", **engine.image})
        elif path.endswith("/containers/1/json"):
            self.answer_json({"Id": "1"})
        elif path.endswith("/archive"):
            content = archive(engine.files, self.path.partition("?path=")[2].replace("%2F", "/").removeprefix("/app/"))
            if content is None:
                self.answer_json({"message": "Could not find the file in container 1"}, 404)
            else:
                self.answer(200, content, X_Docker_Container_Path_Stat="e30=")  # {}
        else:
            self.answer_json({"message": "No such image"}, 404)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.full:
            self.answer_json({"message": "no space left on device"}, 500)
        else:
            self.answer_json({"Id": "1", "Warnings": []}, 201)

    def do_DELETE(self) -> None:
        self.answer(204)


class FakeEngine(ThreadingMixIn, UnixStreamServer):
    """An engine on a socket: `info` is what it is, `image` what it holds, `files` what lies in the image's /app."""

    daemon_threads = True

    def __init__(self, socket: Path) -> None:
        super().__init__(str(socket), Answers)
        self.address = f"unix://{socket}"
        self.info: dict[str, Any] = INFO_NVIDIA
        self.info_status = 200
        self.image: dict[str, Any] | None = None
        self.files: dict[str, bytes] = {}
        self.full = False
        self.requests: list[str] = []

    def hold(self, files: dict[str, bytes], lock: str = "h100", flash_attn: str = "build") -> None:
        """Have an image with these files in /app."""
        labels = {"flash-attn": flash_attn}
        self.image = {"Size": 3 * 2**30, "Config": {"Env": ["PATH=/bin", f"IMAGE_LOCK={lock}"], "Labels": labels}}
        self.files = files


@contextmanager
def fake_engine(socket: Path) -> Iterator[FakeEngine]:
    """An engine that answers at `socket` for as long as this lasts."""
    engine = FakeEngine(socket)
    thread = Thread(target=engine.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield engine
    engine.shutdown()
    engine.server_close()
