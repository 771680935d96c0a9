"""The container image beside the project that it was built from: which files are others, without starting it."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.files import GIB
from finetune.wording import first_line

SOURCES = ("src", "scripts")  # the program in the image; configs are mounted over the image's own


@dataclass(frozen=True)
class Image:
    """The image that compose.yaml names.

    `lock` and `flash_attn` (build or skip) are its labels. `changed` are the files of
    program and lock, from the project's root, that are others here; `problem` is why they could not be looked at.
    """

    size_gib: float
    lock: str
    flash_attn: str = ""
    changed: tuple[str, ...] = ()
    problem: str = ""


def read_image(client: Any, root: Path, name: str, lock: str) -> Image | None:
    """The image `name`, compared with the program and `lock` in `root`; None where there is none."""
    from docker.errors import DockerException, ImageNotFound
    from requests.exceptions import RequestException

    try:
        image = client.images.get(name)
    except ImageNotFound:
        return None
    config = image.attrs["Config"]
    labels = config.get("Labels") or {}
    found = Image(image.attrs["Size"] / GIB, labels.get("lock", ""), labels.get("flash-attn", ""))
    try:
        return replace(found, changed=_look_into(client, image.id, root, lock))
    except (DockerException, RequestException, tarfile.TarError) as error:
        return replace(found, problem=first_line(error))


def _look_into(client: Any, image_id: str, root: Path, lock: str) -> tuple[str, ...]:
    """`changed` by a container that is made, never started, and removed with the volumes that the image declares."""
    container = client.containers.create(image_id, command=["true"], network_disabled=True)
    try:
        return tuple(changed(container, root, lock))
    finally:
        container.remove(v=True, force=True)


def changed(container: Any, root: Path, lock: str) -> Iterator[str]:
    """Files of the lock and the program that differ between /app in the image and `root`, by path from `root`."""
    names = (f"requirements/{lock}.lock", *SOURCES)
    there, here = files_in(container), dict(files_of(root, names))
    for name in names:
        mine = (path for path in {*there, *here} if path == name or path.startswith(f"{name}/"))
        yield from sorted(path for path in mine if there.get(path) != here.get(path))


def files_of(root: Path, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Path and content of the files below `names` in `root`, without what Python compiles."""
    for name in names:
        for path in (root / name, *(root / name).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield str(path.relative_to(root)), path.read_bytes()


def files_in(container: Any) -> dict[str, bytes]:
    """The same of all of the container's /app."""
    stream, _ = container.get_archive("/app")
    with tarfile.open(fileobj=io.BytesIO(b"".join(stream))) as archive:
        files = {it.name.removeprefix("app/"): archive.extractfile(it) for it in archive if it.isfile()}
        return {path: file.read() for path, file in files.items() if file and "__pycache__" not in path}
