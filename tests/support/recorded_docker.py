"""A Docker host that is ready for train-h100, and what engines answer to /info.

The answers are shortened. That of 20.10 was recorded; the others were put together from the fields that Docker names.
"""

from __future__ import annotations

from dataclasses import replace

from finetune.machine.docker_host import Disk, DockerHost, Engine, Place, Service
from finetune.machine.docker_image import Image
from support.recorded import H100

FOLDERS = tuple(
    Place(name, 0o040755, 1000, 1000, writable=name.startswith("adapters"))
    for name in ("configs", "data", "models", "adapters", "adapters/mistral-7b-qlora-h100")
)
READY = DockerHost(
    machine=replace(H100, container=False),
    engine=Engine("28.2.2", "1.50", "Ubuntu 22.04.5 LTS", ("/var/lib/docker",), runtimes=("nvidia", "runc")),
    service=Service("mistral-7b-qlora:h100", "h100", "1000:1000", FOLDERS),
    compose="2.36.2",
    buildx="0.24.0",
    hook=True,
    image=Image(14.2, "h100", "build"),
    disk=Disk("/var/lib/docker", 412.3),
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
