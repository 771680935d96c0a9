"""Compares two runs: which did better, if that can be said, and how they differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import yaml
from markupsafe import Markup

from finetune.cli import command
from finetune.files import quoted
from finetune.results.report import charts
from finetune.results.report.charts import Line
from finetune.results.report.run_summary import SCRIPT, Evidence
from finetune.results.report.verdicts import Verdict
from finetune.wording import duration, leaves

FOUND: tuple[tuple[str, Callable[[Evidence], Any], str], ...] = (
    ("status", lambda run: run.status, "{}"),
    ("training conversations", lambda run: run.number("tokens", "train", "rows"), "{:,.0f}"),
    ("steps", lambda run: run.last_step, "{:,}"),
    ("held-out loss before", lambda run: dict(run.evaluations).get(0), "{:.4f}"),
    ("best held-out loss", lambda run: run.best and run.best[1], "{:.4f}"),
    ("at step", lambda run: run.best and run.best[0], "{:,}"),
    ("self-test", lambda run: run.get("self_test", "status"), "{}"),
    ("tokens per second", lambda run: run.number("tokens_per_second"), "{:,.0f}"),
    ("peak memory, GiB", lambda run: run.number("peak_memory_gib"), "{:,.2f}"),
    ("time", lambda run: (seconds := run.number("seconds")) and duration(seconds), "{}"),
)
CURVES = (
    ("eval_loss", "Held-out loss, nats per token"),
    ("loss", "Training loss, nats per token"),
    ("learning_rate", "Learning rate"),
    ("tokens_per_second", "Tokens per second"),
)


def compare(first: Evidence, second: Evidence) -> dict[str, Any]:
    """Return the values for templates/compare.html."""
    runs = first, second
    prompts = {sample["prompt"]: sample["tuned"] for sample in second.answers}
    return {
        "names": _names(first, second),
        "verdict": _better(first, second),
        "results": [
            (title, *("not recorded" if (value := find(run)) is None else form.format(value) for run in runs))
            for title, find, form in FOUND
        ],
        "curves": list(_curves(first, second)),
        "differences": list(_differences(first, second)),
        "samples": [
            {"prompt": sample["prompt"], "base": sample["tuned"], "tuned": prompts[sample["prompt"]]}
            for sample in first.answers
            if sample["prompt"] in prompts
        ],
        "again": f"{command(SCRIPT)} {quoted(first.folder)} {quoted(second.folder)}",
    }


def _names(first: Evidence, second: Evidence) -> list[str]:
    """Return the runs' names, with their parent folders if the names are equal."""
    if first.name != second.name:
        return [first.name, second.name]
    return [f"{run.folder.parent.name}/{run.name}" for run in (first, second)]


def _better(first: Evidence, second: Evidence) -> Verdict:
    """Say which run has the lower held-out loss, if both measured it on the same tokens."""
    question = "Which did better?"
    held_out = [
        (run.get("tokens", "validation", "input_ids"), run.get("tokens", "validation", "labels"))
        for run in (first, second)
    ]
    if held_out[0] != held_out[1] or None in held_out[0]:
        why = "They were evaluated on different held-out rows, so their losses cannot be compared."
        return Verdict(question, "Not comparable", "warn", [why])
    if first.best is None or second.best is None:
        return Verdict(question, "Not known yet", "warn", ["One of them has no evaluation."])
    (low, one), (high, other) = sorted(
        zip((first.best[1], second.best[1]), _names(first, second), strict=True), key=lambda pair: pair[0]
    )
    if low == high:
        return Verdict(question, "Neither", "plain", [f"Both reach a held-out loss of {low:.4f} on the same rows."])
    more = [f"Best held-out loss {low:.4f} against {high:.4f} of {other}, on the same rows."]
    more += [f"{run.name} is {run.status}." for run in (first, second) if run.status != "complete"]
    return Verdict(question, one, "good", more)


def _curves(first: Evidence, second: Evidence) -> Iterator[tuple[str, Markup]]:
    for key, title in CURVES:
        lines = [
            Line(name, run.series(key), color)
            for run, name, color in zip(
                (first, second), _names(first, second), (charts.FIRST, charts.SECOND), strict=True
            )
        ]
        if any(line.points for line in lines):
            text = " ".join(charts.in_words(line.label, line.points) for line in lines)
            yield title, charts.curves(key.replace("_", "-"), title, text, lines, None)


def _differences(first: Evidence, second: Evidence) -> Iterator[tuple[str, str, str]]:
    """Yield the keys of config.yaml that differ, with both values."""
    trees = [leaves(yaml.safe_load(run.config) or {}) for run in (first, second)]
    for key in sorted(trees[0].keys() | trees[1].keys()):
        values = [tree.get(key, "not set") for tree in trees]
        if values[0] != values[1]:
            yield key, *(str(value) if value is not None else "null" for value in values)  # type: ignore[misc]
