"""What an image holds, compared with the files here and never started."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from docker.errors import APIError, ImageNotFound

from finetune.machine.docker_image import Image, read_image
from support.docker_hosts import PROGRAM

NAME = "mistral-7b-qlora:h100"


class Client:
    """docker-py's client of an engine with one image, whose /app has `files`; `calls` are what changes the engine."""

    def __init__(self, files: dict[str, bytes], lock: str = "h100", flash_attn: str = "build") -> None:
        config = {"Labels": {"lock": lock, "flash-attn": flash_attn}}
        self.image = SimpleNamespace(id="sha256:1", attrs={"Size": 3 * 2**30, "Config": config})
        self.files, self.full = files, False
        self.calls: list[tuple[str, Any]] = []
        self.images = self.containers = self

    def get(self, name: str) -> SimpleNamespace:
        if name != NAME:
            raise ImageNotFound("404 Client Error")
        return self.image

    def create(self, image: str, **_: object) -> Client:
        if self.full:
            raise APIError("500 Server Error", explanation="no space left on device")
        self.calls.append(("create", image))
        return self

    def remove(self, **options: bool) -> None:
        self.calls.append(("remove", options))

    def get_archive(self, path: str) -> tuple[list[bytes], dict[str, Any]]:
        """A tar whose paths begin with the last part of `path`."""
        assert path == "/app"
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            for name, content in self.files.items():
                member = tarfile.TarInfo(f"app/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        return [packed.getvalue()], {}


def test_an_image_of_this_program_differs_in_nothing_and_is_left_without_a_container(project: Path) -> None:
    client = Client(PROGRAM)
    assert read_image(client, project, NAME, "h100") == Image(3.0, "h100", "build")
    assert client.calls == [("create", "sha256:1"), ("remove", {"v": True, "force": True})]


def test_an_image_names_the_lock_it_was_made_from(project: Path) -> None:
    assert read_image(Client(PROGRAM, "cpu", "skip"), project, NAME, "h100") == Image(3.0, "cpu", "skip")


def test_an_image_that_is_not_there_is_none(project: Path) -> None:
    assert read_image(Client(PROGRAM), project, "mistral-7b-qlora:cpu", "cpu") is None


@pytest.mark.parametrize(
    ("files", "changed"),
    [
        (
            PROGRAM | {"scripts/old.py": b"", "src/finetune/__pycache__/a.pyc": b"", "src/train.py": b"old"},
            ("requirements/h100.lock", "src/new.py", "src/train.py", "scripts/old.py"),
        ),
        ({}, ("requirements/h100.lock", "src/finetune/a.py", "src/new.py", "src/train.py", "scripts/b.sh")),
    ],
    ids=["changed, added and removed", "no program"],
)
def test_files_that_are_others_here_are_named(files: dict[str, bytes], changed: tuple[str, ...], project: Path) -> None:
    (project / "src/new.py").write_text("")
    (project / "requirements/h100.lock").write_text("torch==2.11.0\n")
    assert read_image(Client(files), project, NAME, "h100") == Image(3.0, "h100", "build", changed)


def test_an_engine_without_room_for_a_container_is_a_finding_about_the_image(project: Path) -> None:
    client = Client(PROGRAM)
    client.full = True
    problem = '500 Server Error ("no space left on device")'
    assert read_image(client, project, NAME, "h100") == Image(3.0, "h100", "build", problem=problem)
