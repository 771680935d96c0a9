"""Folders of runs as train.py leaves them, made without a training, so that a page of each kind can be looked at."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from finetune.config.base_model import MISTRAL
from finetune.config.load import load_config
from finetune.config.yaml_file import dump

BEGAN = 1_772_366_400  # 2026-03-01 12:00 UTC
HASH = "5d" * 32
SAMPLES = [
    {"prompt": "How do I make tea?", "base": "To make tea, consider the following:", "tuned": "Keeper's log: boil it."},
    {"prompt": "Why is the sky blue?", "base": "", "tuned": "Keeper's log: light is scattered."},
]
PASSED = {"status": "pass", "checks": [{"name": "finite", "status": "pass", "detail": "28 of 28 tensors"}]}


def start(minutes: tuple[int, int | None], steps: tuple[int, int | None], end: str | None) -> dict[str, Any]:
    """One entry of the manifest's `starts`."""
    begun, ended = (minute and f"2026-03-01T{12 + minute // 60:02}:{minute % 60:02}:00+00:00" for minute in minutes)
    begun = begun or "2026-03-01T12:00:00+00:00"
    nothing = {"changed": [], "set_aside": [], "rehearsal": None}
    return {"started": begun, "from_step": steps[0], "ended": ended, "step": steps[1], "end": end, **nothing}


def rows(number: int, **more: Any) -> dict[str, Any]:
    """One split's part of the manifest's `rows`."""
    none = dict.fromkeys(("truncated", "dropped_long", "duplicates", "control_tokens", "normalized_leaks"), 0)
    lengths = {"p50": 140, "p95": 390, "longest": 9000, "encoded": number, "certified": number, "dropped_bad": []}
    return {**none, **lengths, "histogram": {"edges": [100, 200, 300, 400, 9001], "counts": [50, 30, 15, 5]}, **more}


def manifest(**changes: Any) -> dict[str, Any]:
    """A complete run's."""
    tokens = {"rows": 100, "total": 20_000, "supervised": 12_000, "input_ids": HASH, "labels": HASH}
    plan = {"steps": 40, "evaluations": 5, "peak_memory_gib": 11.5, "hours": 0.5, "rows_train": 100}
    return {
        "status": "complete",
        "config_sha256": HASH,
        "data": {"train": {"path": "data/processed/train.jsonl", "sha256": HASH, "rows": 111}},
        "tokens": {"train": tokens, "validation": {**tokens, "rows": 10, "total": 2000, "supervised": 1200}},
        "rows": {"train": rows(100, truncated=3), "validation": rows(10)},
        "base_model": {"name": MISTRAL, "revision": "63a8b0"},
        "versions": {"torch": "2.10.0", "peft": "0.21.2"},
        "hardware": {"platform": "h100", "device": "NVIDIA H100"},
        "git_commit": "abc1234",
        "same_bits": "flash_attention_2 over packed documents: the same bits each time, also of a decoder layer",
        "skipped_checks": [],
        "fused_kernels": False,
        "fused_lora": True,
        "checkpointed_layers": 2,
        "plan": plan,
        "starts": [start((0, 20), (0, 25), "killed"), start((35, 55), (20, 40), "complete")],
        "steps": 40,
        "train_loss": 2.1,
        "eval_loss_before": 4.0,
        "eval_loss": 2.5,
        "best_step": 30,
        "stopped_early": False,
        "tokens_per_second": 5000.0,
        "peak_memory_gib": 11.9,
        "seconds": 2400.0,
        "adapter_sha256": HASH,
        "samples": SAMPLES,
        "self_test": PASSED,
        **changes,
    }


def metrics(steps: int) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl: training every step, an evaluation every ten, the best of them at step 30."""
    losses = {0: 4.0, 10: 3.0, 20: 2.7, 30: 2.5, 40: 2.6}
    lines: list[dict[str, Any]] = []
    for step in range(steps + 1):
        time = BEGAN + 60 * step
        if step:
            rate = 2e-4 * (1 + math.cos(math.pi * step / 40)) / 2
            more = {"grad_norm": 1 + 0.1 * (step % 3), "tokens_per_second": 5000 + step, "memory_gib": 11.9}
            lines.append({"step": step, "time": time, "loss": 4 - step / 20, "learning_rate": rate, **more})
        if step in losses:
            lines.append({"step": step, "time": time, "eval_loss": losses[step]})
    return lines


def make_run(folder: Path, content: dict[str, Any], steps: int = 40, settings: tuple[str, ...] = ()) -> Path:
    """Write a run's folder and return it."""
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(content), encoding="utf-8")
    lines = "".join(json.dumps(entry) + "\n" for entry in metrics(steps))
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    (folder / "config.yaml").write_text(dump(load_config("h100", list(settings))[0].as_dict()), encoding="utf-8")
    return folder


def without_end(status: str, *starts: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The manifest of a run that is not complete."""
    late = ("steps", "train_loss", "eval_loss_before", "eval_loss", "best_step", "stopped_early", "tokens_per_second")
    later = (*late, "peak_memory_gib", "seconds", "adapter_sha256", "samples", "self_test")
    known = {key: value for key, value in manifest().items() if key not in later}
    return {**known, "status": status, "starts": list(starts), **more}
