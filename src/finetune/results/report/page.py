"""report.html: a run as one page without scripts or network access; and two runs side by side."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from finetune.cli import command
from finetune.config import yaml_file
from finetune.config.base_model import MISTRAL
from finetune.errors import ConfigError
from finetune.files import quoted, write_text
from finetune.plan.automatic import in_words
from finetune.results.report import charts, run_summary, verdicts
from finetune.results.report.charts import Line
from finetune.results.report.comparison import compare
from finetune.results.report.run_summary import Evidence
from finetune.wording import clean, clock, counted, duration

ENDS = {
    "complete": ("complete", "good"),
    "stopped": ("stopped", "warn"),
    "time budget": ("time budget used up", "warn"),
    "killed": ("killed", "bad"),
    "failed": ("failed", "bad"),
    None: ("no end recorded", "warn"),
}
COUNTS = (  # keys of manifest.rows and their names in the data table
    ("truncated", "truncated at the length limit"),
    ("dropped_long", "dropped: no turn with loss fits"),
    ("dropped_without_loss", "dropped: no turn has loss"),
    ("dropped_bad", "dropped: bad rows"),
    ("dropped_duplicates", "dropped: duplicates of another row"),
    ("left_out", "omitted because of a file's weight"),
    ("repeated", "repeated because of a file's weight"),
    ("duplicates", "duplicates of another row"),
    ("control_tokens", "with a control token as text"),
    ("normalized_leaks", "also in the other split, except for case and spacing"),
    ("opening_leaks", "same opening as a training row"),
    ("encoded", "encoded, before long rows are dropped"),
    ("certified", "of the encoded, compared with mistral-common"),
    ("p50", "tokens per row, median"),
    ("p95", "tokens per row, 95 %"),
    ("longest", "tokens per row, longest"),
)
MOST_BAD = 20
SPLITS = ("train", "validation")


def write(folder: Path) -> Path:
    """Write the report of the run in `folder` and return its path."""
    return _write(folder / run_summary.PAGE, "report.html", _report(run_summary.read(folder)))


def write_comparison(folder: Path, other: Path) -> Path:
    """Write a comparison of two runs into the first one's folder and return its path."""
    first, second = run_summary.read(folder), run_summary.read(other)
    return _write(folder / f"compare-{second.name}.html", "compare.html", compare(first, second))


def _write(path: Path, template: str, content: dict[str, Any]) -> Path:
    """Render `template` to `path`, whole or not at all."""
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parents[1] / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: clean(value) if type(value) is str else value,  # no hidden or direction characters
    )
    text = pages.get_template(template).render(content)
    write_text(path, text)
    return path


def _report(run: Evidence) -> dict[str, Any]:
    """Return the values for templates/report.html."""
    base = run.get("base_model", "name")
    return {
        "name": run.name,
        "status": run.status,
        "unfinished": verdicts.unfinished(run),
        "answers": [verdicts.trained(run), verdicts.helped(run), verdicts.safe(run)],
        "base": base or "not recorded",
        "base_link": f"https://huggingface.co/{MISTRAL}" if base == MISTRAL else None,
        "curves": [chart for chart in _curves(run) if chart],
        "samples": run.answers,
        "earlier": run.samples[:-1],
        "counts": _counts(run),
        "files": [{"name": name, **entry} for name, entry in (run.get("data") or {}).items()],
        "bad_rows": [_place(entry) for name in SPLITS for entry in run.get("rows", name, "dropped_bad") or []],
        "most_bad": MOST_BAD,
        "histogram": _histogram(run),
        "plan_and_actual": _plan_and_actual(run),
        "starts": [_start(start) for start in run.starts],
        "checks": (run.get("self_test") or {}).get("checks", []),
        "config": run.config,
        "facts": list(_facts(run)),
        "again": f"{command(run_summary.SCRIPT)} {quoted(run.folder)}",
    }


def _curves(run: Evidence) -> Iterator[tuple[str, Markup] | None]:
    loss, held_out = run.series("loss"), run.evaluations
    if loss or held_out:
        text = f"{charts.in_words('Training loss', loss)} {charts.in_words('Held-out loss', held_out)}"
        if run.best:
            text += f" Best held-out loss {run.best[1]:.4g} at step {run.best[0]:,}."
        lines = [Line("training", loss, charts.SECOND, thin=True), Line("held out", held_out)]
        yield "Loss, nats per token", charts.curves("loss", "Training and held-out loss", text, lines, run.best)
    yield _curve(run, "learning_rate", "Learning rate")
    yield _curve(run, "grad_norm", "Gradient norm, before clipping")
    yield _curve(run, "tokens_per_second", "Tokens per second, excluding evaluations and saves")
    yield _curve(run, "memory_gib", "Peak memory, GiB, so far in each start")


def _curve(run: Evidence, key: str, title: str) -> tuple[str, Markup] | None:
    points = run.series(key)
    name = key.replace("_", "-")
    return (
        (title, charts.curves(name, title, charts.in_words(title, points), [Line(title, points)], None))
        if points
        else None
    )


def _counts(run: Evidence) -> list[tuple[str, ...]]:
    """Return the data table: (what, in training rows, in held-out rows), without lines that are 0 in both."""
    table = [("conversations", *(f"{run.number('tokens', split, 'rows') or 0:,.0f}" for split in SPLITS))]
    table.append(("tokens", *(f"{run.number('tokens', split, 'total') or 0:,.0f}" for split in SPLITS)))
    table.append(("of them with loss", *(_share(run, split) for split in SPLITS)))
    for key, title in COUNTS:
        found = [run.get("rows", split, key) or 0 for split in SPLITS]
        values = [len(value) if isinstance(value, list) else value for value in found]
        if any(values):
            table.append((title, *(f"{value:,}" for value in values)))
    return table


def _place(bad: dict[str, Any]) -> str:
    """Return where a bad row is and what is wrong with it; manifests of earlier versions do not name the file."""
    return ", ".join([*filter(None, [bad.get("file")]), f"line {bad['line']}: {bad['found']}"])


def _share(run: Evidence, split: str) -> str:
    total, supervised = (run.number("tokens", split, key) or 0 for key in ("total", "supervised"))
    return f"{supervised / total:.0%}" if total else "0%"


def _histogram(run: Evidence) -> Markup | None:
    found = run.get("rows", "train", "histogram")
    if not found:
        return None
    rows = run.get("rows", "train")
    text = (
        f"{counted(sum(found['counts']), 'conversation')} by length before cutting: half have up to {rows['p50']:,} "
        f"tokens, 95 % up to {rows['p95']:,}, the longest {rows['longest']:,}."
    )
    edges, counts = found["edges"], found["counts"]
    return charts.histogram("lengths", "Lengths of the training conversations", text, edges, counts, _limit(run))


def _limit(run: Evidence) -> int:
    """Return model.max_seq_length of config.yaml; 0 if it is missing."""
    try:
        tree, _ = yaml_file.parse(run.config, "config.yaml")
    except ConfigError:  # cut short by a kill
        return 0
    limit = yaml_file.get_config_value(tree, "model.max_seq_length")
    return limit if isinstance(limit, int) else 0


def _plan_and_actual(run: Evidence) -> list[tuple[str, str, str, str]]:
    """Compare the plan with the run: (what, planned, actual, difference)."""
    peak = run.number("peak_memory_gib") or max((gib for _, gib in run.series("memory_gib")), default=None)
    seconds = run.number("seconds") or _seconds(run)
    rehearsal = run.starts[0].get("rehearsal") if run.starts else None
    rehearsed_peak, rehearsed_hours = (rehearsal and rehearsal[key] for key in ("peak_memory_gib", "hours"))
    hours = run.number("plan", "hours") or rehearsed_hours
    rows = [
        ("optimizer steps", run.number("plan", "steps"), run.last_step, "{:,.0f}"),
        ("evaluations", run.number("plan", "evaluations"), len(run.evaluations), "{:,.0f}"),
        ("peak memory, GiB (plan)", run.number("plan", "peak_memory_gib"), peak, "{:,.2f}"),
        ("peak memory, GiB (rehearsal)", rehearsed_peak, peak, "{:,.2f}"),
        ("minutes", hours and 60 * hours, seconds and seconds / 60, "{:,.1f}")
        if max(hours or 0, (seconds or 0) / 3600) < 2
        else ("hours", hours, seconds and seconds / 3600, "{:,.1f}"),
    ]
    return [
        (what, _text(planned, form), _text(found, form), _off(planned, found)) for what, planned, found, form in rows
    ]


def _text(value: float | None, form: str) -> str:
    return "not known" if value is None else form.format(value)


def _off(planned: float | None, actual: float | None) -> str:
    if not planned or actual is None:
        return ""
    return "same" if actual == planned else f"{actual / planned - 1:+.0%}"


def _seconds(run: Evidence) -> float | None:
    """Sum the durations of all starts with a recorded end."""
    ended = [start for start in run.starts if start["ended"]]
    return sum(_time(start["ended"]) - _time(start["started"]) for start in ended) if ended else None


def _start(start: dict[str, Any]) -> dict[str, Any]:
    text, tone = ENDS.get(start["end"], (str(start["end"]), "warn"))
    steps = (
        f"{start['from_step']:,} to {start['step']:,}" if start["step"] is not None else f"from {start['from_step']:,}"
    )
    took = duration(_time(start["ended"]) - _time(start["started"])) if start["ended"] else "not known"
    notes = [f"resumed with a change: {change}" for change in start.get("changed", [])]
    notes += start.get("set_aside", []) + start.get("out_of_memory", [])
    return {"started": _when(start["started"]), "took": took, "steps": steps, "end": text, "tone": tone, "notes": notes}


def _time(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def _when(text: str) -> str:
    return clock(datetime.fromisoformat(text).astimezone(UTC))


def _facts(run: Evidence) -> Iterator[tuple[str, str]]:
    """Yield (name, value) of base, machine, versions and hashes."""
    yield "base", " at ".join(str(part) for part in (run.get("base_model") or {}).values() if part)
    yield "machine", ", ".join(f"{name} {value}" for name, value in (run.get("hardware") or {}).items() if value)
    if run.get("fused_lora") is not None:
        layers = run.get("checkpointed_layers")
        yield "steps", in_words(run.manifest) + ("" if layers is None else f"; {layers} layers checkpointed")
    if run.get("same_bits"):
        yield "repeated", str(run.get("same_bits"))
    yield "program", str(run.get("git_commit") or "not a git clone")
    yield "libraries", ", ".join(f"{name} {version}" for name, version in (run.get("versions") or {}).items())
    yield "config sha256", str(run.get("config_sha256") or "not recorded")
    for split, hashes in (run.get("tokens") or {}).items():
        yield f"tokens sha256, {split}", str(hashes.get("input_ids"))
    if adapter := run.get("adapter_sha256"):
        yield "adapter sha256", str(adapter)
