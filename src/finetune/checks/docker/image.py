"""The container image that train-h100 starts, and the disk that it and the base model need."""

from __future__ import annotations

from finetune.checks.paths import BASE_GIB
from finetune.checks.runner import Check, Finding, failed, passed, skipped, warned
from finetune.machine.docker_host import DockerHost, Service
from finetune.machine.docker_image import SOURCES, Image
from finetune.machine.platforms import PLATFORMS, names
from finetune.wording import listed

IMAGE_GIB = 40  # an expectation: the image, its stages and uv's cache, which the engine keeps beside it
LISTED = 3  # files named in one finding, then a count
BUILD = "docker compose build"
H100 = "echo LOCK=h100 >> .env"
CUDA = names(lambda row: row.nvidia)


def resolved(host: DockerHost) -> Service:
    """The service, for checks that need docker.config."""
    assert isinstance(host.service, Service)
    return host.service


def _image(host: DockerHost) -> Finding:
    name, lock, image = resolved(host).image, resolved(host).lock, host.image
    if lock not in CUDA:
        what = "an image without CUDA, which train-h100 needs" if lock in PLATFORMS else "wanted h100"
        return failed(f"LOCK is {lock}: {what}", f"{H100} && {BUILD}")
    if image is None:
        return failed(f"no image {name}", BUILD)
    found = f"{name}, {image.size_gib:.1f} GiB"
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
        without = "or do without: docker compose run --rm train-h100 --set model.attn_implementation=torch_varlen"
        return warned("the image has no flash-attn", f"echo FLASH_ATTN=build >> .env && {BUILD}; {without}")
    return passed("flash-attn is in the image")


def _disk(host: DockerHost) -> Finding:
    """Against expectations. The base may be in the cache volume already, which only root can see."""
    if host.disk is None:
        return skipped("the disk of the engine's data cannot be seen from here")
    image_gib = 0 if host.image else IMAGE_GIB
    needs = f"{f'{image_gib} for the image, ' if image_gib else ''}{BASE_GIB:g} for the base"
    found = f"{host.disk.free_gib:.1f} GiB free in {host.disk.folder}, expected to be needed: {needs}"
    if host.disk.free_gib >= image_gib + BASE_GIB:
        return passed(found)
    fix = "docker system df shows what uses it; docker image prune; or another data-root in /etc/docker/daemon.json"
    return warned(f"{found}, unless the cache volume has it" if host.image else found, fix)


_ENGINE, _IMAGE = ("docker.engine",), ("docker.image",)
MADE = "the image is there, made from this requirements/h100.lock"
CHECKS: tuple[Check[DockerHost], ...] = (
    Check("docker.image", MADE, _image, needs=(*_ENGINE, "docker.config")),
    Check("docker.source", "src and scripts in the image are those here", _source, needs=_IMAGE, level="warn"),
    Check("docker.flash_attention", "the image has flash-attn", _flash_attention, needs=_IMAGE, level="warn"),
    Check("docker.disk", "free disk where Docker keeps images and volumes", _disk, needs=_ENGINE, level="warn"),
)
