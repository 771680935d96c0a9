"""Runs one job of benchmarks/train_step in its own process: a few steps, timed and profiled."""

from __future__ import annotations

import importlib
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune.files import GIB
from finetune.machine.device import forget_memory, peak_memory_gib, prepare_device, synchronize
from finetune.machine.platforms import PLATFORMS, Platform
from finetune.prove.process import Ended, run_alone
from train_step.rows import make_steps, padding_share
from train_step.variants import GEOMETRIES, VARIANTS, Job, Work, job_config

ROWS_SEED = 20


def run_in_a_process(job: Job) -> dict[str, Any]:
    """Return the job's result, or {"failed": how its process ended}; on a CPU the process is forked."""
    try:
        result: dict[str, Any] = run_alone(run_job, job, fork=job.platform == "cpu")
    except Ended as end:
        print(end.log[-6000:], file=sys.stderr)
        return {"failed": end.found}
    return result


def run_job(job: Job) -> dict[str, Any]:
    """Train the job's steps; return seconds and losses of each step, including warm-up, and memory in GiB."""
    variant, platform = VARIANTS[job.variant], PLATFORMS[job.platform]
    if variant.library:
        importlib.import_module(variant.library)  # unsloth must be imported before the libraries it patches
    config, geometry = job_config(job, variant), GEOMETRIES[job.geometry]
    prepare_device(platform)
    steps = make_steps(job.data, job.shape, geometry.vocab_size, job.all_steps, ROWS_SEED)
    with tempfile.TemporaryDirectory(prefix="train-step-") as folder:
        trainer = variant.make(Work(variant, job, config, geometry, platform, steps, Path(folder)))
        forget_memory(platform)
        clock = make_clock(platform, job)
        losses = record_losses(trainer)
        trainer.add_callback(clock)
        trainer.train()
    return {
        **asdict(job),
        "attention": trainer.model.get_base_model().config._attn_implementation,
        "padding": 0.0 if variant.packed else padding_share(steps, job.shape.micro_batch),
        "row_lengths": [step.lengths for step in steps],
        "step_seconds": clock.seconds,
        "losses": [float(sum(losses[step])) for step in sorted(losses)],
        "memory_gib": clock.memory_gib,
        "parts_ms": clock.parts_ms,
        "checkpointed_layers": checkpointed_layers(trainer.model),
        "dtype": config.model.dtype,
        "device": device_name(platform),
    }


def record_losses(trainer: Any) -> dict[int, list[Any]]:
    """Return the losses of each step's micro-batches, whose sum is the step's loss; training fills them in."""
    found: dict[int, list[Any]] = {}
    train_a_batch = trainer.training_step

    def training_step(*arguments: Any, **named: Any) -> Any:
        loss = train_a_batch(*arguments, **named)
        found.setdefault(trainer.state.global_step, []).append(loss.detach())
        return loss

    trainer.training_step = training_step
    return found


def checkpointed_layers(model: Any) -> int:
    """Return how many decoder layers recompute their forward pass."""
    layers = model.get_base_model().model.layers
    return sum(bool(layer.gradient_checkpointing and layer.training) for layer in layers)


def device_name(platform: Platform) -> str:
    """Return the GPU's name, or the platform's label."""
    import torch

    return str(torch.cuda.get_device_name(0)) if platform.name == "h100" else platform.label


def memory_gib(platform: Platform) -> dict[str, float]:
    """Return peaks of allocated and reserved memory, and the device's use; without a GPU the resident peak."""
    if platform.name != "h100":
        return {"resident": peak_memory_gib(platform)}
    import torch

    free, total = torch.cuda.mem_get_info()
    return {
        "allocated": peak_memory_gib(platform),
        "reserved": torch.cuda.max_memory_reserved() / GIB,
        "device": (total - free) / GIB,
    }


def make_clock(platform: Platform, job: Job) -> Any:
    """Return a callback that times each step from the end of the previous one, and profiles the last if asked."""
    import torch
    from transformers import TrainerCallback

    from train_step.parts import milliseconds

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.memory_gib: dict[str, float] = {}
            self.parts_ms: dict[str, float] | None = None
            self.profile: Any = None

        def on_train_begin(self, *_arguments: Any, **_named: Any) -> None:
            self.last = time.perf_counter()

        def on_step_end(self, *_arguments: Any, **_named: Any) -> None:
            synchronize(platform)
            now = time.perf_counter()
            self.seconds.append(now - self.last)
            if self.profile is not None:
                self.profile.stop()
                self.parts_ms = milliseconds(self.profile, 1000 * self.seconds[-1])
            if len(self.seconds) == job.warmup + job.steps:
                self.memory_gib = memory_gib(platform)
                if job.profiled:
                    self.profile = torch.profiler.profile()
                    self.profile.start()
            self.last = time.perf_counter()

    return Clock()
