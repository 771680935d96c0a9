"""The plan in words."""

from __future__ import annotations

from finetune.files import GIB
from finetune.plan.plan import Plan
from finetune.wording import counted, duration


def plan_lines(plan: Plan) -> list[tuple[str, str]]:
    """The plan as (name, sentence) rows."""
    supervised = plan.supervised_tokens_train / max(1, plan.tokens_train)
    free = plan.memory_available_gib
    available = "not this machine" if free is None else f"{free:.1f} GiB free"
    rows = f"{plan.rows_train:,} to train on, {plan.rows_validation:,} held out"
    if plan.rows_evaluated < plan.rows_validation:
        rows += f" ({plan.rows_evaluated:,} of them evaluated)"
    changed = [(plan.rows_truncated, "cut"), (plan.rows_dropped, "dropped")]
    rows += "".join(f", {count:,} {name}" for count, name in changed if count)
    evaluations = counted(plan.evaluations, "evaluation")
    return [
        ("rows", rows),
        ("tokens", f"{plan.tokens_train:,} ({supervised:.0%} with loss)"),
        ("certificate", certificate_text(plan)),
        (
            "sequences",
            f"{plan.sequences_train:,}, {plan.packing_efficiency:.1%} full, {plan.effective_batch_size} per step",
        ),
        ("steps", f"{plan.steps:,} ({plan.steps_per_epoch:,} per epoch, {plan.warmup_steps:,} of warmup)"),
        ("", f"{evaluations} ({plan.tokens_evaluated:,} tokens), {counted(plan.checkpoints, 'checkpoint')}"),
        ("memory", f"{plan.peak_memory_gib:.1f} GiB expected ({memory_shares(plan)}), {available}"),
        *working_set_rows(plan),
        *([("recomputed", f"layers {plan.checkpointed_from}")] if plan.checkpointed_from else []),
        ("disk", f"{plan.disk_gib:.1f} GiB"),
        ("time", time_text(plan)),
        *([] if plan.cost_per_hour is None else [("cost", cost_text(plan.cost, plan.cost_per_hour))]),
    ]


def certificate_text(plan: Plan) -> str:
    """How many rows were compared with mistral-common; a difference would have raised an error."""
    compared, rows = plan.certificate["rows"], plan.certificate["of"]
    if not compared:
        return "none (not Mistral's tokenizer, or off)"
    if compared == rows:
        return f"{compared:,} rows equal mistral-common's"
    return f"{compared:,} of {rows:,} rows compared, all equal mistral-common's (dataset.certificate=every_row: all)"


def working_set_rows(plan: Plan) -> list[tuple[str, str]]:
    """On a Mac: its GPU's working set, and how the expected peak and an early estimate compare with it."""
    if plan.working_set_gib is None or plan.specified_memory_gb is None:
        return []
    limit_gb, (least, most) = plan.working_set_gib * GIB / 1e9, plan.specified_memory_gb
    expected = f"expected {plan.peak_memory_gib - plan.working_set_gib:+.1f} GiB against it"
    specified = f"an early estimate, {least}-{most} GB: {least - limit_gb:+.1f} to {most - limit_gb:+.1f} GB"
    return [
        ("", f"{plan.working_set_gib:.1f} GiB ({limit_gb:.1f} GB) is the GPU's working set: {expected}, {specified}")
    ]


def memory_shares(plan: Plan) -> str:
    """The parts of the peak, largest first, without those that round to 0.0 GiB."""
    parts = sorted(plan.memory_parts.items(), key=lambda part: -part[1])
    shown = [(name.replace("_", " "), gib) for name, gib in parts if gib >= 0.05] or parts[:1]
    return ", ".join(f"{name} {gib:.1f}" for name, gib in shown)


def time_text(plan: Plan) -> str:
    """How long the run takes, by a measured speed or by an expectation, and where that comes from."""
    if plan.hours_expected is not None:
        least, most = (duration(3600 * hours) for hours in plan.hours_expected)
        text = "under 1 s" if 3600 * plan.hours_expected[1] < 1 else f"{least} to {most}"
        return f"{text} at {plan.hours_expected_from}"
    if plan.hours is None:
        return "not measured"
    text = duration(3600 * plan.hours)
    return text if plan.hours_from is None else f"{text} at {plan.hours_from}"


def cost_text(cost: float | None, cost_per_hour: float) -> str:
    """The cost of the hours, in the currency of `tracking.cost_per_hour`."""
    return f"{'not measured' if cost is None else f'{cost:,.2f}'} ({cost_per_hour:,.2f} an hour)"
