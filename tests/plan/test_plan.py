"""The plan: steps as the trainer counts them, memory and disk by arithmetic, and what `--dry-run --json` prints."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.config import load as config_load
from finetune.config.load import ROOT
from finetune.data.split import Statistics
from finetune.machine.inspect import Machine
from finetune.plan.model_shape import MISTRAL_7B
from finetune.plan.plan import Data, Plan, count_steps, disk_bytes, make_plan
from finetune.plan.throughput import Throughput
from support.plans import load
from support.recorded import M4

H100 = Machine("Linux", "x86_64", ("NVIDIA H100 80GB HBM3",), 79.126, 1007.6, 950.0)
LAPTOP = Machine("Linux", "x86_64", (), None, 15.6, 12.0)

TRAIN = Statistics(
    rows=900,
    tokens=180_000,
    supervised_tokens=90_000,
    truncated=3,
    dropped_long=2,
    dropped_without_loss=7,
    dropped_bad=1,
    dropped_duplicates=8,
    certified=902,
    encoded=903,
)
VALIDATION = Statistics(
    rows=100,
    tokens=20_000,
    supervised_tokens=9_000,
    truncated=4,
    dropped_long=5,
    dropped_bad=6,
    certified=105,
    encoded=105,
)


def planned(sequences: int, *settings: str, machine: Machine = H100) -> Plan:
    config = load("training.checkpointed_layers=all", *settings)
    return make_plan(config, Data(TRAIN, VALIDATION, sequences, 200_000, 100, 20_000), MISTRAL_7B, machine)


# Steps ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sequences", "micro_batch", "accumulation", "epochs", "max_steps", "wanted"),
    [
        (32, 2, 4, 3, -1, (4, 12)),  # 16 micro-batches, 4 whole steps
        (33, 2, 4, 2, -1, (5, 10)),  # the remainder, half a micro-batch, is a step in each epoch
        (31, 2, 4, 1, -1, (4, 4)),  # 16 micro-batches, the last of one sequence
        (1, 8, 16, 3, -1, (1, 3)),  # less than one batch is one step
        (32, 2, 4, 0.6, -1, (4, 3)),  # 2.4 steps
        (32, 2, 4, 0.01, -1, (4, 1)),
        (32, 2, 4, 3, 7, (4, 7)),  # max_steps wins over the epochs, below them
        (32, 2, 4, 1, 9, (4, 9)),  # and above
    ],
)
def test_steps_are_those_that_transformers_trainer_takes(
    sequences: int,
    micro_batch: int,
    accumulation: int,
    epochs: float,
    max_steps: int,
    wanted: tuple[int, int],
    tmp_path: Path,
) -> None:
    import torch
    from transformers import Trainer, TrainingArguments

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: Any) -> dict[str, Any]:
            return {"loss": (self.weight * x).mean()}

    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=micro_batch, gradient_accumulation_steps=accumulation,
        num_train_epochs=epochs, max_steps=max_steps, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
        logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(Model(), arguments, train_dataset=[{"x": torch.ones(1)}] * sequences)
    trainer.train()
    assert (trainer.state.global_step, trainer.state.max_steps) == (wanted[1], wanted[1])
    config = load(
        f"training.per_device_train_batch_size={micro_batch}",
        f"training.gradient_accumulation_steps={accumulation}",
        f"training.num_train_epochs={epochs}",
        f"training.max_steps={max_steps}",
    )
    assert count_steps(config, sequences) == wanted


# Disk and memory ------------------------------------------------------------------------------------------------------


def test_disk_is_three_checkpoints_and_two_spare_each_three_adapters_large_and_the_cache() -> None:
    adapter = 4 * 41_943_040
    assert disk_bytes(load(), MISTRAL_7B, 0) == 5 * 3 * adapter + 2 * adapter
    assert disk_bytes(load("training.save_total_limit=1"), MISTRAL_7B, 0) == 3 * 3 * adapter + 2 * adapter
    assert disk_bytes(load(), MISTRAL_7B, 1_000_000) - disk_bytes(load(), MISTRAL_7B, 0) == 8_000_000


# The plan -------------------------------------------------------------------------------------------------------------


def test_the_plan_adds_up_what_was_counted() -> None:
    plan = planned(50, "training.eval_steps=2", "training.save_steps=4")
    assert dataclasses.replace(plan, memory_parts={}, peak_memory_gib=0, disk_gib=0) == Plan(
        rows_train=900,
        rows_validation=100,
        rows_evaluated=100,
        tokens_train=180_000,
        supervised_tokens_train=90_000,
        rows_truncated=7,
        rows_dropped=29,
        sequences_train=50,
        packing_efficiency=0.8789,  # 180,000 of 50 x 4096
        effective_batch_size=16,
        steps_per_epoch=4,
        steps=12,
        warmup_steps=1,  # 0.36, rounded up
        evaluations=7,  # before the first step, then every second
        tokens_evaluated=140_000,
        checkpoints=3,
        peak_memory_gib=0,
        memory_parts={},
        memory_available_gib=79.13,
        disk_gib=0,
        hours=None,
        certificate={"rows": 1007, "of": 1008, "mismatches": 0},
        problems=[],
        checkpointed_layers=32,
        hours_expected=(0.0148, 0.0296),  # 540,000 tokens, and a third of the 140,000 of evaluations
        hours_expected_from="5,500-11,000 tokens/s and 16,500-33,000 in evaluations, by arithmetic, not measured",
    )
    assert plan.disk_gib == 2.66


def test_the_last_step_is_evaluated_and_saved_whatever_the_interval() -> None:
    plan = planned(50, "training.max_steps=13", "training.eval_steps=2", "training.save_steps=4")
    assert (plan.evaluations, plan.checkpoints) == (1 + 7, 4)
    plan = planned(50, "training.max_steps=3")
    assert (plan.evaluations, plan.checkpoints) == (2, 1)


def test_without_packing_the_share_of_the_batches_that_is_no_padding_counts() -> None:
    assert planned(900, "training.packing=false").packing_efficiency == 0.9


def test_batches_that_are_mostly_padding_are_a_problem_with_what_to_type() -> None:
    def problems(padded: int, packing: str) -> list[str]:
        config = load(f"training.packing={packing}")
        return make_plan(config, Data(TRAIN, VALIDATION, 1600, padded, 100, 20_000), MISTRAL_7B, H100).problems

    assert problems(530_000, "false") == [
        "batches are 34% full, the rest is padding; --set training.packing=true computes no padding"
    ]
    assert problems(225_000, "false") == problems(530_000, "true") == []


def test_the_parts_of_the_memory_add_up_to_the_peak() -> None:
    plan = planned(50, "model.attn_implementation=sdpa")
    assert sum(plan.memory_parts.values()) == pytest.approx(plan.peak_memory_gib, abs=0.01)
    assert all(size >= 0 for size in plan.memory_parts.values())


def test_the_layers_that_auto_would_checkpoint_are_told_with_their_memory() -> None:
    auto = "training.checkpointed_layers=auto"
    plan = planned(50, auto)
    assert (plan.checkpointed_layers, plan.checkpointed_from) == (
        16,
        "16 of 32: 70.1 GiB expected by the formula alone, at most 71.2 of 79.1; a rehearsal decides",
    )
    assert plan.peak_memory_gib == planned(50, "training.checkpointed_layers=16").peak_memory_gib == 70.11
    assert (planned(50, "training.checkpointed_layers=16").checkpointed_from, plan.problems) == (
        None,
        planned(50).problems,
    )


def test_a_laptop_plans_auto_for_the_80_gib_of_an_h100() -> None:
    plan = planned(50, "training.checkpointed_layers=auto", machine=LAPTOP)
    told = "16 of 32: 70.1 GiB expected by the formula alone, at most 72.0 of 80.0; a rehearsal decides"
    assert (plan.memory_available_gib, plan.checkpointed_from) == (None, told)


# Hours ----------------------------------------------------------------------------------------------------------------


def at_speed(monkeypatch: pytest.MonkeyPatch, evaluation: float | None, *settings: str) -> Plan:
    """The plan where 1,000 tokens a second were measured, and `evaluation` in evaluations."""
    speed = Throughput(1000.0, evaluation, "benchmarks/results/here.json", "2 cores of something")
    monkeypatch.setattr("finetune.plan.throughput.find", lambda *_run: speed)
    return planned(50, *settings)


def test_hours_are_the_tokens_of_epochs_and_evaluations_at_the_measured_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = at_speed(monkeypatch, 2000.0, "training.eval_steps=2", "training.save_steps=2")
    assert plan.hours == pytest.approx((3 * 180_000 / 1000 + 7 * 20_000 / 2000) / 3600, abs=1e-4)
    assert plan.hours_from == "1,000 tokens/s on 2 cores of something, benchmarks/results/here.json"


def test_hours_of_a_number_of_steps_are_their_share_of_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = at_speed(monkeypatch, None, "training.max_steps=2")
    assert plan.hours == pytest.approx(180_000 / 1000 * 2 / 4 / 3600, abs=1e-4)


def test_evaluations_that_nobody_timed_are_said_to_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = at_speed(monkeypatch, None)
    assert plan.hours == pytest.approx(3 * 180_000 / 1000 / 3600, abs=1e-4)
    assert plan.hours_from is not None and plan.hours_from.endswith("here.json, evaluations not counted")


# Problems -------------------------------------------------------------------------------------------------------------


def suggested(problem: str) -> list[str]:
    """The KEY=VALUE of every `--set` in a problem's text."""
    return re.findall(r"--set (\S+)", problem)


def test_fewer_steps_than_eval_steps_is_a_problem_with_what_to_type() -> None:
    assert planned(50, "training.max_steps=50").problems == [
        "50 steps, but training.eval_steps is 100: evaluated only before and after; --set training.eval_steps=10 "
        "--set training.save_steps=10 evaluates every 10"
    ]
    assert planned(50, "training.max_steps=100").problems == []


@pytest.mark.parametrize("steps", [1, 4, 7, 99])
def test_the_suggested_intervals_load_and_leave_no_problem(steps: int) -> None:
    tight = f"training.max_steps={steps}"
    (problem,) = planned(50, tight).problems
    settings = suggested(problem)
    assert len(settings) == 2
    plan = planned(50, tight, *settings)
    assert plan.problems == []
    assert plan.evaluations - 1 >= min(steps, 5)
    assert plan.checkpoints == plan.evaluations - 1  # each saved step has its eval_loss


def test_more_memory_than_is_free_is_a_problem_with_what_to_type() -> None:
    busy = dataclasses.replace(H100, gpu_free_gib=10.0)
    assert planned(50, "training.max_steps=100", machine=busy).problems == [
        "13.4 GiB expected, 10.0 GiB free: --set training.per_device_train_batch_size=2 "
        "--set training.gradient_accumulation_steps=8 (training.per_device_train_batch_size 4 -> 2, "
        "training.gradient_accumulation_steps 4 -> 8 keeps the effective batch of 16; 9.0 GiB expected)"
    ]


def test_memory_that_nobody_could_read_is_no_problem() -> None:
    plan = planned(50, "training.max_steps=100", machine=LAPTOP)
    assert (plan.memory_available_gib, plan.problems) == (None, [])


def test_a_limit_of_the_rows_is_told_with_what_takes_it_away() -> None:
    assert planned(50, "training.max_steps=100", "dataset.max_rows=40").problems == [
        "dataset.max_rows is 40: only the first 40 rows of data/processed/train.jsonl are read; "
        "--set dataset.max_rows=null reads all"
    ]


def on_the_mac(tokens: int, *settings: str, machine: Machine = LAPTOP, working_set_gib: float | None = None) -> Plan:
    """The plan for 10,000 rows of `tokens` together, on a platform of which nothing was measured."""
    rows = dataclasses.replace(TRAIN, rows=10_000, tokens=tokens)
    mac = config_load.load_config("m4", settings)[0]
    data = Data(rows, VALIDATION, math.ceil(tokens / 2048), tokens, 100, 100)
    return make_plan(mac, data, MISTRAL_7B, machine, working_set_gib)


def test_more_tokens_than_a_mac_trains_on_in_a_night_are_a_problem_with_what_to_type() -> None:
    plan = on_the_mac(1_000_000)
    assert plan.problems == [
        "3,000,000 tokens over all epochs take 16.7-33.3 h on m4 (25-50 tokens/s and 75-150 in evaluations, by "
        "arithmetic for 10 GPU cores, not measured); 12 h are 1.1-2.2 million; "
        "--set dataset.max_rows=3599 fits into that, or train on the H100 (--config h100)"
    ]
    assert (plan.hours, plan.hours_from) == (None, None)  # nothing was measured
    assert on_the_mac(359_000).problems == []


@pytest.mark.parametrize(
    ("chip", "cores", "speed"),
    [
        ("", None, "25-50 tokens/s and 75-150 in evaluations, by arithmetic for 10 GPU cores"),
        ("Apple M4", 8, "20-40 tokens/s"), ("Apple M4 Pro", 20, "50-100 tokens/s"),
        ("Apple M4 Max", 40, "100-200 tokens/s"), ("Apple M5", 10, "25-50 tokens/s"),
    ],
)  # fmt: skip
def test_expected_hours_on_a_mac_go_by_its_gpus_cores(chip: str, cores: int | None, speed: str) -> None:
    plan = on_the_mac(1_000_000, machine=dataclasses.replace(M4, chip=chip, gpu_cores=cores, memory_free_gib=28.0))
    share = 10 / (cores or 10)
    assert plan.hours_expected == pytest.approx((16.6704 * share, 33.3407 * share), abs=1e-3)
    assert plan.hours_expected_from is not None and plan.hours_expected_from.startswith(speed)


def test_a_time_budget_is_what_a_night_is_compared_with() -> None:
    assert on_the_mac(1_000_000, "training.time_budget_hours=40").problems == []
    (problem,) = on_the_mac(360_000, "training.time_budget_hours=10").problems
    assert problem == (
        "1,080,000 tokens over all epochs take 6.0-12.0 h on m4 (25-50 tokens/s and 75-150 in evaluations, by "
        "arithmetic for 10 GPU cores, not measured); 10 h are 0.9-1.8 million; "
        "--set dataset.max_rows=8331 fits into that, or train on the H100 (--config h100)"
    )


def test_of_another_base_no_hours_are_expected() -> None:
    mac = config_load.load_config("m4")[0]
    tiny = dataclasses.replace(MISTRAL_7B, num_hidden_layers=2)
    assert make_plan(mac, Data(TRAIN, VALIDATION, 100, 180_000, 100, 20_000), tiny, LAPTOP).hours_expected is None


def test_a_number_of_steps_that_takes_more_than_a_night_is_what_to_make_smaller() -> None:
    (problem,) = on_the_mac(1_000_000, "training.max_steps=62").problems  # 31 an epoch
    assert problem == (
        "2,000,000 tokens over all epochs take 11.1-22.2 h on m4 (25-50 tokens/s and 75-150 in evaluations, by "
        "arithmetic for 10 GPU cores, not measured); 12 h are 1.1-2.2 million; "
        "--set training.max_steps=33 fits into that, or train on the H100 (--config h100)"
    )
    assert on_the_mac(1_000_000, *suggested(problem)).problems == []


@pytest.mark.parametrize(
    ("free_gib", "working_set_gib", "fits"),
    [(20.5, 21.3, True), (12.0, 21.3, False), (28.0, 16.0, False)],
)
def test_on_a_mac_memory_is_enough_within_what_is_free_and_the_gpus_working_set(
    free_gib: float, working_set_gib: float, fits: bool
) -> None:
    mac = dataclasses.replace(M4, memory_free_gib=free_gib)
    plan = on_the_mac(100_000, machine=mac, working_set_gib=working_set_gib)
    assert (plan.memory_available_gib, plan.working_set_gib) == (free_gib, working_set_gib)
    assert plan.specified_memory_gb == (24, 28)
    packed = "--set quantization.storage=packed (quantization.storage expanded -> packed; 7.8 GiB expected)"
    limits = f"{free_gib} GiB free, {working_set_gib} GiB in the GPU's working set, beyond which macOS swaps"
    assert plan.problems == ([] if fits else [f"17.4 GiB expected, {limits}: {packed}"])


def test_on_a_mac_auto_stays_within_the_gpus_working_set() -> None:
    mac = dataclasses.replace(M4, memory_free_gib=28.0)
    plan = on_the_mac(100_000, "training.checkpointed_layers=auto", machine=mac, working_set_gib=21.3)
    assert plan.checkpointed_from is not None and " of 21.3;" in plan.checkpointed_from


def test_a_speed_that_was_measured_stands_above_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    def problems(tokens_per_second: float) -> list[str]:
        speed = Throughput(tokens_per_second, None, "benchmarks/results/mac.json", "Apple M4")
        monkeypatch.setattr("finetune.plan.throughput.find", lambda *_run: speed)
        return on_the_mac(1_000_000).problems

    assert problems(70) == []  # 16.7-33.3 h by arithmetic
    assert problems(50) == [
        "3,000,000 tokens over all epochs take 16.7 h on m4 (50 tokens/s on Apple M4, benchmarks/results/mac.json, "
        "evaluations not counted); 12 h are 2.2 million; --set dataset.max_rows=7199 fits into that, or train on "
        "the H100 (--config h100)"
    ]


def test_on_an_h100_more_than_a_day_is_a_problem_with_what_to_type() -> None:
    assert planned(50).hours_expected == pytest.approx((553_333 / 11_000 / 3600, 553_333 / 5_500 / 3600), abs=1e-4)
    rows = dataclasses.replace(TRAIN, rows=1_000_000, tokens=250_000_000)
    plan = make_plan(load(), Data(rows, VALIDATION, 61_036, 250_000_000, 100, 20_000), MISTRAL_7B, H100)
    assert plan.problems == [
        "750,000,000 tokens over all epochs take 19.0-37.9 h on h100 (5,500-11,000 tokens/s and 16,500-33,000 in "
        "evaluations, by arithmetic, not measured); 24 h are 474.7-949.4 million; --set dataset.max_rows=632948 fits "
        "into that"
    ]


def test_expected_hours_include_padding_and_evaluations() -> None:
    def hours(*settings: str) -> float:
        plan = planned(900, "training.max_steps=100", *settings)
        assert plan.hours_expected is not None
        return plan.hours_expected[1]

    whole = hours("training.packing=false")  # batches are 90 % full
    assert whole == pytest.approx(hours() / 0.9, rel=0.05)
    often = hours("training.packing=false", "training.eval_steps=10", "training.save_steps=10")
    assert often - whole == pytest.approx(9 * 20_000 / 3 / 5_500 / 3600, abs=2e-4)  # 11 evaluations in place of 2


def test_where_nobody_has_an_expectation_no_number_of_tokens_is_too_large() -> None:
    rows = dataclasses.replace(TRAIN, tokens=10_000_000_000)
    demo = load(f"model.name={ROOT}", "training.max_steps=100", platform="cpu")
    large = dataclasses.replace(LAPTOP, memory_free_gib=200.0)
    assert make_plan(demo, Data(rows, VALIDATION, 2_500_000, 10**10, 100, 20_000), MISTRAL_7B, large).problems == []


def test_evaluations_above_a_third_of_the_training_are_a_problem_with_what_to_type() -> None:
    often = ("training.max_steps=12", "training.eval_steps=1", "training.save_steps=1")
    held_out = dataclasses.replace(VALIDATION, rows=1_000, tokens=100_000)

    def plan(rows: int) -> Plan:
        return make_plan(load(*often), Data(TRAIN, held_out, 50, 200_000, rows, 100 * rows), MISTRAL_7B, H100)

    assert plan(1_000).tokens_evaluated == 13 * 100_000
    assert plan(1_000).problems == [
        "13 evaluations read 1,300,000 tokens, 2.4 times the training's; --set dataset.max_validation_rows=138 keeps "
        "them to a third of it"
    ]
    assert plan(138).problems == []
    assert plan(139).problems != []


def test_of_few_rows_no_evaluation_is_taken_away() -> None:
    often = ("training.max_steps=12", "training.eval_steps=1", "training.save_steps=1")
    plan = make_plan(load(*often), Data(TRAIN, VALIDATION, 50, 200_000, 100, 30_000), MISTRAL_7B, H100)
    assert (plan.tokens_evaluated, plan.problems) == (13 * 30_000, [])


def test_several_problems_are_told_at_once() -> None:
    busy = dataclasses.replace(H100, gpu_free_gib=0.0)
    steps, memory = planned(50, machine=busy).problems
    assert steps.startswith("12 steps, but training.eval_steps is 100: ")
    assert memory == (
        "13.4 GiB expected, 0.0 GiB free: no change to the config is enough; use a machine with more memory"
    )


# The command ----------------------------------------------------------------------------------------------------------

KEYS: dict[str, type | tuple[type, ...]] = {
    "rows_train": int, "rows_validation": int, "rows_evaluated": int, "tokens_train": int,
    "supervised_tokens_train": int,
    "rows_truncated": int, "rows_dropped": int, "sequences_train": int, "packing_efficiency": float,
    "effective_batch_size": int, "steps_per_epoch": int, "steps": int, "warmup_steps": int, "evaluations": int,
    "tokens_evaluated": int,
    "checkpoints": int, "peak_memory_gib": float, "memory_parts": dict, "memory_available_gib": (float, type(None)),
    "disk_gib": float, "hours": (float, type(None)), "certificate": dict, "problems": list, "checkpointed_layers": int,
    "hours_from": (str, type(None)), "hours_expected": (list, type(None)), "hours_expected_from": (str, type(None)),
    "checkpointed_from": (str, type(None)), "cost_per_hour": (float, type(None)),
    "working_set_gib": (float, type(None)), "specified_memory_gb": (list, type(None)),
}  # fmt: skip

# Imported before the program: no connection leaves this machine, and whoever tries leaves a trace.
NO_NETWORK = """\
import os, socket

def refuse(*arguments, **options):
    with open(os.environ["NETWORK_TRACE"], "a") as trace:
        print(arguments[1:], file=trace)
    raise OSError(101, "Network is unreachable")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


def dry_run(folder: Path, nvidia_smi: str) -> subprocess.CompletedProcess[str]:
    """`--dry-run --json` for the H100 with an `nvidia-smi` that does as told, without network, token or torch."""
    python, programs = folder / "python", folder / "bin"
    python.mkdir()
    programs.mkdir()
    (python / "sitecustomize.py").write_text(NO_NETWORK, encoding="utf-8")
    (python / "torch.py").write_text("raise ImportError('torch is broken here')\n", encoding="utf-8")
    (programs / "nvidia-smi").write_text(f"#!/bin/sh\n{nvidia_smi}\n", encoding="utf-8")
    (programs / "nvidia-smi").chmod(0o755)
    environment = {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(python),
        "HOME": str(folder),
        "NETWORK_TRACE": str(folder / "network"),
    }
    settings = ["dataset.train_file=data/sample/train.jsonl", "dataset.validation_file=null"]
    settings.append(f"output.dir={folder / 'adapters'}")
    command = [sys.executable, str(ROOT / "src" / "train.py"), "--config", "h100", "--dry-run", "--json"]
    for setting in settings:
        command += ["--set", setting]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def on_laptop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("laptop")
    return folder, dry_run(folder, "exit 9")


def test_a_dry_run_prints_one_json_document_with_the_documented_keys_and_types(
    on_laptop: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    done = on_laptop[1]
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert list(document) == list(KEYS)
    assert [key for key, kind in KEYS.items() if not isinstance(document[key], kind)] == []
    assert [key for key, value in document.items() if isinstance(value, bool)] == []
    assert all(isinstance(size, float) for size in document["memory_parts"].values())
    assert all(isinstance(problem, str) for problem in document["problems"])
    assert document["certificate"] == {"rows": 150, "of": 150, "mismatches": 0}
    assert document["rows_train"] + document["rows_validation"] == 150
    assert document["hours"] is None


def test_what_a_person_reads_of_a_dry_run_is_on_stderr(
    on_laptop: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    err = on_laptop[1].stderr
    assert "\nplan\n" in err
    assert "150 rows equal mistral-common's" in err
    assert "\033" not in err


def test_a_dry_run_needs_neither_network_nor_token_nor_torch_and_leaves_only_its_cache(
    on_laptop: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = on_laptop
    assert done.returncode == 0, done.stderr
    assert not (folder / "network").exists()
    assert [path.name for path in (folder / "adapters").iterdir()] == [".cache"]
    assert sorted(path.name for path in folder.iterdir()) == ["adapters", "bin", "python"]


def test_a_dry_run_says_the_same_on_a_laptop_as_on_the_h100(
    on_laptop: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = dry_run(tmp_path, "echo 'NVIDIA H100 80GB HBM3, 81079, 81559, 550.54.14, GPU-1, Disabled'")
    assert done.returncode == 0, done.stderr
    here, there = json.loads(on_laptop[1].stdout), json.loads(done.stdout)
    assert (here.pop("memory_available_gib"), there.pop("memory_available_gib")) == (None, 79.18)
    layers = "16 of 32: 70.1 GiB expected by the formula alone, at most {:.1f} of {:.1f}; a rehearsal decides"
    limits = (72.0, 80.0), (71.3, 79.2)  # of the platform, and what is free there
    assert [found.pop("checkpointed_from") for found in (here, there)] == [layers.format(*pair) for pair in limits]
    assert here == there
