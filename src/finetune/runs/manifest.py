"""manifest.json: what a run is, known before its first step, and how each of its starts ended."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from finetune.config import yaml_file
from finetune.config.schema import Config, is_local
from finetune.data.prepare import Prepared
from finetune.errors import OutOfResource, Stopped
from finetune.files import ROOT, resolve, shown, write_json
from finetune.model import hub
from finetune.runs import receipt, starts
from finetune.runs.folder import Run
from finetune.runs.receipt import base_model
from finetune.runs.resume import Decision

FULL_DISK_MIB = 1

VERSIONED = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "tokenizers",
    "mistral-common",
)


def versions() -> dict[str, str]:
    """Installed versions of the libraries that decide what a run computes."""
    return {name: importlib.metadata.version(name) for name in VERSIONED}


def git_commit() -> str | None:
    """The commit of this program's folder, or that its image was built from; None where neither is known."""
    if commit := os.environ.get("GIT_COMMIT"):
        return commit
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


# Keys that change no token and no weight, or that the token hashes stand for.
FREE_TO_CHANGE = {
    "training": (
        "logging_steps",
        "per_device_eval_batch_size",
        "checkpointed_layers",
        "save_total_limit",
        "save_minutes",
        "time_budget_hours",
        "time_budget_partial",
    ),
    "dataset": ("sample_prompts", "train_file", "validation_file", "certificate"),
}


def fingerprint(config: Config, prepared: Prepared) -> dict[str, Any]:
    """What must be equal for a checkpoint to go on: config (but FREE_TO_CHANGE), tokens, tokenizer, versions.

    And of a base in a folder its weights, which a base on the Hub has by its revision.
    """
    tree = config.as_dict()
    del tree["tracking"], tree["output"]
    for section, keys in FREE_TO_CHANGE.items():
        for key in keys:
            del tree[section][key]
    tokens = prepared.tokens | {"tokenizer": prepared.chat.fingerprint}
    name = config.model.name
    weights = hub.weights_digest(resolve(name)) if is_local(name) else config.model.revision
    return {"config": tree, "tokens": tokens, "versions": versions(), "base_weights": weights}


def describe(config: Config, prepared: Prepared, hardware: dict[str, Any]) -> dict[str, Any]:
    """The part of the manifest that is known before the first step."""
    statistics = prepared.statistics
    return {
        "config_sha256": config.sha256(),
        "data": prepared.files,
        "tokens": {
            name: {
                **prepared.tokens[name],
                "rows": counts.rows,
                "total": counts.tokens,
                "supervised": counts.supervised_tokens,
            }
            for name, counts in statistics.items()
        },
        "rows": {
            name: {
                "certified": counts.certified,
                "longest": counts.longest,
                "p50": counts.p50,
                "p95": counts.p95,
                "truncated": counts.truncated,
                "dropped_long": counts.dropped_long,
                "dropped_bad": [{"line": line, "found": text} for line, text in counts.bad],
                "duplicates": counts.duplicates,
                "control_tokens": counts.control_tokens,
                "first_control_token": counts.first_control_token,
                "normalised_leaks": counts.normalised_leaks,
                "first_leak": counts.first_leak,
                "copies": counts.copies,
                "histogram": counts.histogram,
            }
            for name, counts in statistics.items()
        },
        "base_model": base_model(config),
        "versions": versions(),
        "hardware": hardware,
        "git_commit": git_commit(),
    }


def write_receipt(run: Run, config: Config, prepared: Prepared) -> None:
    """receipt.json, by which another machine can tell whether it is about to train the same thing."""
    write_json(run.folder / receipt.FILE, receipt.make(config, prepared))


def write_start(
    run: Run,
    config: Config,
    known: dict[str, Any],
    decision: Decision,
    set_aside: list[str],
    rehearsal: dict[str, float] | None,
) -> None:
    """The resolved config, and a manifest that says the run is not finished; `known` gains the run's starts."""
    known["starts"] = starts.begin(run.folder, decision.step, decision.changes, set_aside, rehearsal)
    (run.folder / "config.yaml").write_text(yaml_file.dump(config.as_dict()), encoding="utf-8")
    write_manifest(run, {"status": "interrupted", **known})


@contextmanager
def recorded(run: Run, known: dict[str, Any]) -> Iterator[None]:
    """Say in the manifest that the run failed where the block raises, or that it was stopped.

    Libraries tell in many ways that a disk is full, read-only or gone, so where nothing more can be written into the
    run's folder, OutOfResource is raised in their place.
    """
    try:
        yield
    except Stopped as error:
        with suppress(OSError):  # it is no less stopped, and the manifest says `interrupted` already
            write_end(run, {"status": "interrupted", **known}, error)
        raise
    except Exception as error:
        with suppress(OSError):  # there the manifest cannot be written either
            write_end(run, {"status": "failed", "error": str(error), **known}, error)
        if not isinstance(error, OutOfResource):
            _check_writable(run.folder, error)
        raise


def _check_writable(folder: Path, error: Exception) -> None:
    """Raise OutOfResource from `error` where nothing can be written into `folder`."""
    advice, where = "then type the same command again", shown(folder)
    try:
        free_mib = shutil.disk_usage(folder).free / 2**20
    except OSError as gone:
        raise OutOfResource(f"{where} is gone ({gone.strerror}); bring it back, {advice}") from error
    if free_mib < FULL_DISK_MIB:
        raise OutOfResource(f"no space left: {where} has {free_mib:.1f} MiB free; free some, {advice}") from error
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as refused:
        text = f"{where} can no longer be written: {refused.strerror} ({free_mib:,.1f} MiB free); mend that, {advice}"
        raise OutOfResource(text) from error


def write_manifest(run: Run, content: dict[str, Any]) -> None:
    """manifest.json, whole."""
    write_json(run.folder / "manifest.json", content)


def write_end(run: Run, content: dict[str, Any], error: Exception | None) -> None:
    """The manifest where a start ends: by `error`, or complete."""
    for start in content.get("starts", [])[-1:]:  # none where it ends before write_start
        starts.end(run.folder, start, error)
    write_manifest(run, content)
