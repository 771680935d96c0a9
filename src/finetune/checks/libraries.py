"""Checks of the Python libraries: the locked versions are installed and can be imported."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from finetune import cli
from finetune.checks.preflight import Preflight
from finetune.checks.runner import Check, Finding, failed, passed, warned
from finetune.files import ROOT
from finetune.machine.platforms import LIBRARIES
from finetune.wording import first_line, listed

if TYPE_CHECKING:
    from packaging.version import Version

IMPORTED = ("torch", "numpy", "tokenizers", "transformers", "datasets", "accelerate", "bitsandbytes", "peft", "trl")
LISTED = 5  # libraries listed in one finding; the rest are counted


def lock_file(preflight: Preflight) -> Path:
    """Return this environment's lock: the image's, the Mac's for the demo on a Mac, else the platform's."""
    platform, on_macos = preflight.platform, preflight.machine.system == "Darwin"
    name = cli.IMAGE_LOCK or (on_macos and platform.mac_lock) or platform.name
    return ROOT / "requirements" / f"{name}.lock"


def locked(lock: Path) -> dict[str, Version]:
    """Return the name and version of each library that `lock` installs on this machine."""
    # Imported late, here and below: packaging would add a fifth to the time of `--help`.
    from packaging.requirements import Requirement
    from packaging.version import Version

    found = {}
    for line in lock.read_text(encoding="utf-8").splitlines():
        if "==" in line and line[0].isalnum():
            requirement = Requirement(line.rstrip("\\ "))
            if requirement.marker is None or requirement.marker.evaluate():
                found[requirement.name] = Version(next(iter(requirement.specifier)).version)
    return found


def installed(name: str) -> Version | None:
    """Return the installed version of a library, or None."""
    from importlib import metadata

    from packaging.version import Version

    try:
        return Version(metadata.version(name))
    except metadata.PackageNotFoundError:
        return None


def _versions(preflight: Preflight) -> Finding:
    from packaging.version import Version

    lock, fix = lock_file(preflight), preflight.platform.install
    absent: list[str] = []
    older: list[str] = []
    other: list[str] = []
    required = locked(lock)
    for name, version in required.items():
        found = installed(name)
        if found is None:
            absent.append(name)
            continue
        plain = Version(found.public)  # 2.13.0+cpu is 2.13.0
        if plain != version:
            (older if name in LIBRARIES and plain < version else other).append(f"{name} {found} (locked: {version})")
    if absent or older:
        parts = {"not installed": absent, "older than tested": older}
        return failed("; ".join(f"{what}: {listed(names, LISTED)}" for what, names in parts.items() if names), fix)
    if other:
        return warned(f"not the locked versions: {listed(other, LISTED)}", fix)
    return passed(f"{len(required)} libraries as in requirements/{lock.name}")


def _imports(preflight: Preflight) -> Finding:
    broken = []
    for name in IMPORTED:
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:  # broken installations raise these
            broken.append(f"{name}: {first_line(error)}")
    if broken:
        return failed("cannot be imported: " + "; ".join(broken), preflight.platform.repair)
    return passed(f"{', '.join(IMPORTED)} import")


CHECKS = (
    Check("libraries.versions", "installed versions against the platform's lock", _versions, needs=("host.system",)),
    Check("libraries.imports", "every library imports", _imports),
)
