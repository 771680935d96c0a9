"""What the README says of tests and results: the files it names are there and say that."""

from __future__ import annotations

import json
import re

from finetune import checks
from finetune.checks import docker
from finetune.config import ROOT, load
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


def test_the_peak_of_each_change_against_full_memory_is_the_memory_models_own() -> None:
    """Alone on the H100's config, as the table says of itself."""

    def peak(settings: list[str]) -> str:
        config = load("h100", settings)[0]
        return f"{peak_gib(config, read_geometry(config)):.1f} GiB"

    table = section("Troubleshooting").split("|---|---|---|\n")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert len(rows) > 5
    found = [peak(re.findall(r"--set (\S+?)[ `]", f"{change} ")) for change, _, _ in rows]
    assert [told for _, told, _ in rows] == found
    assert f"off there: {peak(['training.gradient_checkpointing=false'])}." in section("Troubleshooting")
