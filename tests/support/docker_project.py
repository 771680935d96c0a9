"""What the container tests share: the project's copy that an engine has built, and the commands that start it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOCKET = Path("/var/run/docker.sock")
IMAGE = "mistral-7b-qlora:cpu"
NO_GPU = "tests/container/no-gpu.yaml"
UID = 4711  # the owner of adapters; has no name in the image, and is nobody here
COMMIT = "c0ffee" * 6 + "c0ff"
PRIVATE = "planted private words of a conversation"
TOKEN, KEY = "hf_PlantedTokenNobodyHas", "planted0wandb0key0planted0wandb0key0plan"
MINUTES = 60.0
# Small models are no faster with two, and far slower beside others; and sums by two threads have other last bits.
ONE_THREAD = ("--env", "OMP_NUM_THREADS=1")


@dataclass(frozen=True)
class Project:
    """A copy of the project in `folder`, under a Compose project name of its own, so with volumes of its own."""

    folder: Path
    name: str

    def compose(
        self, *words: str, no_gpu: bool = True, minutes: float = 10, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """`docker compose` in the folder; `no_gpu` adds the override that takes the GPU away."""
        files = ["--file", "compose.yaml", *(["--file", NO_GPU] if no_gpu else [])]
        return subprocess.run(
            ["docker", "compose", *files, *words],
            cwd=self.folder,
            env={**os.environ, "COMPOSE_PROJECT_NAME": self.name, "GIT_COMMIT": COMMIT, **environment},
            capture_output=True,
            text=True,
            timeout=minutes * MINUTES,
            check=False,
        )

    def run(
        self, service: str, *words: str, no_gpu: bool = True, minutes: float = 10
    ) -> subprocess.CompletedProcess[str]:
        """`docker compose run --rm SERVICE`, without a terminal."""
        return self.compose("run", "--rm", "-T", *ONE_THREAD, service, *words, no_gpu=no_gpu, minutes=minutes)

    def typed(self, line: str, user: int, minutes: float = 10) -> subprocess.CompletedProcess[str]:
        """`line` as `user` types it on this host; only the shell's variables choose the CPU's image and no GPU."""
        environment = {"LOCK": "cpu", "FLASH_ATTN": "skip", "COMPOSE_FILE": f"compose.yaml:{NO_GPU}"}
        return subprocess.run(
            shlex.split(line),
            cwd=self.folder,
            env={**os.environ, **environment, "COMPOSE_PROJECT_NAME": self.name, "HOME": str(self.folder)},
            user=user,
            group=user,
            extra_groups=[SOCKET.stat().st_gid],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=minutes * MINUTES,
            check=False,
        )

    def start(self, service: str, *words: str) -> str:
        """The same in the background: the container's id."""
        return self.compose("run", "--detach", "-T", *ONE_THREAD, service, *words).stdout.strip()

    def python(self, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """A piece of Python inside of the image, as the training's service is started."""
        return self.compose(
            "run", "--rm", "-T", "--entrypoint", "as-owner python", "train-h100", "-c", code, **environment
        )

    @property
    def adapters(self) -> Path:
        return self.folder / "adapters"


def copied(folder: Path) -> Path:
    """What git would hand out of this tree, in `folder`."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        target = folder / name
        if (ROOT / name).is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    return folder
