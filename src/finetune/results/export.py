"""Writes the results of a finished run: a plain PEFT adapter, its tokenizer, a model card and the manifest."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from finetune.errors import SelfTestFailed
from finetune.files import sha256, share, shown
from finetune.machine.device import peak_memory_gib
from finetune.results.model_card import model_card
from finetune.results.self_test import SelfTest, Untrained, self_test
from finetune.runs.adapter import WEIGHTS
from finetune.runs.folder import REJECTED, Run
from finetune.runs.manifest import Manifest
from finetune.runs.outcome import Outcome
from finetune.training.job import Job


def write_adapter(
    job: Job, before: Untrained, manifest: Manifest, outcome: Outcome, samples: list[dict[str, str]]
) -> SelfTest:
    """Save the adapter, test it, then publish the files; the manifest is completed last.

    Raises SelfTestFailed if a check fails: the files are then in `rejected`, and `manifest` has the figures of a
    finished run all the same. `job.model` cannot be used afterwards.
    """
    peak_gib, run = peak_memory_gib(job.platform), job.run
    partial = run.folder / "export.partial"
    shutil.rmtree(partial, ignore_errors=True)
    job.model.save_pretrained(partial, save_embedding_layers=False)
    job.tokenizer.save_pretrained(partial)
    share(partial)
    found = self_test(job, partial, before, outcome)
    manifest.content |= {
        "steps": outcome.steps,
        "train_loss": outcome.train_loss,
        "eval_loss_before": outcome.first_eval_loss,
        "eval_loss": outcome.eval_loss,
        "best_step": outcome.best_step,
        "stopped_early": outcome.stopped_early,
        "tokens_per_second": round(outcome.tokens_per_second, 1),
        "peak_memory_gib": round(peak_gib, 2),
        "seconds": round(outcome.seconds, 1),
        "adapter_sha256": sha256(partial / WEIGHTS),
        "self_test": found.as_dict(),
        "samples": samples,
    }
    (partial / "README.md").write_text(model_card(job.config, manifest.document("complete")), encoding="utf-8")
    if found.failed:
        raise _reject(run, partial, found)
    for path in sorted(partial.iterdir()):
        path.replace(run.folder / path.name)
    partial.rmdir()
    shutil.rmtree(run.folder / REJECTED, ignore_errors=True)  # left by an earlier start of this run
    manifest.complete()
    return found


def describe_best(job: Job, manifest: Manifest, folder: Path, facts: dict[str, Any]) -> dict[str, str]:
    """Write tokenizer and model card into the folder of the best adapter so far; then it can be used by itself.

    `facts` has its step and eval_loss. Returns the sha256 of the weights by file name, for the folder's seal.
    """
    job.tokenizer.save_pretrained(folder)
    digest = sha256(folder / WEIGHTS)
    best = {"best_step": facts["step"], "eval_loss": facts["eval_loss"], "adapter_sha256": digest}
    card = model_card(job.config, manifest.document("interrupted") | best)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return {WEIGHTS: digest}


def _reject(run: Run, partial: Path, found: SelfTest) -> SelfTestFailed:
    """Move the files to `rejected` and return the error that lists the failed checks."""
    aside = run.folder / REJECTED
    shutil.rmtree(aside, ignore_errors=True)
    partial.rename(aside)
    failed = "\n".join(f"  {check.name}: {check.detail}" for check in found.failed)
    count = f"{len(found.failed)} of {len(found.checks)} checks failed"
    text = f"self-test: {count}, so this adapter is not final\n{failed}\nit was moved to {shown(aside)}"
    return SelfTestFailed(text, "change the config or the data, then start a new run with --fresh")
