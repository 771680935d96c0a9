"""Measure tokens per second of an optimizer step, ours and other trainers', on the same rows.

    docker compose run --rm --volume "$PWD/benchmarks:/app/benchmarks" --entrypoint "as-owner python" train-h100 \\
        benchmarks/train_step --output benchmarks/results/NAME.json

on an H100, in the image, with random weights of Mistral-7B's shape that are created on the GPU; without Docker, replace
everything before the script by .venv/bin/python. Liger and unsloth are not in the image: install them in a folder
of benchmarks and add --env PYTHONPATH=benchmarks/FOLDER. On any CPU, in a few minutes:

    .venv/bin/python benchmarks/train_step --tiny

Every variant (variants.py) trains on the same base, rows, seed and learning rate, in its own process, in rounds. Rows
are "mixed", with the lengths of chats, or "full", with nothing to pad or pack. Tokens are counted without padding.
Losses are compared at dropout 0. The result is written after each job; --minutes skips the jobs for which no time is
left, the least important ones. The exit code is 1 if a variant fails; losses that differ are only reported.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
import machine

from finetune.cli import quiet_libraries
from finetune.files import write_json
from finetune.machine.inspect import read_machine
from finetune.machine.platforms import choose
from finetune.prove.result import describe
from train_step.job import run_in_a_process
from train_step.report import check_losses, ratios, show, summary, throughput
from train_step.rows import Shape
from train_step.variants import GEOMETRIES, VARIANTS, Job, job_config

PACKAGES = (*machine.PACKAGES, "accelerate")
DATA = ("mixed", "full")
# configs/training_config_h100.yaml's step, and two that take two CPU cores a few minutes.
SHAPES = {"7b": Shape(4, 4, 4096), "demo": Shape(2, 1, 256), "tiny": Shape(4, 2, 64)}


def plan(options: argparse.Namespace, platform: str) -> list[Job]:
    """Return the jobs in order: each variant's losses and first speeds, then rounds of speed of all variants."""
    shape = SHAPES[options.geometry]
    small = Shape(shape.micro_batch, 1, shape.length)
    common = {"geometry": options.geometry, "platform": platform, "bf16": options.bf16}

    def speeds(name: str, number: int) -> list[Job]:
        timed = {"warmup": options.warmup, "steps": options.steps, "profiled": number == 0}
        return [Job(name, "speed", data, shape=shape, **timed, **common) for data in options.data or DATA]

    jobs = []
    for name in options.variant:
        steps = {"warmup": 0, "steps": options.loss_steps, "profiled": False}
        jobs += [Job(name, "losses", "mixed", shape=small, **steps, **common)]
        jobs += speeds(name, 0) if options.repeats else []
    return jobs + [
        job for number in range(1, options.repeats) for name in options.variant for job in speeds(name, number)
    ]


def measure(jobs: Iterable[Job], minutes: float) -> Iterator[dict[str, Any]]:
    """Run the jobs in order, with one line each on stderr; skip the other jobs of a variant that failed.

    Stop before a job that would end later than `minutes` after the start if it took as long as the longest so far.
    """
    started, longest, failed = time.monotonic(), 0.0, set()
    for job in jobs:
        begun = time.monotonic()
        if begun + longest > started + 60 * minutes:
            print(f"no time left for {job.variant} {job.task} {job.data} and the jobs after it", file=sys.stderr)
            return
        if job.variant in failed:
            continue
        result = {"variant": job.variant, "task": job.task, "data": job.data} | run_in_a_process(job)
        if "failed" in result:
            failed.add(job.variant)
        longest = max(longest, time.monotonic() - begun)
        seconds = result.get("failed") or f"{sum(result['step_seconds']):.1f} s in {job.all_steps} steps"
        print(f"{job.variant:<12}{job.task:<8}{job.data:<8}{seconds}", file=sys.stderr, flush=True)
        yield result


def document(options: argparse.Namespace, platform: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the result: machine, variants, ratios, the comparison of losses, and what the plan may use."""
    head = describe(command_line(options), PACKAGES)
    done = [result for result in results if "failed" not in result]
    if done and platform == "h100":
        head["machine"]["gpu"] = done[0]["device"]
    geometry = GEOMETRIES[options.geometry]
    speeds = [result for result in done if result["task"] == "speed"]
    configs = {result["variant"]: job_config(_job(result), VARIANTS[result["variant"]]) for result in speeds}
    variants = summary(results, configs, geometry)
    variants |= {name: {"what": VARIANTS[name].what, "left_out": why} for name, why in options.left_out.items()}
    found = {
        **head,
        "geometry": {"name": options.geometry, **vars(geometry)},
        "step": vars(SHAPES[options.geometry]),
        "rounds": options.repeats,
        "variants": variants,
        "ratios": ratios(variants),
        "losses": check_losses(results),
    }
    entries = throughput(variants, configs, geometry) if found["losses"]["agree"] else []
    return found | ({"throughput": entries} if entries else {})


def command_line(options: argparse.Namespace) -> str:
    """Return the command line that repeats the measurement, without --output."""
    counts = {name: vars(options)[name.replace("-", "_")] for name in ("repeats", "warmup", "steps", "loss-steps")}
    words = [f"--geometry {options.geometry}", *(f"--{name} {count}" for name, count in counts.items())]
    words += [f"--variant {name}" for name in options.asked] + [f"--data {name}" for name in options.data]
    words += ["--bf16"] * options.bf16 + [f"--minutes {options.minutes:g}"] * (options.minutes < math.inf)
    return " ".join(["benchmarks/train_step", *words])


def _job(result: dict[str, Any]) -> Job:
    names = Job.__dataclass_fields__
    return Job(**{name: result[name] for name in names} | {"shape": Shape(**result["shape"])})


def arguments(command: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = machine.parser(__doc__)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="7b", help="shape of the base (default 7b)")
    parser.add_argument("--tiny", action="store_true", help="--geometry tiny, few steps: everything once, on a CPU")
    parser.add_argument(
        "--variant", choices=VARIANTS, action="append", dest="asked", default=[], help="only this one; may repeat"
    )
    parser.add_argument("--data", choices=DATA, action="append", default=[], help="only these rows; may repeat")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default 3); 0 compares losses only")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the timed ones (default 2)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps a round (default 3)")
    parser.add_argument("--loss-steps", type=int, default=20, help="steps whose losses are compared (default 20)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no job that would take longer")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, also on a CPU")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    options = parser.parse_args(command)
    if options.tiny:
        options.geometry, options.repeats, options.warmup, options.steps = "tiny", 1, 1, 1
    if min(options.repeats + 1, options.warmup, options.steps, options.loss_steps) < 1:
        parser.error("--warmup, --steps and --loss-steps are 1 or more, --repeats is 0 or more")
    return options


def import_what_jobs_share() -> None:
    """Import and create before the forks what each job would otherwise import and create again."""
    for library in (*PACKAGES, "datasets", "trl.trainer.sft_trainer", "finetune.training.trainer"):
        importlib.import_module(library)
    machine.tokenizer()


def main() -> int:
    options = arguments(sys.argv[1:])
    platform, why = choose(read_machine())
    if options.geometry == "7b" and platform.name == "cpu":
        print(f"{why}: a step of --geometry 7b would take hours; try --tiny or --geometry demo", file=sys.stderr)
        return 2
    wanted = options.asked or list(VARIANTS)
    options.left_out = {name: missing for name in wanted if (missing := VARIANTS[name].missing(platform))}
    options.variant = [name for name in wanted if name not in options.left_out]
    quiet_libraries()
    if options.geometry == "tiny":
        os.environ["OMP_NUM_THREADS"] = "1"  # threads slow such small products, on a busy machine 30 times
    if platform.name == "cpu":
        import_what_jobs_share()
    results: list[dict[str, Any]] = []
    found = document(options, platform.name, results)
    for result in measure(plan(options, platform.name), options.minutes):
        results.append(result)
        found = document(options, platform.name, results)
        if options.output:
            write_json(options.output, found)
    print(show(found), file=sys.stderr)
    if options.json:
        print(json.dumps(found))
    return 1 if any("failed" in variant for variant in found["variants"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
