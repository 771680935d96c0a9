"""What README and docs say of tests, checks and results is what they are: names, figures and orders."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from finetune import checks
from finetune.config.load import ROOT, load_config
from finetune.plan.fit import EFFECTS
from finetune.plan.memory import peak_gib
from finetune.plan.model_shape import read_geometry
from support.commands import load_script

RESULTS = ROOT / "benchmarks" / "results"
Document = dict[str, Any]


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


def span(values: Iterable[float], form: str) -> str:
    low, *_, high = sorted(values)
    return f"{low:{form}} to {high:{form}}"


def resident(found: Document) -> str:
    """Resident memory of the demo's training by benchmarks/resident.py."""
    measured = found["resident"]
    parts = f"at most {measured['anonymous_gib']:.2f} anonymous and {measured['file_gib']:.2f} of files"
    return f"{measured['resident_gib']:.2f} GiB, {parts}; {measured['planned_gib']:.2f} GiB"


def prepared(variant: str) -> Callable[[Document], str]:
    """Seconds of one variant of benchmarks/prepare_data.py, its rows a second beside TRL's, and its memory."""

    def figures(found: Document) -> str:
        medians = found["medians"]
        speeds = {name: row["rows_per_second"] for name, row in medians.items()}
        once, twice = (speeds[variant] / speeds[name] for name in ("TRL", "TRL, 2 processes"))
        seconds = statistics.median(one["seconds"] for one in found["rounds"][variant])
        return f"{seconds:.1f} s; {once:.1f} and {twice:.1f} times, in {medians[variant]['peak_mib']} MiB"

    return figures


def prepared_by_trl(found: Document) -> str:
    once, twice = (found["medians"][name]["peak_mib"] for name in ("TRL", "TRL, 2 processes"))
    return f"{once:,}; {twice:,} MiB (torch loaded)"


def cpu_seconds(*commands: str) -> Callable[[Document], str]:
    """CPU seconds of commands by benchmarks/startup.py."""
    return lambda found: "; ".join(f"{found['commands'][name]['cpu_median']:.1f}" for name in commands) + " CPU seconds"


def helps(found: Document) -> str:
    ours = [starts for name, starts in found["starts"].items() if re.match(r"(src|scripts)/\S+ --help$", name)]
    assert len(ours) == 9
    return f"{span((start['cpu'] for starts in ours for start in starts), '.2f')} CPU seconds"


def every_check(found: Document) -> str:
    command = found["commands"]["validate_environment.py --config h100"]
    return f"{command['cpu_median']:.1f} CPU seconds, {command['wall_median']:.0f} s"


def off(found: Document) -> str:
    """The largest distance of a predicted peak from the measured one."""
    cases = [case["gib"] for case in found["memory"].values()]
    assert len(cases) == 18
    peaks = [gib[name] for gib in cases for name in ("loss", "backward", "evaluation")]
    return f"at most {max(abs(one['predicted'] / one['measured'] - 1) for one in peaks):.1%} off".replace("%", " %")


def compiled(*found: Document) -> str:
    jobs = [job for document in found for job in document["jobs"]]
    memory, seconds = span((job["peak_gib"] for job in jobs), ".1f"), span((job["cpu_seconds"] for job in jobs), ".0f")
    return f"{memory} GiB, {seconds} CPU seconds a file"


def beside_others(data: str, what: str) -> Callable[[Document], str]:
    """tokens/s of ours over theirs by benchmarks/train_step: of the medians, and round by round."""

    def figures(found: Document) -> str:
        ours, *theirs = (found["variants"][name][data] for name in ("D", "A", "B", "B-packed"))
        medians = [ours["tokens_per_second"] / other["tokens_per_second"] for other in theirs]
        rounds = "tokens_per_second_of_rounds"
        pairs = [list(zip(ours[rounds], other[rounds], strict=True)) for other in theirs]
        ranges = ", ".join(span((here / there for here, there in pair), ".2f") for pair in pairs)
        return f"{', '.join(f'{ratio:.2f}' for ratio in medians)}{what} (rounds: {ranges})"

    return figures


def furthest(found: Document) -> str:
    assert {len(run["losses"]) for run in found["losses"]["variants"].values()} == {200}
    apart = max(run["at_most"] for run in found["losses"]["variants"].values())
    return f"at most {apart:.1e} of the loss apart".replace("e-0", "e-")


def against_a_bare_loop(found: Document) -> str:
    def figures(name: str) -> str:
        tiny, demo = (found[case]["ratios"][f"{name} / bare loop"] for case in ("tiny", "135M"))
        rounds = found["135M"]["rounds"]
        ratios = [one["cpu_ms"] / bare["cpu_ms"] for one, bare in zip(rounds[name], rounds["bare loop"], strict=True)]
        return f"{tiny:.2f}, {demo:.1f} ({'rounds: ' * (name == 'ours')}{span(ratios, '.2f')})"

    return f"{figures('ours')}; TRL {figures('TRL')}"


def checkpoints(found: Document) -> str:
    assert f"{found['adapter']['rounds']['ours'][0]['mib']:.0f}" == "480"
    ours, trl = (found["adapter"]["medians"][name] for name in ("ours", "TRL"))
    return "{save:.1f} s, {load:.1f} s; TRL, not hashed, ".format(**ours) + "{save:.1f} s, {load:.1f} s".format(**trl)


# How a row of docs/measured.md begins, and what its figures are by its result files.
FIGURES: list[tuple[str, Callable[..., str]]] = [
    ("quickstart, fresh clone",
        lambda found: f"{found['first']['wall_seconds']} s; run again {found['again']['wall_seconds']} s"),
    (
        "training the demo",
        lambda found: (
            f"{span((found[run]['run']['tokens_per_second'] for run in ('first', 'again')), '.0f')} tokens/s, "
            f"{found['first']['run']['peak_memory_gib']} GiB resident with all libraries"
        ),
    ),
    ("resident peak of the demo's training", resident),
    ("eval_loss of the demo", lambda found: "{eval_loss_before:.2f}, {eval_loss:.2f}".format(**found["first"]["run"])),
    ("preparing 100,000 rows", prepared("ours")),
    ("the same with every row compared", prepared("ours, every row compared")),
    ("TRL preparing the same rows", prepared_by_trl),
    ("a quarter of the rows", lambda found: f"{found['medians']['ours, a quarter of the rows']['peak_mib']} MiB: "
        "memory hardly grows with the rows"),
    ("expected memory against what torch allocates, 18 small cases", off),
    ("`--help` of nine commands", helps),
    ("a typo in the config",
        lambda found: f"{found['commands']['train.py, a typo in the config']['cpu_median']:.2f} CPU seconds"),
    ("`--dry-run` of 150 rows", cpu_seconds("train.py --dry-run, 150 rows")),
    ("every check for the H100", every_check),
    ("`trl sft --help`; `accelerate launch --help`", cpu_seconds("trl sft --help", "accelerate launch --help")),
    ("compiling files of flash-attn", compiled),
    ("one step, 135M shape on a CPU", beside_others("mixed", " times their tokens/s")),
    ("the same with only full rows", beside_others("full", "")),
    ("loss over 200 steps", furthest),
    ("a step against a bare loop", against_a_bare_loop),
    ("a checkpoint of the 7B's adapter (480 MiB)", checkpoints),
]  # fmt: skip


def measured_rows() -> list[tuple[str, str, list[Path]]]:
    """What, its figures as they stand, and its result files; without the row of what is not measured."""
    lines = [line for line in page("measured").splitlines() if line.startswith("| ")][1:-1]
    rows: list[tuple[str, str, list[Path]]] = []
    for line in lines:
        what, figures, where = (cell.strip() for cell in line.strip("|").split("|"))
        rows.append((what, figures, rows[-1][2] if where == "the same" else sorted(RESULTS.glob(where.strip("`")))))
    return rows


def test_every_measured_row_has_its_figures_and_their_files_are_there() -> None:
    rows = measured_rows()
    beginnings = [beginning for beginning, _ in FIGURES]
    assert [what[: len(begin)] for (what, _, _), begin in zip(rows, beginnings, strict=True)] == beginnings
    assert all(files for _, _, files in rows)


@pytest.mark.parametrize(("begin", "figures"), FIGURES, ids=[begin for begin, _ in FIGURES])
def test_the_figures_of_a_measured_row_are_those_of_its_files(begin: str, figures: Callable[..., str]) -> None:
    ((told, files),) = [(told, files) for what, told, files in measured_rows() if what.startswith(begin)]
    assert told == figures(*(json.loads(path.read_text(encoding="utf-8")) for path in files))


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


def test_changes_against_full_memory_have_one_order_everywhere() -> None:
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
