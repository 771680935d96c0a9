"""The plan: steps as the trainer counts them, memory and disk by arithmetic, and what `--dry-run --json` prints."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune import config
from finetune.config import ROOT, Config
from finetune.encoding import Statistics
from finetune.geometry import MISTRAL_7B
from finetune.plan import Plan, count_steps, disk_bytes, lora_parameters, make_plan, memory_parts
from finetune.platforms import GIB, Machine

H100 = Machine("Linux", "x86_64", ("NVIDIA H100 80GB HBM3",), 79.126, 1007.6, 950.0)
LAPTOP = Machine("Linux", "x86_64", (), None, 15.6, 12.0)

TRAIN = Statistics(
    rows=900, tokens=180_000, supervised_tokens=90_000, truncated=3, dropped_long=2, dropped_bad=1, certified=902
)
VALIDATION = Statistics(
    rows=100, tokens=20_000, supervised_tokens=9_000, truncated=4, dropped_long=5, dropped_bad=6, certified=105
)


def load(*settings: str) -> Config:
    return config.load("h100", settings)[0]


def schedule(micro_batch: int, accumulation: int, epochs: float, max_steps: int = -1) -> Config:
    return load(
        f"training.per_device_train_batch_size={micro_batch}",
        f"training.gradient_accumulation_steps={accumulation}",
        f"training.num_train_epochs={epochs}",
        f"training.max_steps={max_steps}",
    )


def planned(sequences: int, *settings: str, machine: Machine = H100) -> Plan:
    return make_plan(load(*settings), TRAIN, VALIDATION, sequences, MISTRAL_7B, machine)


# Steps ----------------------------------------------------------------------------------------------------------------

# sequences, micro-batch, accumulation, epochs, max_steps -> steps an epoch, steps
STEPS = [
    (32, 2, 4, 1, -1, 4, 4),  # 16 micro-batches, 4 whole steps
    (32, 2, 4, 3, -1, 4, 12),
    (34, 2, 4, 1, -1, 5, 5),  # a 17th micro-batch is a step of its own
    (33, 2, 4, 1, -1, 5, 5),  # and so is half of one
    (31, 2, 4, 1, -1, 4, 4),  # 16 micro-batches, the last of one sequence
    (33, 2, 4, 2, -1, 5, 10),  # the remainder is a step in each epoch
    (1, 8, 16, 1, -1, 1, 1),  # less than one batch is one step
    (1, 8, 16, 3, -1, 1, 3),
    (32, 2, 4, 0.5, -1, 4, 2),
    (32, 2, 4, 0.6, -1, 4, 3),  # 2.4 steps
    (32, 2, 4, 2.5, -1, 4, 10),
    (32, 2, 4, 0.01, -1, 4, 1),
    (32, 2, 4, 3, 7, 4, 7),  # max_steps wins over the epochs, below them
    (32, 2, 4, 1, 50, 4, 50),  # and above
]


@pytest.mark.parametrize(
    ("sequences", "micro_batch", "accumulation", "epochs", "max_steps", "an_epoch", "steps"), STEPS
)
def test_steps_are_those_counted_by_hand(
    sequences: int, micro_batch: int, accumulation: int, epochs: float, max_steps: int, an_epoch: int, steps: int
) -> None:
    counted = count_steps(schedule(micro_batch, accumulation, epochs, max_steps), sequences)
    assert counted == (an_epoch, steps)


@pytest.mark.parametrize(
    ("sequences", "micro_batch", "accumulation", "epochs", "max_steps", "an_epoch", "steps"),
    [STEPS[index] for index in (3, 5, 9, 12)],
)
def test_steps_are_those_that_transformers_trainer_takes(
    sequences: int,
    micro_batch: int,
    accumulation: int,
    epochs: float,
    max_steps: int,
    an_epoch: int,
    steps: int,
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
        output_dir=str(tmp_path),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=epochs,
        max_steps=max_steps,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        dataloader_pin_memory=False,
    )
    trainer = Trainer(Model(), arguments, train_dataset=[{"x": torch.ones(1)}] * sequences)
    trainer.train()
    assert (trainer.state.global_step, trainer.state.max_steps) == (steps, steps)
    assert count_steps(schedule(micro_batch, accumulation, epochs, max_steps), sequences) == (an_epoch, steps)


# Memory and disk ------------------------------------------------------------------------------------------------------

EMBEDDING = 32_000 * 4096
LINEAR = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336)


def test_all_seven_modules_of_mistral_7b_at_rank_16_are_41_943_040_weights() -> None:
    assert lora_parameters(load(), MISTRAL_7B) == 41_943_040
    assert lora_parameters(load("lora.r=8"), MISTRAL_7B) == 20_971_520
    two = "lora.target_modules=[q_proj, v_proj]"
    assert lora_parameters(load(two), MISTRAL_7B) == 32 * 16 * (4096 + 4096 + 4096 + 1024)


def test_mistral_7b_takes_about_4_gb_packed_and_14_and_a_half_expanded() -> None:
    packed, expanded = (
        memory_parts(load(f"quantization.storage={storage}"), MISTRAL_7B)["weights"]
        for storage in ("packed", "expanded")
    )
    assert packed * GIB == pytest.approx(4.1e9, rel=0.02)
    assert expanded * GIB == pytest.approx(14.5e9, rel=0.01)
    assert expanded == pytest.approx(13.5, rel=0.005)
    assert expanded * GIB == 2 * (LINEAR + 2 * EMBEDDING)


# What is set -> the part that moves, and by what factor where the arithmetic is exact (else only the direction).
LEVERS = [
    (["quantization.storage=expanded"], "weights", ">"),
    (["quantization.bnb_4bit_use_double_quant=false"], "weights", ">"),
    (["lora.r=32"], "lora_and_optimizer", 2),
    (["lora.r=8"], "lora_and_optimizer", 0.5),
    (["training.optim=paged_adamw_8bit"], "lora_and_optimizer", 10 / 16),
    (["training.optim=adamw_torch"], "lora_and_optimizer", 1),
    (["training.per_device_train_batch_size=8"], "activations", 2),
    (["training.per_device_train_batch_size=1"], "activations", 0.25),
    (["model.max_seq_length=2048"], "activations", 0.5),
    (["training.gradient_checkpointing=false"], "activations", ">"),
    (["training.gradient_accumulation_steps=64"], "activations", 1),
    (["training.per_device_eval_batch_size=64"], "activations", 1),
]


@pytest.mark.parametrize(("settings", "part", "factor"), LEVERS, ids=lambda value: str(value))
def test_each_lever_moves_its_part_of_the_memory_and_no_other(
    settings: list[str], part: str, factor: float | str
) -> None:
    before, after = memory_parts(load(), MISTRAL_7B), memory_parts(load(*settings), MISTRAL_7B)
    if isinstance(factor, str):
        assert after[part] > before[part]
    else:
        assert after[part] == pytest.approx(factor * before[part])
    assert {**after, part: 0} == {**before, part: 0}


def test_double_quantisation_saves_about_0_4_bit_a_weight_and_only_where_nf4_is_kept() -> None:
    double, single = (
        memory_parts(load(f"quantization.bnb_4bit_use_double_quant={on}"), MISTRAL_7B)["weights"]
        for on in ("true", "false")
    )
    assert (single - double) * GIB * 8 / LINEAR == pytest.approx(0.373, abs=0.001)
    on, off = (
        memory_parts(load("quantization.storage=expanded", f"quantization.bnb_4bit_use_double_quant={on}"), MISTRAL_7B)
        for on in ("true", "false")
    )
    assert on == off


def test_tied_embeddings_are_counted_once() -> None:
    tied = dataclasses.replace(MISTRAL_7B, tie_word_embeddings=True)
    untied_parts, tied_parts = memory_parts(load(), MISTRAL_7B), memory_parts(load(), tied)
    assert (untied_parts["weights"] - tied_parts["weights"]) * GIB == pytest.approx(2 * EMBEDDING)
    assert {**tied_parts, "weights": 0} == {**untied_parts, "weights": 0}


def test_float32_doubles_what_is_kept_in_the_models_dtype() -> None:
    wide = load("model.dtype=float32", "quantization.bnb_4bit_compute_dtype=float32", "training.bf16=false")
    before, after = memory_parts(load(), MISTRAL_7B), memory_parts(wide, MISTRAL_7B)
    assert after["activations"] == pytest.approx(2 * before["activations"])
    assert (after["weights"] - before["weights"]) * GIB == pytest.approx(2 * 2 * EMBEDDING)
    assert after["lora_and_optimizer"] == before["lora_and_optimizer"]  # always fp32


def test_without_checkpointing_every_layer_keeps_what_one_keeps_with_it() -> None:
    on, off = (
        memory_parts(load(f"training.gradient_checkpointing={on}"), MISTRAL_7B)["activations"]
        for on in ("true", "false")
    )
    layer_inputs = 32 * 4096 * 2 * 4 * 4096 / GIB
    assert off == pytest.approx(32 * (on - layer_inputs))
    assert off * GIB == pytest.approx(32 * 257 * 1024 * 4 * 4096)  # 257 KiB a token and layer


def test_the_loss_is_scored_in_tiles_so_a_longer_batch_costs_no_more() -> None:
    short, long, longer = (
        memory_parts(load("training.per_device_train_batch_size=1", f"model.max_seq_length={length}"), MISTRAL_7B)
        for length in (512, 1024, 4096)
    )
    assert long["loss"] == longer["loss"] == 12 * 1024 * 32_000 / GIB
    assert short["loss"] == long["loss"] / 2


def test_sdpa_on_packed_rows_pays_for_a_mask_that_grows_with_the_square_of_the_tokens() -> None:
    def mask(*settings: str) -> float | None:
        return memory_parts(load(*settings), MISTRAL_7B).get("attention_mask")

    sdpa = "model.attn_implementation=sdpa"
    assert mask() is None
    assert mask(sdpa, "training.packing=false") is None
    assert mask(sdpa) == (4 * 4096) ** 2 / GIB
    assert mask(sdpa, "model.max_seq_length=2048") == (4 * 2048) ** 2 / GIB


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
        tokens_train=180_000,
        supervised_tokens_train=90_000,
        rows_truncated=7,
        rows_dropped=14,
        sequences_train=50,
        packing_efficiency=0.8789,  # 180,000 of 50 x 4096
        effective_batch_size=16,
        steps_per_epoch=4,
        steps=12,
        warmup_steps=1,  # 0.36, rounded up
        evaluations=7,  # before the first step, then every second
        checkpoints=3,
        peak_memory_gib=0,
        memory_parts={},
        memory_available_gib=79.13,
        disk_gib=0,
        hours=None,
        certificate={"rows": 1007, "mismatches": 0},
        problems=[],
    )
    assert plan.disk_gib == 2.66


def test_the_last_step_is_evaluated_and_saved_whatever_the_interval() -> None:
    plan = planned(50, "training.max_steps=13", "training.eval_steps=2", "training.save_steps=4")
    assert (plan.evaluations, plan.checkpoints) == (1 + 7, 4)
    plan = planned(50, "training.max_steps=3")
    assert (plan.evaluations, plan.checkpoints) == (2, 1)


def test_without_packing_every_token_computed_is_a_rows_own() -> None:
    assert planned(900, "training.packing=false").packing_efficiency == 1


@pytest.mark.parametrize("settings", [[], ["model.attn_implementation=sdpa"], ["quantization.storage=expanded"]])
def test_the_parts_of_the_memory_add_up_to_the_peak(settings: list[str]) -> None:
    plan = planned(50, *settings)
    assert sum(plan.memory_parts.values()) == pytest.approx(plan.peak_memory_gib, abs=0.01)
    assert all(size > 0 for size in plan.memory_parts.values())


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


@pytest.mark.parametrize("steps", [1, 3, 4, 7, 50, 99])
def test_the_suggested_intervals_load_and_leave_no_problem(steps: int) -> None:
    tight = f"training.max_steps={steps}"
    (problem,) = planned(50, tight).problems
    settings = suggested(problem)
    assert len(settings) == 2
    plan = planned(50, tight, *settings)
    assert plan.problems == []
    assert plan.evaluations - 1 >= min(steps, 5)
    assert plan.checkpoints == plan.evaluations - 1  # each saved step has its eval_loss


def test_more_memory_than_is_free_is_a_problem_with_what_to_lower() -> None:
    busy = dataclasses.replace(H100, gpu_free_gib=10.0)
    assert planned(50, "training.max_steps=100", machine=busy).problems == [
        "13.0 GiB expected, 10.0 GiB free: lower training.per_device_train_batch_size (and raise "
        "training.gradient_accumulation_steps as much), then model.max_seq_length"
    ]


def test_memory_that_nobody_could_read_is_no_problem() -> None:
    plan = planned(50, "training.max_steps=100", machine=LAPTOP)
    assert (plan.memory_available_gib, plan.problems) == (None, [])


def test_several_problems_are_told_at_once() -> None:
    busy = dataclasses.replace(H100, gpu_free_gib=0.0)
    steps, memory = planned(50, machine=busy).problems
    assert steps.startswith("12 steps, but training.eval_steps is 100: ")
    assert memory.startswith("13.0 GiB expected, 0.0 GiB free: ")


# The command ----------------------------------------------------------------------------------------------------------

KEYS: dict[str, type | tuple[type, ...]] = {
    "rows_train": int,
    "rows_validation": int,
    "tokens_train": int,
    "supervised_tokens_train": int,
    "rows_truncated": int,
    "rows_dropped": int,
    "sequences_train": int,
    "packing_efficiency": float,
    "effective_batch_size": int,
    "steps_per_epoch": int,
    "steps": int,
    "warmup_steps": int,
    "evaluations": int,
    "checkpoints": int,
    "peak_memory_gib": float,
    "memory_parts": dict,
    "memory_available_gib": (float, type(None)),
    "disk_gib": float,
    "hours": (float, type(None)),
    "certificate": dict,
    "problems": list,
}

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
    assert document["certificate"] == {"rows": 150, "mismatches": 0}
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
    done = dry_run(tmp_path, "echo 'NVIDIA H100 80GB HBM3, 81079'")
    assert done.returncode == 0, done.stderr
    here, there = json.loads(on_laptop[1].stdout), json.loads(done.stdout)
    assert (here.pop("memory_available_gib"), there.pop("memory_available_gib")) == (None, 79.18)
    assert here == there
