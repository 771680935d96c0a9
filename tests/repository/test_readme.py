"""What README and docs say of tests, checks and results is what they are: names, figures and orders."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from finetune import checks
from finetune.config.load import ROOT, load_config
from finetune.plan.fit import EFFECTS
from finetune.plan.memory import peak_gib
from finetune.plan.model_shape import read_geometry
from support.commands import load_script

RESULTS = ROOT / "benchmarks" / "results"


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def test_the_readme_can_be_read_to_its_end_and_names_every_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert sorted(set(re.findall(r"docs/(\w+)\.md", text))) == sorted(
        path.stem for path in (ROOT / "docs").glob("*.md")
    )


def test_every_fault_names_a_test_file_and_each_one_named_is_there() -> None:
    rows = [line.split("|")[-2] for line in page("reliability").splitlines() if line.startswith("| ")][1:]
    named = [re.findall(r"`((?:tests/)?[\w/]+(?:\.py|/))`", held_by) for held_by in rows]
    assert len(rows) > 20
    assert all(named)
    paths = {name if name.startswith("tests/") else f"tests/faults/{name}" for names in named for name in names}
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_the_tables_of_checks_are_the_registries() -> None:
    text = page("h100") + page("checks")
    named = re.findall(r"^\| `([a-z0-9_]+\.[a-z0-9_]+|receipt|rehearsal)` \|", text, re.MULTILINE)
    assert named == [*load_script("check_docker").CHECKS, *(check.id for check in checks.CHECKS)]


def test_the_nights_line_is_that_of_its_result_file() -> None:
    newest = sorted(RESULTS.glob("*-nightly-*.json"))[-1]
    assert f"(`benchmarks/results/{newest.name}`)" in page("reliability")
    assert f"    {json.loads(newest.read_text(encoding='utf-8'))['line']}\n" in page("reliability")


# The measured figures -------------------------------------------------------------------------------------------------


# Rows whose figures are ratios, ranges or distances of numbers in the file, computed when they were written down.
COMPUTED = (
    "preparing 100,000 rows",
    "the same with every row compared",
    "expected memory against what torch allocates",
    "one step, 135M shape",
    "the same with only full rows",
    "loss over 200 steps",
    "a step against a bare loop",
)


def numbers(found: object) -> Iterator[float]:
    """Every number in a JSON document."""
    if isinstance(found, int | float):
        yield found
    elif isinstance(found, dict | list):
        for part in found.values() if isinstance(found, dict) else found:
            yield from numbers(part)


def measured_rows() -> list[tuple[str, str, list[Path]]]:
    """What, its figures as they stand, and its result files; without the row of what is not measured."""
    lines = [line for line in page("measured").splitlines() if line.startswith("| ")][1:-1]
    rows: list[tuple[str, str, list[Path]]] = []
    for line in lines:
        what, figures, where = (cell.strip() for cell in line.strip("|").split("|"))
        rows.append((what, figures, rows[-1][2] if where == "the same" else sorted(RESULTS.glob(where.strip("`")))))
    return rows


def test_a_measured_figure_is_in_its_result_file() -> None:
    rows = measured_rows()
    assert all(files for _, _, files in rows)
    missing = []
    for what, figures, files in rows:
        measured = [number for path in files for number in numbers(json.loads(path.read_text(encoding="utf-8")))]
        for figure in re.findall(r"\d[\d,]*(?:\.\d+)?", figures) if not what.startswith(COMPUTED) else ():
            decimals = len(figure.partition(".")[2])
            if not any(f"{number:,.{decimals}f}" == figure for number in measured):
                missing.append((what, figure))
    assert len(rows) > 10
    assert missing == []


def test_a_result_file_is_named_after_the_day_in_it() -> None:
    days = {path.name: json.loads(path.read_text(encoding="utf-8"))["date"] for path in RESULTS.glob("*.json")}
    assert len(days) > 10
    assert [name for name, day in days.items() if not name.startswith(day)] == []


# Out of memory --------------------------------------------------------------------------------------------------------


def against_full_memory() -> list[list[str]]:
    """The rows of the table "Out of memory": change, peak, cost."""
    table = page("troubleshooting").split("|---|---|---|\n")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def settings(text: str) -> list[str]:
    return re.findall(r"--set ([^\s`]+)", text)


def test_changes_against_full_memory_have_one_order_here_in_the_config_and_in_what_a_refusal_suggests() -> None:
    here = [settings(change) for change, _, _ in against_full_memory() if "--set" in change]
    notes = (ROOT / "configs" / "training_config_h100.yaml").read_text(encoding="utf-8")
    listed = notes.split("# Out of memory: ")[1].split("#   If memory is left over")[0]
    assert here == [settings(line) for line in listed.splitlines() if "--set" in line]
    keys = list(dict.fromkeys(setting.split("=")[0] for change in here for setting in change))
    assert [key for key in keys if key in EFFECTS] == [key for key in EFFECTS if key in keys]
    assert len(set(keys) & set(EFFECTS)) == 5


def test_the_peak_of_each_change_against_full_memory_is_the_memory_models_own() -> None:
    """Alone on the H100's config, as the table says of itself."""

    def peak(changes: list[str]) -> str:
        config = load_config("h100", changes)[0]
        return f"{peak_gib(config, read_geometry(config)):.1f} GiB"

    rows = against_full_memory()
    assert len(rows) > 5
    assert [told for _, told, _ in rows] == [peak(settings(change)) for change, _, _ in rows]
    assert f"off there: {peak(['training.gradient_checkpointing=false'])}." in page("troubleshooting")


def test_the_local_try_on_the_mac_is_accepted_and_its_check_on_the_h100_is_of_the_same_rows() -> None:
    before, here, there = map(settings, re.split(r"\*\*Try here, then pay|rsync -rR", page("mac")))
    assert before == ["quantization.storage=packed"]
    for platform, chosen in (("m4", before), ("m4", here), ("h100", there)):
        load_config(platform, chosen)
    assert set(here) & set(there) == set(there) == {"dataset.max_rows=40", "dataset.validation_file=null"}


def test_the_macs_memory_is_the_memory_models_own_wherever_it_is_told() -> None:
    def peak(storage: str) -> str:
        config = load_config("m4", [f"quantization.storage={storage}"])[0]
        return f"{peak_gib(config, read_geometry(config)):.1f}"

    expanded, packed = peak("expanded"), peak("packed")
    environment = (ROOT / "environment-m4.yml").read_text(encoding="utf-8")
    config = (ROOT / "configs" / "training_config_m4.yaml").read_text(encoding="utf-8")
    assert f"comes first: {packed} GiB in place of {expanded}." in page("troubleshooting")
    assert f"| the peak: {expanded} GiB expanded, {packed} packed; " in page("hardware")
    assert f"By the plan, this file takes {expanded} GiB, and {packed} with storage packed" in config
    assert f"storage expanded, {expanded} GiB of a working set" in environment
    assert f"storage=packed, {packed} GiB; " in environment
