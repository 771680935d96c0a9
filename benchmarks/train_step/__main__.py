"""Tokens a second of one optimizer step, ours beside the trainers that a user would pick instead, on the same rows.

    docker compose run --rm --volume "$PWD/benchmarks:/app/benchmarks" --entrypoint python train-h100 \\
        benchmarks/train_step --output benchmarks/results/NAME.json

on an H100, in the image, with random weights of Mistral-7B's shape that are made on the GPU; without Docker,
.venv/bin/python in the place of everything before the script. Liger and unsloth are no part of the image: where they
lie in a folder below benchmarks, --env PYTHONPATH=benchmarks/FOLDER. On any CPU, in a few minutes:

    .venv/bin/python benchmarks/train_step --tiny

Every variant (variants.py) trains on the same base, rows, seed and learning rate, in a process of its own, in rounds
one after the other. Rows are "mixed", as long as chats are, or "full", without anything to pad or to pack. Tokens are
counted without padding. Losses are compared at dropout 0; exit code 1 where they disagree or a variant fails.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.extend([str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2] / "src")])
from machine import describe

from finetune.cli import quiet_libraries
from finetune.machine.inspect import read_machine
from finetune.machine.platforms import PLATFORMS, choose
from train_step.job import run_in_a_process
from train_step.report import check_losses, ratios, show, summary, throughput
from train_step.rows import Shape
from train_step.variants import GEOMETRIES, VARIANTS, Job, choose_attention, job_config

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")
DATA = ("mixed", "full")
# configs/training_config_h100.yaml's step, and what two CPU cores do in a few minutes.
SHAPES = {"7b": Shape(4, 4, 4096), "demo": Shape(2, 1, 256), "tiny": Shape(4, 2, 64)}


def plan(options: argparse.Namespace, platform: str) -> list[Job]:
    """The jobs in their order: losses first, then rounds of speed, each round through all variants and data."""
    shape = SHAPES[options.geometry]
    small = Shape(shape.micro_batch, 1, shape.length)
    common = {"geometry": options.geometry, "platform": platform}
    jobs = [
        Job(name, "losses", "mixed", shape=small, warmup=0, steps=options.loss_steps, profiled=False, **common)
        for name in options.variant
    ]
    for number in range(options.repeats):
        timed = {"warmup": options.warmup, "steps": options.steps, "profiled": number == 0}
        jobs += [Job(name, "speed", data, shape=shape, **timed, **common) for data in DATA for name in options.variant]
    return jobs


def measure(jobs: Iterable[Job]) -> list[dict[str, Any]]:
    """Run them in order; one line each on stderr. After a variant has failed, its other jobs are left out."""
    results, failed = [], set()
    for job in jobs:
        if job.variant in failed:
            continue
        result = {"variant": job.variant, "task": job.task, "data": job.data} | run_in_a_process(job)
        if "failed" in result:
            failed.add(job.variant)
        results.append(result)
        seconds = result.get("failed") or f"{sum(result['step_seconds']):.1f} s in {job.all_steps} steps"
        print(f"{job.variant:<12}{job.task:<8}{job.data:<8}{seconds}", file=sys.stderr, flush=True)
    return results


def document(options: argparse.Namespace, platform: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """What is written: the machine, each variant, the ratios, the comparison of losses, and what the plan may use."""
    head = describe(command_line(options), PACKAGES)
    done = [result for result in results if "failed" not in result]
    if done and platform == "h100":
        head["machine"]["gpu"] = done[0]["device"]
    geometry = GEOMETRIES[options.geometry]
    attention = choose_attention(PLATFORMS[platform])
    speeds = [result for result in done if result["task"] == "speed"]
    configs = {result["variant"]: job_config(_job(result), VARIANTS[result["variant"]], attention) for result in speeds}
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
    """What to type for the same again, wherever the result is written."""
    counts = {name: vars(options)[name.replace("-", "_")] for name in ("repeats", "warmup", "steps", "loss-steps")}
    words = [f"--geometry {options.geometry}", *(f"--{name} {count}" for name, count in counts.items())]
    words += [f"--variant {name}" for name in options.asked]
    return " ".join(["benchmarks/train_step", *words])


def _job(result: dict[str, Any]) -> Job:
    names = Job.__dataclass_fields__
    return Job(**{name: result[name] for name in names} | {"shape": Shape(**result["shape"])})


def arguments(command: list[str]) -> argparse.Namespace:
    """The command line; `variant` are the names that can run here, `left_out` the others with the reason."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="7b", help="shape of the base (default 7b)")
    parser.add_argument("--tiny", action="store_true", help="--geometry tiny, few steps: everything once, on a CPU")
    parser.add_argument(
        "--variant", choices=VARIANTS, action="append", dest="asked", default=[], help="only this one; may repeat"
    )
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the timed ones (default 2)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps a round (default 3)")
    parser.add_argument("--loss-steps", type=int, default=20, help="steps whose losses are compared (default 20)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    parser.add_argument("--output", type=Path, help="also write the result there")
    options = parser.parse_args(command)
    if options.tiny:
        options.geometry, options.repeats, options.warmup, options.steps = "tiny", 2, 1, 1
    if min(options.repeats, options.warmup, options.steps, options.loss_steps) < 1:
        parser.error("--repeats, --warmup, --steps and --loss-steps are 1 or more")
    return options


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
    if platform.name == "cpu":
        for library in (*PACKAGES, "datasets"):
            importlib.import_module(library)
    found = document(options, platform.name, measure(plan(options, platform.name)))
    print(show(found), file=sys.stderr)
    if options.json:
        print(json.dumps(found))
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    failed = any("failed" in variant for variant in found["variants"].values())
    return 1 if failed or not found["losses"]["agree"] else 0


if __name__ == "__main__":
    sys.exit(main())
