"""Faults, one at a time, on machines that are otherwise healthy: what is found, what to type, and the exit code."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import bitsandbytes
import pytest
import torch

from finetune import checks
from finetune.checks.device import same_bits
from finetune.checks.numerics import linear
from finetune.checks.runner import Result, run
from finetune.cli import PYTHON
from finetune.config.load import ROOT
from finetune.errors import OutOfResource
from finetune.machine.platforms import PLATFORMS
from finetune.model import hub
from finetune.plan import model_shape, schedule
from finetune.plan.model_shape import Geometry
from finetune.training import rehearsal
from support.bench import Bench, found
from support.check_faults import FAULTS, Fault, conversations

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory, tiny_mistral: Path, hub_url: str) -> dict[str, list[Result]]:
    """What is found on each platform where nothing is wrong."""
    found_there = {}
    for platform in PLATFORMS:
        with pytest.MonkeyPatch.context() as patch:
            there = Bench(platform, tmp_path_factory.mktemp(platform), tiny_mistral, hub_url, patch)
            found_there[platform] = there.results()
    return found_there


@pytest.mark.parametrize(
    ("platform", "skipped"),
    [
        ("h100", {"device.attention": "model.attn_implementation is flash_attention_2",
            "model.files": "not in the Hub's cache yet: model.access tests the download"}),
        ("m4", {"container.shm": "not in a container", "container.init": "not in a container",
            "model.files": "not in the Hub's cache yet: model.access tests the download"}),
        ("cpu", {"container.shm": "not in a container", "container.init": "not in a container",
            "device.recompute": "training.gradient_checkpointing is false",
            "model.access": "a local folder needs no Hub", "tracking.wandb": "tracking.report_to is none"}),
    ],
)  # fmt: skip
def test_where_nothing_is_wrong_nothing_is_found(
    platform: str, skipped: dict[str, str], healthy: dict[str, list[Result]]
) -> None:
    assert found(healthy[platform]) == ([], 0)
    skips = {it.id: it.detail for it in healthy[platform] if it.status == "skip"}
    skips.pop("plan.hours", None)  # what was measured of speed decides that
    assert skips == skipped | {"paths.copy": "output.copy_to is null"}


def test_what_repeats_on_a_gpu_is_told_to_the_manifest(healthy: dict[str, list[Result]]) -> None:
    assert {platform: same_bits(results) for platform, results in healthy.items()} == {
        "h100": "flash_attention_2 over packed documents: the same bits each time, also of a decoder layer",
        "m4": None,
        "cpu": None,
    }


def spared(planted: Fault) -> tuple[str, ...]:
    """The checks of the device, a second of arithmetic, where the fault is of nothing that they need."""
    needs = {check.id: check.needs for check in checks.CHECKS}
    needed = {id_ for id_ in needs if id_.startswith("device.")}
    while more := {need for id_ in needed for need in needs[id_]} - needed:
        needed |= more
    return () if needed & {finding.id for finding in planted.findings} else ("device",)


@pytest.mark.parametrize("planted", FAULTS, ids=lambda planted: planted.name.replace(" ", "_"))
def test_a_fault_is_found_with_what_to_type(planted: Fault, bench: Callable[[str], Bench]) -> None:
    faulty = bench(planted.platform)
    planted.plant(faulty)
    peak = f"{faulty.peak_gib():.1f}" if any("PEAK" in finding[2] for finding in planted.findings) else ""
    wanted = [(id_, status, detail.replace("PEAK", peak), fix) for id_, status, detail, fix in planted.findings]
    results = faulty.results(spared(planted))
    assert found(results) == (wanted, planted.exit_code)
    waiting = {it.id: it.detail.removeprefix("needs ") for it in results if it.detail.startswith("needs ")}
    assert set(waiting.values()) <= {id_ for id_, *_ in wanted} | set(waiting)


def test_rows_that_are_there_again_or_left_out_for_the_weight_of_their_file_are_counted(
    bench: Callable[[str], Bench],
) -> None:
    planted = bench("cpu")
    rows = [[("user", f"Is it {number}?"), ("assistant", "Yes.")] for number in range(20)]
    files = planted.train_file, planted.folder / "more.jsonl", planted.folder / "less.jsonl"
    for file, first in ((files[1], 0), (files[2], 10)):
        planted.write_rows(*rows[first : first + 10])
        shutil.move(files[0], file)
    planted.write_rows(*conversations())
    planted.set(f"dataset.train_file=[{files[0]}, {{path: {files[1]}, weight: 2}}, {{path: {files[2]}, weight: 0.2}}]")
    found = next(result.detail for result in planted.results() if result.id == "data.rows")
    assert found == (
        "48 to train on, 13 held out (no validation file: 25% of the rows, chosen by content, are held out); "
        "9 of the training rows are repeats, by the weight of their file; 8 rows left out by the weight of their "
        "file; 60 of 60 compared with mistral-common"
    )


def test_at_least_fifty_faults_have_one_finding_each() -> None:
    assert sum(len(planted.findings) == 1 for planted in FAULTS) >= 50
    assert len({planted.name for planted in FAULTS}) == len(FAULTS)


def test_every_finding_says_what_to_type_and_not_what_was_found() -> None:
    for planted in FAULTS:
        for id_, _, detail, fix in planted.findings:
            assert fix.strip(), (planted.name, id_)
            assert fix not in detail, (planted.name, id_)
            assert detail not in fix, (planted.name, id_)


# Checks that no fault in the table is for, and why.
WITHOUT_A_FAULT = {
    "data.preview": "it shows a row and judges nothing",
    "rehearsal": "it trains, only with --deep: see below",
}


def test_every_check_has_a_fault_that_it_finds() -> None:
    finding = {id_ for planted in FAULTS for id_, *_ in planted.findings}
    assert {check.id for check in checks.CHECKS} - finding == set(WITHOUT_A_FAULT)


def test_a_check_of_level_fail_fails_for_some_fault_and_one_of_level_warn_for_none() -> None:
    failing = {id_ for planted in FAULTS for id_, status, *_ in planted.findings if status == "fail"}
    assert failing == {check.id for check in checks.CHECKS if check.level == "fail"} - set(WITHOUT_A_FAULT)


def test_every_id_is_there_once_and_needs_only_what_comes_before_it() -> None:
    ids = [check.id for check in checks.CHECKS]
    assert len(set(ids)) == len(ids)
    for place, check in enumerate(checks.CHECKS):
        assert set(check.needs) <= set(ids[:place]), check.id


def test_every_check_stands_in_its_page_with_what_it_looks_at() -> None:
    table = re.findall(
        r"^\| `([a-z0-9_.]+)` \|", (ROOT / "docs" / "checks.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    ids = [check.id for check in checks.CHECKS]
    assert [name for name in ids if name not in table] == []


# NF4 on a Mac ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["expanded", "packed"])
def test_a_mac_tries_nf4_on_its_cpu_and_the_step_where_it_trains(storage: str, bench: Callable[[str], Bench]) -> None:
    mac, tried = bench("m4"), []
    mac.set(f"quantization.storage={storage}")
    mac.patch.setitem(PLATFORMS, "m4", replace(PLATFORMS["m4"], device="mps"))
    mac.patch.setattr(linear, "nf4_loss", lambda device: tried.append(device) or 0.092)
    mac.patch.setattr(linear, "qlora_step", lambda *asked: tried.append(asked) or 0.002)
    [result] = run(checks.select("m4", ["device.qlora"]), mac.preflight())
    assert tried == ["cpu", ("mps", torch.bfloat16, storage)]
    found = f"NF4 keeps 90.8% of normal weights; a QLoRA step in bfloat16, {storage}, is 2.0e-03 from fp32"
    assert (result.status, result.detail) == ("pass", found)


def test_4_bit_kernels_that_fail_refuse_no_expanded_run(bench: Callable[[str], Bench]) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such kernel on this device")

    mac = bench("m4")
    mac.patch.setattr(bitsandbytes.nn.Linear4bit, "forward", broken)
    [result] = run(checks.select("m4", ["device.qlora"]), mac.preflight())
    assert result.status == "pass", result.detail
    mac.set("quantization.storage=packed")
    [result] = run(checks.select("m4", ["device.qlora"]), mac.preflight())
    assert (result.status, result.detail) == ("fail", "this check crashed: RuntimeError: no such kernel on this device")


@pytest.mark.parametrize(
    ("attention", "status"), [("sdpa", "pass"), ("torch_varlen", "pass"), ("flash_attention_2", "skip")]
)
def test_torchs_attention_is_tried_where_it_is_used(attention: str, status: str, bench: Callable[[str], Bench]) -> None:
    there = bench("h100")
    there.set(f"model.attn_implementation={attention}")
    [result] = run(checks.select("h100", ["device.attention"]), there.preflight())
    assert result.status == status, result.detail


# With --deep ----------------------------------------------------------------------------------------------------------


def rehearsed(bench: Bench) -> Result:
    [result] = run(checks.select(bench.platform, ["rehearsal"]), bench.preflight())
    return result


def left_behind(bench: Bench) -> list[str]:
    return [path.name for path in (bench.folder / "adapters").iterdir() if path.name != ".cache"]


def test_the_rehearsal_passes_where_nothing_is_wrong_and_leaves_nothing(bench: Callable[[str], Bench]) -> None:
    healthy = bench("cpu")
    result = rehearsed(healthy)
    assert (result.status, result.fix) == ("pass", ""), result.detail
    assert left_behind(healthy) == []


def test_a_rehearsal_that_shows_the_budget_to_be_too_small_fails_with_what_would_do(
    bench: Callable[[str], Bench],
) -> None:
    hurried = bench("cpu")
    hurried.set("training.time_budget_hours=1.0e-6")
    hurried.patch.setattr(schedule, "duration", lambda seconds: f"{seconds:.0f} s")  # not minutes on a slow machine
    result = rehearsed(hurried)
    assert (result.status, found([result])[1]) == ("fail", 3)
    assert re.fullmatch(
        r"time budget: steps 1 to 10 take \d+ s, training.time_budget_hours 1e-06 has 0 s left; what would fit:",
        result.detail,
    )
    assert re.fullmatch(r"--set training.time_budget_hours=0\.\d+", result.fix)
    assert left_behind(hurried) == []


FETCH = (
    "hf download mistralai/Mistral-7B-Instruct-v0.2 --revision 63a8b081895390a26e140280378bc85ec8bce07a "
    "--include '*.safetensors' '*.json'"
)


@pytest.fixture
def mac_with_a_demo(bench: Callable[[str], Bench]) -> Bench:
    """The m4 bench, whose demo's config names a tiny base and whose MPS is this machine's CPU."""
    mac = bench("m4")
    text = (ROOT / PLATFORMS["m4"].demo).read_text(encoding="utf-8")
    demo = mac.folder / "demo.yaml"
    small = text.replace("models/demo-135m ", f"{mac.base} ").replace("num_train_epochs: 1 ", "max_steps: 2 ")
    demo.write_text(small, encoding="utf-8")
    mac.patch.setattr(model_shape, "DEMO_135M", Geometry(64, 128, 2, 4, 2, 32000, False))
    mac.patch.setitem(PLATFORMS, "m4", replace(PLATFORMS["m4"], device="cpu", demo=str(demo)))
    return mac


def test_on_a_mac_without_the_base_the_demos_is_rehearsed_and_that_is_said(mac_with_a_demo: Bench) -> None:
    result = rehearsed(mac_with_a_demo)
    assert (result.status, result.fix) == ("warn", FETCH), result.detail
    said = "the base is not here yet, and the demo's was rehearsed in its place: peak "
    assert result.detail.startswith(said) and " for 2 steps, finished about " in result.detail
    assert left_behind(mac_with_a_demo) == []


def test_on_a_mac_with_neither_base_the_rehearsal_says_how_to_get_one(mac_with_a_demo: Bench) -> None:
    mac_with_a_demo.patch.setattr(hub, "missing_weights", lambda _: ["model.safetensors is missing"])
    result = rehearsed(mac_with_a_demo)
    assert (result.status, result.detail) == ("fail", "neither the base nor the demo's is here")
    assert result.fix == f"{PYTHON} scripts/make_demo_model.py, or {FETCH}"


def test_a_rehearsal_that_does_not_fit_fails_with_what_would(bench: Callable[[str], Bench]) -> None:
    full = bench("cpu")

    def refuses(*_: object) -> None:
        raise OutOfResource("rehearsal: peak 90.1 GiB, and there are 79.1 GiB", "--set quantization.storage=packed")

    full.patch.setattr(rehearsal, "rehearse", refuses)
    result = rehearsed(full)
    assert found([result]) == (
        [
            (
                "rehearsal",
                "fail",
                "rehearsal: peak 90.1 GiB, and there are 79.1 GiB",
                "--set quantization.storage=packed",
            )
        ],
        3,
    )
