"""What an image holds, on a fake engine: never started, and compared with the files here."""

from __future__ import annotations

from pathlib import Path

from finetune.machine import docker_host
from finetune.machine.docker_host import Engine, read_docker_host
from finetune.machine.docker_image import Image
from support.docker_hosts import PROGRAM
from support.recorded_docker import INFO_NVIDIA, FakeEngine


def test_an_image_of_this_program_differs_in_nothing(fake: FakeEngine, project: Path) -> None:
    fake.hold(PROGRAM)
    read = read_docker_host(project)
    assert read.engine == docker_host.engine_of(INFO_NVIDIA, "1.41", docker_host.LOCAL)
    assert read.image == Image(3.0, "h100", "build")


def test_an_image_says_itself_which_lock_it_was_made_from(fake: FakeEngine, project: Path) -> None:
    fake.hold(PROGRAM, lock="cpu", flash_attn="skip")
    assert read_docker_host(project).image == Image(3.0, "cpu", "skip")


def test_files_that_were_changed_added_or_removed_since_are_named(fake: FakeEngine, project: Path) -> None:
    fake.hold(PROGRAM | {"scripts/old.py": b"", "src/finetune/__pycache__/a.pyc": b"", "src/train.py": b"old"})
    (project / "src/new.py").write_text("")
    (project / "requirements/h100.lock").write_text("torch==2.11.0\n")
    read = read_docker_host(project)
    assert read.image is not None
    assert read.image.changed == ("requirements/h100.lock", "src/new.py", "src/train.py", "scripts/old.py")


def test_an_image_without_the_program_differs_in_all_of_it(fake: FakeEngine, project: Path) -> None:
    fake.hold({})
    read = read_docker_host(project)
    assert read.image is not None
    assert sorted(read.image.changed) == sorted(PROGRAM)


def test_the_container_is_made_and_removed_with_its_volumes_and_never_started(fake: FakeEngine, project: Path) -> None:
    fake.hold(PROGRAM)
    read_docker_host(project)
    changing = [request for request in fake.requests if request.startswith(("POST", "PUT", "DELETE"))]
    assert changing == ["POST /v1.41/containers/create", "DELETE /v1.41/containers/1?v=True&link=False&force=True"]


def test_the_image_is_the_one_that_the_lock_of_env_names(fake: FakeEngine, project: Path) -> None:
    (project / ".env").write_text("UID=1\nGID=1\nLOCK=cpu\n")
    read = read_docker_host(project)
    assert isinstance(read.engine, Engine)
    assert read.image is None
    assert [request for request in fake.requests if "/images/" in request] == [
        "GET /v1.41/images/mistral-7b-qlora:cpu/json"
    ]


def test_an_engine_without_room_for_a_container_is_a_finding_about_the_image(fake: FakeEngine, project: Path) -> None:
    fake.hold(PROGRAM)
    fake.full = True
    read = read_docker_host(project)
    assert read.image is not None
    assert read.image.problem.endswith('Internal Server Error ("no space left on device")')
