"""pyproject.toml holds the one list of dependencies: each platform's lock has them, and uv can choose between them."""

from __future__ import annotations

import re
import tomllib

import pytest
from packaging.requirements import Requirement

from finetune.config.load import ROOT
from finetune.machine.platforms import PLATFORMS

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, UV = PYPROJECT["project"], PYPROJECT["tool"]["uv"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def locked(extra: str) -> dict[str, str]:
    text = (ROOT / "requirements" / f"{extra}.lock").read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z0-9][a-z0-9._-]*)==([^ \\\n;]+)", text, re.MULTILINE))


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_platforms_lock_holds_what_is_asked_for(extra: str) -> None:
    asked = [Requirement(text) for text in [*PROJECT["dependencies"], *EXTRAS[extra]]]
    versions = locked(extra)
    assert len(asked) > 15
    assert [it.name for it in asked if not it.specifier.contains(versions.get(it.name, "none"))] == []


def test_each_platform_is_an_extra_with_a_torch_of_its_own_and_uv_takes_one_of_them() -> None:
    assert set(EXTRAS) == set(PLATFORMS)
    assert UV["conflicts"] == [[{"extra": extra} for extra in EXTRAS]]
    torches = {it for names in EXTRAS.values() for it in names if it.startswith("torch==")}
    assert len(torches) == len(EXTRAS)


def test_only_the_cpu_takes_its_torch_from_pytorchs_own_index() -> None:
    assert UV["sources"] == {"torch": {"index": "pytorch-cpu", "extra": "cpu", "marker": "sys_platform == 'linux'"}}
    (index,) = UV["index"]
    assert (index["name"], index["explicit"]) == ("pytorch-cpu", True)
    assert index["url"] in (ROOT / "scripts" / "make_venv.sh").read_text(encoding="utf-8")
