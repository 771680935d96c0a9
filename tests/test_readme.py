"""What the README says of tests and results: the files it names are there and say that."""

from __future__ import annotations

import json
import re

from finetune import checks
from finetune.checks import docker
from finetune.config import ROOT, load
from finetune.fitting import EFFECTS
from finetune.geometry import read_geometry
from finetune.memory import peak_gib

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_fault_names_a_test_file_and_each_one_named_is_there() -> None:
    rows = [line.split("|")[-2] for line in section("When something goes wrong").splitlines() if line.startswith("| ")][
        1:
    ]
    named = [re.findall(r"`((?:tests/)?[\w/]+(?:\.py|/))`", held_by) for held_by in rows]
    assert len(rows) > 20
    assert all(named)
    paths = {name if name.startswith("tests/") else f"tests/lost/{name}" for names in named for name in names}
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_the_tables_of_checks_are_the_registries() -> None:
    text = section("One H100") + section("Before an hour is paid")
    named = re.findall(r"^\| `([a-z0-9_]+\.[a-z0-9_]+|receipt|rehearsal)` \|", text, re.MULTILINE)
    assert named == [check.id for check in (*docker.CHECKS, *checks.CHECKS)]


def test_the_nights_line_is_that_of_its_result_file() -> None:
    newest = sorted(RESULTS.glob("*-nightly-*.json"))[-1]
    assert f"(`benchmarks/results/{newest.name}`)" in README
    assert f"    {json.loads(newest.read_text(encoding='utf-8'))['line']}\n" in README


def test_every_measured_row_names_result_files_that_are_there() -> None:
    rows = [line.split("|")[-2].strip() for line in section("Measured").splitlines() if line.startswith("| ")][1:]
    named = [row.strip("`") for row in rows if row not in ("", "the same")]
    assert named
    assert [name for name in named if not list(RESULTS.glob(name))] == []


def against_full_memory() -> list[list[str]]:
    """The rows of the table "Out of memory": change, peak, cost."""
    table = section("Troubleshooting").split("|---|---|---|\n")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def settings(text: str) -> list[str]:
    return re.findall(r"--set ([^\s`]+)", text)


def test_changes_against_full_memory_have_one_order_here_in_the_config_and_in_what_a_refusal_suggests() -> None:
    here = [settings(change) for change, _, _ in against_full_memory() if "--set" in change]
    notes = (ROOT / "configs" / "training_config_h100.yaml").read_text(encoding="utf-8")
    listed = notes.split("# Out of memory: ")[1].split("#   Memory to spare instead?")[0]
    assert here == [settings(line) for line in listed.splitlines() if "--set" in line]
    keys = list(dict.fromkeys(setting.split("=")[0] for change in here for setting in change))
    assert [key for key in keys if key in EFFECTS] == [key for key in EFFECTS if key in keys]
    assert len(set(keys) & set(EFFECTS)) == 5


def test_the_peak_of_each_change_against_full_memory_is_the_memory_models_own() -> None:
    """Alone on the H100's config, as the table says of itself."""

    def peak(changes: list[str]) -> str:
        config = load("h100", changes)[0]
        return f"{peak_gib(config, read_geometry(config)):.1f} GiB"

    rows = against_full_memory()
    assert len(rows) > 5
    assert [told for _, told, _ in rows] == [peak(settings(change)) for change, _, _ in rows]
    assert f"off there: {peak(['training.gradient_checkpointing=false'])}." in section("Troubleshooting")
