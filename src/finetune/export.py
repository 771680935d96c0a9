"""What a finished run leaves: a plain PEFT adapter, its tokenizer, a model card, the resolved config, a manifest."""

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

from peft import PeftModel
from transformers import PreTrainedTokenizerFast

from finetune import receipt, starts
from finetune.checkpoints import step_of
from finetune.config import yaml_file
from finetune.config.schema import Config, is_local
from finetune.data.prepare import Prepared
from finetune.errors import OutOfResource, SelfTestFailed, Stopped
from finetune.files import ROOT, resolve, sha256, shown, write_json
from finetune.model import hub
from finetune.model_card import model_card
from finetune.receipt import base_model
from finetune.resume import Resume
from finetune.runs import Run
from finetune.self_test import SelfTest, Start, self_test
from finetune.trainer import Outcome

FULL_DISK_MIB = 1
REJECTED = "rejected"

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
    run: Run, config: Config, known: dict[str, Any], resumed: Resume, rehearsal: dict[str, float] | None
) -> None:
    """The resolved config, and a manifest that says the run is not finished; `known` gains the run's starts."""
    from_step = step_of(resumed.checkpoint) if resumed.checkpoint else 0
    known["starts"] = starts.begin(run.folder, from_step, resumed.changes, resumed.set_aside, rehearsal)
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


def write_adapter(
    run: Run,
    config: Config,
    prepared: Prepared,
    model: PeftModel,
    start: Start,
    tokenizer: PreTrainedTokenizerFast,
    known: dict[str, Any],
    outcome: Outcome,
    peak_memory_gib: float,
    samples: list[dict[str, str]],
) -> SelfTest:
    """The final files, once the adapter among them has passed its self-test; the manifest that says so comes last.

    Raises SelfTestFailed where it has not: the files then lie in `rejected`, and `known` holds all that the manifest of
    a finished run does. `model` is of no use afterwards.
    """
    partial = run.folder / "export.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, save_embedding_layers=False)
    tokenizer.save_pretrained(partial)
    found = self_test(model, partial, start, prepared, config, outcome)
    known |= {
        "steps": outcome.steps,
        "train_loss": outcome.train_loss,
        "eval_loss_before": outcome.first_eval_loss,
        "eval_loss": outcome.eval_loss,
        "best_step": outcome.best_step,
        "stopped_early": outcome.stopped_early,
        "tokens_per_second": round(outcome.tokens_per_second, 1),
        "peak_memory_gib": round(peak_memory_gib, 2),
        "seconds": round(outcome.seconds, 1),
        "adapter_sha256": sha256(partial / "adapter_model.safetensors"),
        "self_test": found.as_dict(),
        "samples": samples,
    }
    (partial / "README.md").write_text(model_card(config, {"status": "complete", **known}), encoding="utf-8")
    if found.failed:
        raise _reject(run, partial, found)
    for path in sorted(partial.iterdir()):
        path.replace(run.folder / path.name)
    partial.rmdir()
    shutil.rmtree(run.folder / REJECTED, ignore_errors=True)  # of an earlier start, whose adapter was this run's too
    write_end(run, {"status": "complete", **known}, None)
    return found


def _reject(run: Run, partial: Path, found: SelfTest) -> SelfTestFailed:
    """Keep the files aside, where nobody takes them for final, and say what is wrong with them."""
    aside = run.folder / REJECTED
    shutil.rmtree(aside, ignore_errors=True)
    partial.rename(aside)
    failed = "\n".join(f"  {check.name}: {check.detail}" for check in found.failed)
    count = f"{len(found.failed)} of {len(found.checks)} checks failed"
    return SelfTestFailed(
        f"self-test: {count}, so this adapter is not final\n{failed}\n"
        f"it lies in {shown(aside)}; change the config or the data, then --fresh starts a new run"
    )
