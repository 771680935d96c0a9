"""The container image that train-h100 starts, and the disk that it and the base model need."""

from __future__ import annotations

from collections.abc import Iterable

from finetune.checks.paths import BASE_GIB
from finetune.checks.runner import Check, Finding, failed, passed, skipped, warned
from finetune.machine.docker_host import Disk, DockerHost
from finetune.machine.docker_image import REPOSITORY, SOURCES, Image
from finetune.machine.platforms import PLATFORMS
from finetune.wording import listed

IMAGE_GIB = 40  # an expectation: the image, its stages and uv's cache, which the engine keeps beside it
LISTED = 3  # files named in one finding, then a count
BUILD = "docker compose build"


def _image(host: DockerHost) -> Finding:
    lock, image = host.settings.lock, host.image
    if not PLATFORMS[lock].nvidia:
        fix = f"echo LOCK=h100 >> .env && {BUILD}"
        return failed(f"LOCK is {lock}: an image without CUDA, which train-h100 needs", fix)
    if image is None:
        return failed(f"no image {REPOSITORY}:{lock}", BUILD)
    found = f"{REPOSITORY}:{lock}, {image.size_gib:.1f} GiB"
    if image.problem:
        return failed(f"{found}, cannot be looked into: {image.problem}", BUILD)
    if image.lock != lock:
        return failed(f"{found}, says that it was made from {image.lock or 'no'} lock", BUILD)
    if f"requirements/{lock}.lock" in image.changed:
        return failed(f"{found}, was made from another requirements/{lock}.lock than the one here", BUILD)
    return passed(f"{found}, made from requirements/{lock}.lock")


def _made(host: DockerHost) -> Image:
    assert host.image is not None  # what asks needs docker.image
    return host.image


def _source(host: DockerHost) -> Finding:
    other = [path for path in _made(host).changed if path.split("/")[0] in SOURCES]
    if other:
        return warned(f"other in the image than here: {listed(other, LISTED)}", BUILD)
    return passed(f"{' and '.join(SOURCES)} in the image are those here")


def _flash_attention(host: DockerHost) -> Finding:
    if _made(host).flash_attn != "build":
        without = "or do without: docker compose run --rm train-h100 --set model.attn_implementation=sdpa"
        return warned("the image has no flash-attn", f"echo FLASH_ATTN=build >> .env && {BUILD}; {without}")
    return passed("flash-attn is in the image")


def _disk(host: DockerHost) -> Finding:
    """Against expectations. The base may be in the cache volume already, which only root can see."""
    images, volumes = host.image_disk, host.volume_disk
    if images is None or volumes is None:
        return skipped("where Docker keeps its data cannot be seen from here")
    needs: list[tuple[Disk, float, str]] = [] if host.image else [(images, IMAGE_GIB, "the image")]
    needs.append((volumes, BASE_GIB, "the base"))
    looked = [_room(disk, needs) for disk in {images.device: images, volumes.device: volumes}.values()]
    found = "; ".join(text for _, text in looked)
    if all(enough for enough, _ in looked):
        return passed(found)
    fix = "docker system df shows what holds it; docker image prune; or another data-root in /etc/docker/daemon.json"
    return warned(f"{found}, unless the cache volume holds it" if host.image else found, fix)


def _room(disk: Disk, needs: Iterable[tuple[Disk, float, str]]) -> tuple[bool, str]:
    """Whether `disk` has room for what of `needs` goes there, and that in words."""
    mine = [(gib, what) for where, gib, what in needs if where.device == disk.device]
    parts = ", ".join(f"{gib:g} for {what}" for gib, what in mine) or "nothing"
    text = f"{disk.free_gib:.1f} GiB free in {disk.folder}, expected to be needed: {parts}"
    return disk.free_gib >= sum(gib for gib, _ in mine), text


_ENGINE, _IMAGE = ("docker.engine",), ("docker.image",)
MADE = "the image is there, made from this requirements/h100.lock"
CHECKS: tuple[Check[DockerHost], ...] = (
    Check("docker.image", MADE, _image, needs=(*_ENGINE, "docker.env")),
    Check("docker.source", "src and scripts in the image are those here", _source, needs=_IMAGE, level="warn"),
    Check("docker.flash_attention", "the image has flash-attn", _flash_attention, needs=_IMAGE, level="warn"),
    Check("docker.disk", "free disk where Docker keeps images and volumes", _disk, needs=_ENGINE, level="warn"),
)
