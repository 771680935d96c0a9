"""benchmarks/train_step: the same rows for everybody, honest arithmetic, and losses that are really compared."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune.machine.platforms import PLATFORMS

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from train_step.parts import milliseconds, part_of  # noqa: E402
from train_step.report import check_losses, ratios, speed, throughput  # noqa: E402
from train_step.rows import Shape, make_steps, padding_share  # noqa: E402
from train_step.variants import GEOMETRIES, VARIANTS, Job, job_config  # noqa: E402

from support.throughput import ENTRY  # noqa: E402

TINY = GEOMETRIES["tiny"]
ON_CUDA = ("C", "C-packed", "D-varlen", "E", "E-0")


# Rows -----------------------------------------------------------------------------------------------------------------


def test_mixed_rows_are_as_long_as_chats_are_and_fill_the_step_of_the_h100() -> None:
    steps = make_steps("mixed", Shape(4, 4, 4096), 32000, 8, seed=20)
    lengths = [length for step in steps for length in step.lengths]
    assert {len(step.rows) for step in steps} == {128}
    assert {len(step.sequences) for step in steps} == {16}
    assert 460 < sum(lengths) / len(lengths) < 510
    assert max(lengths) <= 4096
    assert sum(lengths) / (8 * 16 * 4096) > 0.93  # of the packed sequences are tokens
    assert 0.4 < padding_share(steps, 4) < 0.65


def test_the_same_seed_gives_the_same_rows() -> None:
    one, two = (make_steps("mixed", Shape(2, 2, 64), 1000, 2, seed=1) for _ in range(2))
    assert one == two
    assert make_steps("mixed", Shape(2, 2, 64), 1000, 2, seed=2) != one


def test_full_rows_leave_nothing_to_pad_or_to_pack() -> None:
    (step,) = make_steps("full", Shape(2, 3, 64), 1000, 1, seed=1)
    assert step.lengths == [64] * 6
    assert step.sequences == [[index] for index in range(6)]
    assert padding_share([step], 2) == 0


# The profile ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (["nvjet_tst_256x128_64x4_2x1_v_bz_coopB_TNT"], "matmul"),
        (["void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>"], "attention"),
        (["void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>"], "dequantize"),
        (["void kOptimizer32bit2State<float, 1>"], "optimizer"),
        (["void at::native::vectorized_elementwise_kernel<4, at::native::MulFunctor>"], "element-wise"),
        (["cudaLaunchKernel"], "other"),
        (["aten::mm", "aten::matmul", "aten::linear"], "matmul"),
        (["aten::mul", "bitsandbytes::dequantize_4bit", "MatMul4Bit"], "dequantize"),
        (["aten::bmm", "aten::_scaled_dot_product_attention_math"], "attention"),
    ],
)
def test_what_a_kernel_or_operator_is_called_says_its_part(names: list[str], part: str) -> None:
    assert part_of(names) == part


def test_a_real_profile_is_told_apart_to_the_last_millisecond() -> None:
    import torch

    weight = torch.nn.Parameter(torch.randn(600, 600))
    optimizer = torch.optim.AdamW([weight], foreach=False)
    with torch.profiler.profile() as profile:
        torch.nn.functional.silu(weight @ weight).sum().backward()
        optimizer.step()
    found = milliseconds(profile, 10_000)
    assert min(found[part] for part in ("matmul", "element-wise", "optimizer")) > 0
    assert found["dequantize"] == found["attention"] == 0
    assert sum(found.values()) == pytest.approx(10_000)


# The comparison -------------------------------------------------------------------------------------------------------


def losses(*runs: list[float], dtype: str = "float32") -> dict[str, Any]:
    names = ("A", "B", "D")
    return check_losses(
        [
            {"variant": name, "task": "losses", "losses": run, "dtype": dtype}
            for name, run in zip(names, runs, strict=False)
        ]
    )


@pytest.mark.parametrize("others", [[6.9002, 6.8], [6.9, 6.5], [6.9, float("nan")], [float("nan"), 6.8]])
def test_a_variant_whose_loss_is_another_is_named_and_the_comparison_fails(others: list[float]) -> None:
    assert losses([6.9, 6.8], [6.9, 6.8])["agree"]
    found = losses([6.9, 6.8], others, [6.9, 6.8])
    assert (found["agree"], found["against"]) == (False, "A")
    assert {name: entry["agrees"] for name, entry in found["variants"].items()} == {"A": True, "B": False, "D": True}


def test_a_reference_that_is_not_a_number_agrees_with_nothing() -> None:
    nothing = float("nan")
    assert not losses([nothing, nothing], [nothing, nothing])["agree"]


def test_no_losses_are_no_agreement() -> None:
    assert check_losses([]) == {"agree": False, "why": "no variant gave any"}


def test_a_ratio_is_ours_over_theirs_and_of_the_same_rows() -> None:
    speeds = {"A": 100.0, "B": 200.0, "D": 300.0, "D-expanded": 330.0}
    variants = {name: {"mixed": {"tokens_per_second": speed}} for name, speed in speeds.items()}
    variants["C"] = {"left_out": "needs CUDA"}  # type: ignore[dict-item]
    variants["D"]["full"] = {"tokens_per_second": 500.0}
    assert ratios(variants) == {
        "mixed": {"D/A": 3.0, "D/B": 1.5, "D-expanded/A": 3.3, "D-expanded/B": 1.65, "D-expanded/D": 1.1},
        "full": {},
    }


# What the plan may use ------------------------------------------------------------------------------------------------

MEASURED = {"D": {"mixed": {"tokens_per_second": 5000.0, "checkpointed_layers": 32}}}
JOB = Job("D", "speed", "mixed", "7b", "h100", Shape(4, 4, 4096), 2, 3, False)


def entries(job: Job = JOB, attention: str = "flash_attention_2", variant: str = "D") -> list[dict[str, Any]]:
    config = job_config(job, VARIANTS[variant], attention)
    return throughput(MEASURED, {"D": config}, GEOMETRIES[job.geometry])


def test_a_run_of_ours_as_shipped_on_an_h100_is_a_speed_that_the_plan_can_use() -> None:
    assert entries() == [ENTRY | {"tokens_per_second": 5000.0, "eval_tokens_per_second": None}]


def test_with_all_levers_it_is_one_more_and_the_last() -> None:
    tuned = {"D-all": {"mixed": {"tokens_per_second": 9000.0, "checkpointed_layers": 2}}}
    configs = {name: job_config(JOB, VARIANTS[name], "flash_attention_2") for name in ("D", "D-all")}
    levers = {"fused_lora": True, "fused_kernels": True, "checkpointed_layers": 2, "tokens_per_second": 9000.0}
    assert throughput(MEASURED | tuned, configs, GEOMETRIES["7b"])[-1] == entries()[0] | levers


@pytest.mark.parametrize(
    "other",
    [
        {"job": replace(JOB, geometry="demo")},
        {"job": replace(JOB, shape=Shape(4, 4, 2048))},
        {"job": replace(JOB, shape=Shape(2, 4, 4096))},
        {"job": replace(JOB, task="losses")},
        {"job": replace(JOB, geometry="tiny", platform="cpu", shape=Shape(4, 2, 64)), "attention": "sdpa"},
        {"attention": "sdpa"},
        {"variant": "D-expanded"},
    ],
)
def test_any_other_run_is_none(other: dict[str, Any]) -> None:
    assert entries(**other) == []


# The table of variants ------------------------------------------------------------------------------------------------


def test_what_needs_an_nvidia_gpu_or_a_library_says_so() -> None:
    on_cpu = {name: row.missing(PLATFORMS["cpu"]) for name, row in VARIANTS.items()}
    assert {name for name, why in on_cpu.items() if why == "needs CUDA"} == set(ON_CUDA)
    assert {why for name, why in on_cpu.items() if name not in ON_CUDA} == {None}
    without = replace(VARIANTS["C"], library="no_such_library")
    assert without.missing(PLATFORMS["h100"]) == "no_such_library is not installed"


@pytest.mark.parametrize(
    ("variant", "platform"),
    [*((name, "h100") for name in VARIANTS), *((name, "cpu") for name in VARIANTS if name not in ON_CUDA)],
)
@pytest.mark.parametrize("task", ["losses", "speed"])
def test_every_variant_has_a_config_that_its_platform_takes(variant: str, task: str, platform: str) -> None:
    job = replace(JOB, variant=variant, task=task, platform=platform)
    config = job_config(job, VARIANTS[variant], "sdpa")
    assert config.training.gradient_checkpointing
    assert config.lora.lora_dropout == (0 if task == "losses" or variant == "E-0" else 0.05)


def tiny_loss(steps: list[Any], leak: bool = False) -> float:
    """The random model's loss on one packed step, without LoRA; with `leak`, its rows see each other."""
    import torch

    from finetune.prove.random_base import make_base

    job = replace(JOB, geometry="tiny", platform="cpu", shape=Shape(4, 1, 64))
    base = make_base(job_config(job, VARIANTS["D"], "sdpa"), TINY, PLATFORMS["cpu"])
    (members, *_) = steps[0].sequences
    rows = [steps[0].rows[index] for index in members]
    ids = [token for row in rows for token in row]
    places = range(len(ids)) if leak else [place for row in rows for place in range(len(row))]
    labels = [token for row in rows for token in [-100, *row[1:]]]
    tensors = {"input_ids": ids, "position_ids": list(places), "labels": labels}
    with torch.no_grad():
        output = base(**{name: torch.tensor([values]) for name, values in tensors.items()}, use_cache=False)
    return float(output.loss)


def test_rows_that_see_each_other_are_further_off_than_is_tolerated() -> None:
    steps = make_steps("mixed", Shape(4, 1, 64), TINY.vocab_size, 1, 1)
    assert len(steps[0].sequences[0]) > 1
    apart, leaked = tiny_loss(steps), tiny_loss(steps, leak=True)
    assert not losses([apart], [leaked])["agree"]


# The command ----------------------------------------------------------------------------------------------------------


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "train_step"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_7b_on_a_cpu_is_refused_with_what_to_try(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from train_step import __main__ as train_step

    monkeypatch.setattr(train_step, "read_machine", lambda: None)
    monkeypatch.setattr(train_step, "choose", lambda _machine: (PLATFORMS["cpu"], "found no NVIDIA driver"))
    monkeypatch.setattr(sys, "argv", ["train_step"])
    assert train_step.main() == 2
    expected = "found no NVIDIA driver: a step of --geometry 7b would take hours; try --tiny or --geometry demo\n"
    assert capsys.readouterr().err == expected


def test_a_process_that_dies_is_a_result_and_ends_its_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    from train_step import __main__ as train_step

    jobs = [replace(JOB, variant=name, platform="cpu", data=data) for data in ("mixed", "full") for name in ("A", "D")]

    def run_in_a_process(job: Job) -> dict[str, Any]:
        return {"failed": "exit code -9: without a word"} if job.variant == "A" else {"step_seconds": [1.0]}

    monkeypatch.setattr(train_step, "run_in_a_process", run_in_a_process)
    results = list(train_step.measure(jobs, math.inf))
    assert [(result["variant"], result["data"], "failed" in result) for result in results] == [
        ("A", "mixed", True),
        ("D", "mixed", False),
        ("D", "full", False),
    ]


def test_no_job_begins_that_would_end_too_late(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from train_step import __main__ as train_step

    clock = iter(range(0, 1000, 10))  # it is read before a job, after it, and once at the start: a job takes 10 s
    monkeypatch.setattr(train_step.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(train_step, "run_in_a_process", lambda _job: {"step_seconds": [1.0]})
    jobs = [replace(JOB, data=data) for data in ("mixed", "full")]
    assert len(list(train_step.measure(jobs, minutes=40 / 60))) == 2
    assert [result["data"] for result in train_step.measure(jobs, minutes=39 / 60)] == ["mixed"]
    assert capsys.readouterr().err.endswith("no time left for D speed full and the jobs after it\n")


def measured(monkeypatch: pytest.MonkeyPatch, losses: Callable[[str], list[float]], names: str, *argv: str) -> int:
    """The command's exit code where a job of each variant is planned and gives these losses."""
    from train_step import __main__ as train_step

    def run_in_a_process(job: Job) -> dict[str, Any]:
        made = {"step_seconds": [1.0], "losses": losses(job.variant), "dtype": "float32"}
        return vars(job) | {"shape": vars(job.shape)} | made

    monkeypatch.setattr(train_step, "run_in_a_process", run_in_a_process)
    monkeypatch.setattr(train_step, "import_what_jobs_share", lambda: None)
    monkeypatch.setattr(train_step, "choose", lambda _machine: (PLATFORMS["cpu"], "here"))
    monkeypatch.setattr(train_step, "plan", lambda *_: [replace(JOB, variant=name, task="losses") for name in names])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "argv", ["train_step", "--tiny", *argv])
    return train_step.main()


def test_what_was_measured_is_written_after_each_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process that is killed in its third job leaves two."""
    path, seen = tmp_path / "result.json", []

    def losses(_variant: str) -> list[float]:
        seen.append(len(json.loads(path.read_text())["losses"]["variants"]) if path.is_file() else 0)
        return [6.9]

    names = [word for name in ("D", "B", "A") for word in ("--variant", name)]
    assert measured(monkeypatch, losses, "DBA", *names, "--output", str(path)) == 0
    assert seen == [0, 1, 2]


def test_losses_that_disagree_are_reported_and_no_failure(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert measured(monkeypatch, lambda variant: [6.9] if variant == "D" else [7.0], "DA", "--json") == 0
    shown = capsys.readouterr()
    assert "A           7.0000 -> 7.0000  1.4e-02  1.4e-02  DISAGREES" in shown.err
    found = json.loads(shown.out)
    assert not found["losses"]["agree"]
    assert "throughput" not in found


def test_the_speed_of_rounds_is_their_median_and_memory_the_most_of_any() -> None:
    first = {"warmup": 1, "steps": 2, "row_lengths": [[9], [60], [40]], "checkpointed_layers": 2, "padding": 0.0}
    first |= {"attention": "sdpa", "device": "CPU only", "parts_ms": {"matmul": 1.0}}
    rounds = [
        first | {"step_seconds": [9.0, *seconds], "memory_gib": {"resident": gib}}
        for seconds, gib in (([1.0, 1.0], 1.0), ([2.0, 3.0], 3.0), ([4.0, 6.0], 2.0))
    ]
    config = job_config(JOB, VARIANTS["D"], "sdpa")
    found = speed(rounds, config, TINY)
    assert found["tokens_per_second_of_rounds"] == [50.0, 20.0, 10.0]
    assert found["tokens_per_second"] == 20.0
    assert found["ms_per_step"] == 2500.0
    assert found["memory_gib"] == {"resident": 3.0}


@pytest.mark.slow
def test_tiny_runs_everything_on_a_cpu_and_all_losses_agree(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    done = run("--tiny", "--output", str(path))
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["losses"]["agree"]
    assert found["losses"]["against"] == "D"
    assert "throughput" not in found
    left_out = {name: entry["left_out"] for name, entry in found["variants"].items() if "left_out" in entry}
    assert left_out == dict.fromkeys(ON_CUDA, "needs CUDA")
    assert "C: B with Liger's kernels: needs CUDA" in done.stderr
    check_tiny(found)


def check_tiny(found: dict[str, Any]) -> None:
    ran = {name: entry for name, entry in found["variants"].items() if "left_out" not in entry}
    ours = {"D", "D-auto", "D-lora", "D-kernels", "D-all", "D-expanded"}
    assert set(found["losses"]["variants"]) == set(ran) == {"A", "B", "B-packed", *ours}
    for name, entry in ran.items():
        given = found["losses"]["variants"][name]["losses"]
        assert len(given) == 20
        assert given[-1] < given[0] - 0.1  # it learns, so that the losses of a broken backward pass would part
        for data in ("mixed", "full"):
            assert (entry[data]["padding"] > 0.2) == (data == "mixed" and name in ("A", "B"))
            assert len(entry[data]["tokens_per_second_of_rounds"]) == 1
            whole = name in ("D-auto", "D-all")  # memory is there for every layer of so small a model
            assert entry[data]["checkpointed_layers"] == (0 if whole else TINY.num_hidden_layers)
            assert entry[data]["profiled_step_ms"]["matmul"] > 0
    assert {entry["mixed"]["tokens_per_step"] for entry in ran.values()} == {ran["A"]["mixed"]["tokens_per_step"]}
    assert {"D/A", "D/B", "D/B-packed"} < set(found["ratios"]["mixed"])


def test_one_variant_alone_can_be_asked_for() -> None:
    from train_step import __main__ as train_step

    options = train_step.arguments(["--tiny", "--variant", "D", "--variant", "A", "--output", "somewhere"])
    again = "--geometry tiny --repeats 1 --warmup 1 --steps 1 --loss-steps 20 --variant D --variant A"
    assert train_step.command_line(options) == f"benchmarks/train_step {again}"
    options.variant, options.repeats = options.asked, 2
    jobs = [(job.variant, job.task, job.data, job.profiled) for job in train_step.plan(options, "cpu")]
    first = [
        (name, task, data, task == "speed")
        for name in ("D", "A")
        for task, data in (("losses", "mixed"), ("speed", "mixed"), ("speed", "full"))
    ]
    assert jobs == first + [(name, "speed", data, False) for name in ("D", "A") for data in ("mixed", "full")]


def test_rows_of_one_kind_bfloat16_and_minutes_can_be_asked_for() -> None:
    from train_step import __main__ as train_step

    words = ["--variant", "D", "--data", "full", "--bf16", "--minutes", "7.5"]
    options = train_step.arguments(words)
    again = (
        "--geometry 7b --repeats 3 --warmup 2 --steps 3 --loss-steps 20 --variant D --data full --bf16 --minutes 7.5"
    )
    assert train_step.command_line(options) == f"benchmarks/train_step {again}"
    options.variant = options.asked
    jobs = train_step.plan(options, "cpu")
    assert {job.data for job in jobs if job.task == "speed"} == {"full"}
    config = job_config(jobs[0], VARIANTS["D"], "sdpa")
    assert (config.model.dtype, config.training.bf16) == ("bfloat16", True)


def test_what_is_worth_most_comes_first() -> None:
    assert list(VARIANTS)[:7] == ["D", "D-all", "B-packed", "B", "C-packed", "C", "A"]
