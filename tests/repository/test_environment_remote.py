"""environment-remote.yml installs the lock and nothing else; no number in it that another file has differently."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

from finetune.config.load import ROOT, load_config
from finetune.machine.platforms import PLATFORMS

FILE = ROOT / "environment-remote.yml"
TEXT = FILE.read_text(encoding="utf-8")
COMMENTS = " ".join(line.lstrip("# ") for line in TEXT.splitlines() if line.startswith("#"))
NOTES = (ROOT / "configs" / "training_config_h100.yaml").read_text(encoding="utf-8")
FLOORS = {"torch": "2.1.0", "transformers": "4.36.0", "peft": "0.7.0", "trl": "0.7.4", "bitsandbytes": "0.41.0"}


def pins(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9][a-z0-9._-]*)==([^ \\\n;]+)", path.read_text(encoding="utf-8"), re.MULTILINE))


VARIABLES = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "FLASH_ATTENTION_DETERMINISTIC": "1"}
LOCKED = pins(ROOT / "requirements" / "h100.lock")


def test_it_is_the_locks_python_and_the_lock_and_the_images_variables() -> None:
    assert yaml.safe_load(TEXT) == {
        "name": "mistral-qlora-h100",
        "channels": ["conda-forge"],
        "dependencies": ["python=3.11", "pip", {"pip": ["--require-hashes", "-r requirements/h100.lock"]}],
        "variables": VARIABLES,
    }
    image = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    assert [name for name, value in VARIABLES.items() if f"\nENV {name}={value}\n" not in image] == []
    assert dict(PLATFORMS["h100"].variables).items() <= VARIABLES.items()
    assert "--python-version 3.11 " in (ROOT / "requirements" / "lock.sh").read_text(encoding="utf-8")


def test_everything_in_the_lock_has_its_hash() -> None:
    text = (ROOT / "requirements" / "h100.lock").read_text(encoding="utf-8")
    assert len(re.findall(r"^\S+==\S+(?: ; .*)? \\\n    --hash=sha256:", text, re.MULTILINE)) == len(LOCKED) > 50


def test_the_five_pins_of_2023_stand_there_as_floors_beside_what_the_lock_has() -> None:
    rows = re.findall(r"^# +([a-z]+) +([\d.]+) +([\d.]+)$", TEXT, re.MULTILINE)
    assert {name: floor for name, floor, _ in rows} == FLOORS
    assert {name: locked for name, _, locked in rows} == {name: LOCKED[name] for name in FLOORS}
    assert all(Version(floor) < Version(locked) for _, floor, locked in rows)


def test_every_version_in_its_sentences_is_the_locks() -> None:
    named = set(re.findall(r"\b(torch|transformers|peft|trl|bitsandbytes) (\d[\d.]*\d)", COMMENTS + TEXT))
    other = {(name, said) for name, said in named if said != FLOORS[name] and not LOCKED[name].startswith(said)}
    assert ("transformers", "5.23") in named
    assert other == set()


def test_flash_attn_is_a_second_step_of_the_pinned_version_with_the_line_that_is_run() -> None:
    assert 'python -m pip install --no-deps "$(docker/flash_attn.sh docker/wheels)"' in COMMENTS
    assert "flash-attn" not in yaml.safe_dump(yaml.safe_load(TEXT))
    script = (ROOT / "docker" / "flash_attn.sh").read_text(encoding="utf-8")
    (said,) = re.findall(r"python -m (pip wheel .*) --require-hashes -r", COMMENTS)
    assert said in script
    assert all(f"{setting}" in script for setting in ("FLASH_ATTENTION_FORCE_BUILD=TRUE", ":-90", "NVCC_THREADS:-1"))
    assert "FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTN_CUDA_ARCHS=90 NVCC_THREADS=1 MAX_JOBS=N" in COMMENTS


@pytest.mark.parametrize(
    "said",
    [
        "3-4 hours",
        "5,500-11,000 tokens/s",
        "60-160 million tokens",
        "Memory is 13 GiB with all layers",
        "(by arithmetic, not measured)",
        "41.9 million trained weights, 0.6 % of the model",
    ],
)
def test_its_figures_are_those_of_the_configs_notes(said: str) -> None:
    assert said in COMMENTS
    assert said in NOTES


def test_its_lora_values_are_the_configs() -> None:
    lora = load_config("h100", [])[0].lora
    assert f"r {lora.r}, alpha {lora.lora_alpha}, dropout {lora.lora_dropout} on all seven linear layers" in COMMENTS
    assert len(lora.target_modules) == 7
