"""The container image beside the project that it was built from: which files are others, without starting it."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from finetune.files import GIB
from finetune.wording import first_line

SOURCES = ("src", "scripts")  # the program in the image; configs are mounted over the image's own


@dataclass(frozen=True)
class Image:
    """The image that compose.yaml names.

    `lock` is the one that it says it was made from, `flash_attn` its label: build or skip. `changed` are the files of
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
    variables = dict(variable.partition("=")[::2] for variable in config.get("Env") or ())
    label = (config.get("Labels") or {}).get("flash-attn", "")
    found = Image(image.attrs["Size"] / GIB, variables.get("IMAGE_LOCK", ""), label)
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
    """Files of the lock and the program that are not the same in the image and in `root`, by path from `root`."""
    for name in (f"requirements/{lock}.lock", *SOURCES):
        there, here = files_in(container, name), files_of(root, root / name)
        yield from sorted(path for path in {*there, *here} if there.get(path) != here.get(path))


def files_of(root: Path, path: Path) -> dict[str, bytes]:
    """Content of the file, or of all files below the folder, by path from `root`; without what Python compiles."""
    files = [path] if path.is_file() else (file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(root)): file.read_bytes() for file in files if "__pycache__" not in file.parts}


def files_in(container: Any, name: str) -> dict[str, bytes]:
    """The same of /app in the image; nothing where it has no `name`."""
    from docker.errors import NotFound

    try:
        stream, _ = container.get_archive(f"/app/{name}")
    except NotFound:
        return {}
    parent, found = PurePosixPath(name).parent, {}
    with tarfile.open(fileobj=io.BytesIO(b"".join(stream))) as archive:
        for member in archive:
            content = archive.extractfile(member) if "__pycache__" not in member.name else None
            if content is not None:  # None for folders, too
                found[str(parent / member.name)] = content.read()
    return found
