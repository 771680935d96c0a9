"""What a run's folder tells of it, and what follows: what was trained, whether it helped, whether it is safe to use."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune.cli import command
from finetune.errors import ConfigError
from finetune.files import shown
from finetune.wording import counted

MANIFEST, PAGE = "manifest.json", "report.html"
SCRIPT = "scripts/make_report.py"  # makes the page again
ROSE_AGAIN = 1.01  # times the best held-out loss; less than that is noise between evaluations
Losses = list[tuple[float, float]]


@dataclass(frozen=True)
class Answer:
    """One of the questions at the head of a page: `tone` is good, warn, bad or plain; `more` are sentences."""

    question: str
    short: str
    tone: str
    more: list[str]


@dataclass(frozen=True)
class Evidence:
    """What lies in a run's folder: `metrics` and `samples` are the whole lines of their files, [] where there is none.

    Nothing else is read, so the same folder tells the same on every machine.
    """

    folder: Path
    manifest: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    config: str

    @property
    def name(self) -> str:
        """The run's name."""
        return self.folder.name

    @property
    def status(self) -> str:
        """complete, interrupted or failed."""
        return str(self.manifest.get("status"))

    def get(self, *keys: str) -> Any:
        """What the manifest has under these keys, one below the other; None where it has not."""
        found: Any = self.manifest
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def number(self, *keys: str) -> float | None:
        """As `get`, but None for all that is no finite number."""
        found = self.get(*keys)
        return found if isinstance(found, int | float) and math.isfinite(found) else None

    def series(self, key: str) -> Losses:
        """(step, value) of each line of metrics.jsonl that has `key`."""
        return [(entry["step"], entry[key]) for entry in self.metrics if isinstance(entry.get(key), int | float)]

    @cached_property
    def evaluations(self) -> Losses:
        """(step, held-out loss), finite ones only."""
        return [(step, loss) for step, loss in self.series("eval_loss") if math.isfinite(loss)]

    @property
    def best(self) -> tuple[float, float] | None:
        """The evaluation whose adapter is, or would be, the final one."""
        chosen = [pair for pair in self.evaluations if pair[0] == self.number("best_step")]
        return min(chosen or self.evaluations, key=lambda pair: pair[1], default=None)

    @property
    def starts(self) -> list[dict[str, Any]]:
        """Each start of the run, oldest first."""
        return self.get("starts") or []

    @property
    def last_step(self) -> int:
        """The last step that anything tells of."""
        steps = [*(step for step, _ in self.series("step")), *(start["step"] or 0 for start in self.starts)]
        return int(max([self.number("steps") or 0, *steps]))

    @property
    def answers(self) -> list[dict[str, str]]:
        """The final prompts with both answers, else those of the newest best step."""
        final = self.get("samples")
        return final or (self.samples[-1]["samples"] if self.samples else [])


def read(folder: Path) -> Evidence:
    """Raises ConfigError where `folder` is no run's folder."""
    if not folder.is_dir():
        raise ConfigError(f"{shown(folder)}: no such folder; name a run's, as in adapters/RUN")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{shown(folder)}: no {MANIFEST} in it; name a run's folder, as in adapters/RUN") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{shown(folder / MANIFEST)}: cannot be read ({error})") from None
    if not isinstance(manifest, dict):
        raise ConfigError(f"{shown(folder / MANIFEST)}: found {type(manifest).__name__}, wanted an object")
    config = folder / "config.yaml"
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    metrics = [entry for entry in _lines(folder / "metrics.jsonl") if "step" in entry]
    samples = [entry for entry in _lines(folder / "samples.jsonl") if entry.get("samples")]
    return Evidence(folder.resolve(), manifest, metrics, samples, text)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line; a line that a kill cut short is left out."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found


def unfinished(run: Evidence) -> Answer | None:
    """What a reader must know first of a run that is not complete: how it ended, and how to go on; else None."""
    if run.status == "complete":
        return None
    again = f"{command('src/train.py')} --config {shown(run.folder)}/config.yaml"
    steps = run.number("plan", "steps")
    place = f"step {run.last_step:,}" + (f" of {steps:,.0f}" if steps else "")
    if run.status == "failed":
        error = str(run.get("error") or "no reason was recorded")
        return Answer("This run failed", f"At {place}.", "bad", [error, f"Mend that, then: {again}"])
    ways = {
        "stopped": f"It was stopped at {place}.",
        "time budget": f"Its time budget ended at {place}.",
        None: f"It is still training, or was killed; the last that it wrote is of {place}.",
    }
    end = run.starts[-1]["end"] if run.starts else None
    goes_on = (
        f"There is no final adapter yet. The same command goes on from the newest checkpoint, and so does: {again}"
    )
    return Answer("This run is not finished", ways.get(end, ways[None]), "warn", [goes_on])


def trained(run: Evidence) -> Answer:
    """What was trained, on what."""
    base = str(run.get("base_model", "name") or "an unknown base")
    rows, tokens = run.number("tokens", "train", "rows"), run.number("tokens", "train", "supervised")
    of = f" of {plan:,.0f}" if (plan := run.number("plan", "steps")) and run.status != "complete" else ""
    more = [f"{run.last_step:,}{of} optimizer steps."]
    if rows is not None and tokens is not None:
        more.insert(0, f"{counted(int(rows), 'conversation')}; the loss lies on {tokens:,.0f} tokens of the answers.")
    if run.get("stopped_early"):
        more.append(
            "It stopped early: no better held-out loss in as many evaluations as training.early_stopping_patience says."
        )
    return Answer("What was trained?", f"A LoRA adapter for {base}", "plain", more)


def helped(run: Evidence) -> Answer:
    """Whether the held-out loss fell."""
    question = "Did it help?" if run.status == "complete" else "Has it helped so far?"
    before, best = dict(run.evaluations).get(0, run.number("eval_loss_before")), run.best
    if before is None or best is None or (best[0] == 0 and run.status != "complete"):
        return Answer(question, "Not known yet", "warn", ["There is no evaluation after the one before training."])
    step, after = best
    rows = run.number("tokens", "validation", "rows")
    held_out = f"on {counted(int(rows), 'conversation')} that it was not trained on" if rows else "on held-out rows"
    losses = f"Held-out loss {before:.3f} before, {after:.3f} at step {step:,.0f} (nats a token, {held_out})."
    if step == 0 or after >= before:
        none = "No evaluation was better than the one before training: the adapter is the untrained one."
        return Answer(question, "No", "bad", [losses, none] if step == 0 else [losses])
    more = [losses]
    last = run.evaluations[-1]
    if last[0] > step and last[1] > after * ROSE_AGAIN:
        rose = f"It rose again, to {last[1]:.3f} at step {last[0]:,.0f}: longer training only learns the rows by heart."
        more.append(rose)
    more.append("That says how well it predicts such answers, not that they are right: read those below.")
    return Answer(question, f"Yes: {1 - after / before:.0%} less held-out loss", "good", more)


def safe(run: Evidence) -> Answer:
    """Whether the adapter is what it should be, by its self-test; and what was left out or found on the way."""
    question, test = "Is it safe to use?", run.get("self_test")
    notes = cautions(run)
    checks = (test or {}).get("checks", [])
    wrong = [f"{check['name']}: {check['detail']}" for check in checks if check["status"] == "fail"]
    if test and test["status"] != "pass":
        return Answer(question, "No: its self-test failed", "bad", [*wrong, *notes])
    if run.status != "complete":
        return Answer(question, "There is no final adapter", "bad" if run.status == "failed" else "warn", notes)
    if not test:
        return Answer(question, "Not tested", "warn", ["The self-test of the adapter was not made.", *notes])
    limit = "No check looks at whether what it says is true or harmless."
    made = f"Its self-test passed: {counted(len(checks), 'check')}, listed below."
    return Answer(
        question, "Yes, as far as tested" if not notes else "Yes, with these notes", "good", [made, *notes, limit]
    )


def cautions(run: Evidence) -> list[str]:
    """What was left out or found in the data that a user of the adapter should know."""
    notes = []
    if skipped := run.get("skipped_checks"):
        notes.append(f"Checks left out by --skip: {', '.join(map(str, skipped))}.")
    for start in run.starts:
        if changed := start.get("changed"):
            notes.append(f"From step {start['from_step']:,} on it was trained with changes: {'; '.join(changed)}.")
    leaks = run.number("rows", "validation", "normalised_leaks")
    if leaks:
        rows = counted(int(leaks), "held-out conversation")
        notes.append(f"{rows} also in the training data but for case and spaces: the held-out loss flatters.")
    rows_all = sum(run.number("tokens", name, "rows") or 0 for name in ("train", "validation"))
    certified = sum(run.number("rows", name, "certified") or 0 for name in ("train", "validation"))
    if rows_all and not certified:
        notes.append("Tokens were not compared with mistral-common's: the base is not Mistral's, or the check is off.")
    return notes
