"""Conclusions from a run's folder: what was trained, whether it helped, whether it is safe to use."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.cli import command
from finetune.files import quoted
from finetune.results.report.run_summary import Evidence
from finetune.wording import counted

ROSE_AGAIN = 1.01  # times the best held-out loss; a smaller rise is noise


@dataclass(frozen=True)
class Verdict:
    """A question at the top of a report and its answer. `tone` is good, warn, bad or plain; `more` has sentences."""

    question: str
    short: str
    tone: str
    more: list[str]


def unfinished(run: Evidence) -> Verdict | None:
    """Say how an incomplete run ended and how to resume it; None if the run is complete."""
    if run.status == "complete":
        return None
    again = f"{command('src/train.py')} --config {quoted(run.folder / 'config.yaml')}"
    steps = run.number("plan", "steps")
    place = f"step {run.last_step:,}" + (f" of {steps:,.0f}" if steps else "")
    if run.status == "failed":
        error = str(run.get("error") or "no reason was recorded")
        return Verdict("This run failed", f"At {place}.", "bad", [error, f"Fix it, then run: {again}"])
    ways = {
        "stopped": f"It was stopped at {place}.",
        "time budget": f"Its time budget was used up at {place}.",
        None: f"It is still training, or was killed; its last record is from {place}.",
    }
    end = run.starts[-1]["end"] if run.starts else None
    resume = f"To resume from the newest checkpoint, repeat the command (without --fresh) or run: {again}"
    return Verdict(
        "This run is not finished", ways.get(end, ways[None]), "warn", [f"There is no final adapter yet. {resume}"]
    )


def trained(run: Evidence) -> Verdict:
    """Say what was trained, on which data."""
    base = str(run.get("base_model", "name") or "an unknown base")
    rows, tokens = run.number("tokens", "train", "rows"), run.number("tokens", "train", "supervised")
    of = f" of {plan:,.0f}" if (plan := run.number("plan", "steps")) and run.status != "complete" else ""
    more = [f"{run.last_step:,}{of} optimizer steps."]
    if rows is not None and tokens is not None:
        more.insert(0, f"{counted(int(rows), 'conversation')}; loss is computed on {tokens:,.0f} answer tokens.")
    if run.get("stopped_early"):
        more.append(
            "It stopped early: the held-out loss did not improve for training.early_stopping_patience evaluations."
        )
    return Verdict("What was trained?", f"A LoRA adapter for {base}", "plain", more)


def helped(run: Evidence) -> Verdict:
    """Say whether the held-out loss fell."""
    question = "Did it help?" if run.status == "complete" else "Has it helped so far?"
    before, best = dict(run.evaluations).get(0, run.number("eval_loss_before")), run.best
    if before is None or best is None or (best[0] == 0 and run.status != "complete"):
        return Verdict(question, "Not known yet", "warn", ["There is no evaluation after the first step yet."])
    step, after = best
    rows = run.number("tokens", "validation", "rows")
    held_out = f"on {counted(int(rows), 'conversation')} not used for training" if rows else "on held-out rows"
    losses = f"Held-out loss {before:.3f} before, {after:.3f} at step {step:,.0f} (nats per token, {held_out})."
    if step == 0 or after >= before:
        none = "No evaluation was better than the one before training: the adapter is the untrained one."
        return Verdict(question, "No", "bad", [losses, none] if step == 0 else [losses])
    more = [losses]
    last = run.evaluations[-1]
    if last[0] > step and last[1] > after * ROSE_AGAIN:
        rose = f"It rose again, to {last[1]:.3f} at step {last[0]:,.0f}: longer training only memorizes the rows."
        more.append(rose)
    more.append("This measures how well it predicts such answers, not whether they are right: read the ones below.")
    return Verdict(question, f"Yes: {1 - after / before:.0%} less held-out loss", "good", more)


def safe(run: Evidence) -> Verdict:
    """Summarize the self-test, the skipped checks and the warnings about the data."""
    question, test = "Is it safe to use?", run.get("self_test")
    notes = cautions(run)
    checks = (test or {}).get("checks", [])
    wrong = [f"{check['name']}: {check['detail']}" for check in checks if check["status"] != "pass"]
    if test and test["status"] == "fail":
        return Verdict(question, "No: its self-test failed", "bad", [*wrong, *notes])
    if run.status != "complete":
        return Verdict(question, "There is no final adapter", "bad" if run.status == "failed" else "warn", notes)
    if not test:
        return Verdict(question, "Not tested", "warn", ["The adapter's self-test was not run.", *notes])
    limit = "No check tests whether its answers are true or harmless."
    if wrong:
        made = f"Its self-test has {counted(len(wrong), 'warning')} in {counted(len(checks), 'check')}, listed below."
        return Verdict(question, "Yes, with a warning", "warn", [made, *wrong, *notes, limit])
    made = f"Its self-test passed: {counted(len(checks), 'check')}, listed below."
    return Verdict(
        question, "Yes, as far as tested" if not notes else "Yes, with these notes", "good", [made, *notes, limit]
    )


def cautions(run: Evidence) -> list[str]:
    """List skipped checks, changes during training and data problems that a user of the adapter should know."""
    notes = []
    if skipped := run.get("skipped_checks"):
        notes.append(f"Checks skipped with --skip: {', '.join(map(str, skipped))}.")
    for start in run.starts:
        if changed := start.get("changed"):
            notes.append(f"From step {start['from_step']:,} on, trained with changes: {'; '.join(changed)}.")
    leaks = run.number("rows", "validation", "normalized_leaks")
    if leaks:
        rows = counted(int(leaks), "held-out conversation")
        notes.append(f"{rows} also in the training data (ignoring case and spacing): the loss is optimistic.")
    openings = run.number("rows", "validation", "opening_leaks")
    if openings:
        rows = counted(int(openings), "held-out conversation")
        notes.append(f"The training data has the opening of {rows}: the loss is optimistic.")
    rows_all = sum(run.number("tokens", name, "rows") or 0 for name in ("train", "validation"))
    certified = sum(run.number("rows", name, "certified") or 0 for name in ("train", "validation"))
    if rows_all and not certified:
        notes.append("Tokens were not compared with mistral-common: the base is not Mistral's, or the check is off.")
    return notes
