"""The plan in words: a row for each thing that a person asks of it."""

from __future__ import annotations

from typing import Any

from finetune.plan.describe import plan_lines
from finetune.plan.plan import Plan
from support.plans import PLAN


def changed(**values: Any) -> dict[str, str]:
    """The plan's rows by name, with some numbers changed."""
    return dict(plan_lines(Plan(**{**PLAN.as_dict(), **values})))


def test_the_layers_that_the_program_chose_to_checkpoint_have_a_row() -> None:
    assert "recomputed" not in changed()
    assert changed(checkpointed_from="16 of 32: because")["recomputed"] == "layers 16 of 32: because"


def test_the_plan_is_told_in_nine_rows() -> None:
    assert plan_lines(PLAN) == [
        ("rows", "12,345 to train on, 1,371 held out, 1,204 cut, 3 dropped"),
        ("tokens", "4,000,000 (38% with loss)"),
        ("certificate", "13,719 rows equal mistral-common's"),
        ("sequences", "1,020, 95.8% full, 16 per step"),
        ("steps", "1,920 (64 per epoch, 58 of warmup)"),
        ("", "21 evaluations (8,400,000 tokens), 4 checkpoints"),
        ("memory", "13.0 GiB expected (activations 9.1, weights 3.8), 79.1 GiB free"),
        ("disk", "2.7 GiB"),
        ("time", "3.5 h"),
    ]


def test_what_did_not_happen_or_is_not_known_is_said_so() -> None:
    assert changed(rows_truncated=0)["rows"] == "12,345 to train on, 1,371 held out, 3 dropped"
    assert changed(rows_truncated=0, rows_dropped=0)["rows"] == "12,345 to train on, 1,371 held out"
    part = changed(rows_truncated=0, rows_dropped=0, rows_evaluated=200)["rows"]
    assert part == "12,345 to train on, 1,371 held out (200 of them evaluated)"
    expected = "13.0 GiB expected (activations 9.1, weights 3.8)"
    assert changed(memory_available_gib=None)["memory"] == f"{expected}, not this machine"
    assert changed(hours=None)["time"] == "not measured"
    none = {"rows": 0, "of": 13_719, "mismatches": 0}
    assert changed(certificate=none)["certificate"] == "none (not Mistral's tokenizer, or off)"
    sample = {"rows": 702, "of": 13_719, "mismatches": 0}
    assert changed(certificate=sample)["certificate"] == (
        "702 of 13,719 rows compared, all equal mistral-common's (dataset.certificate=every_row: all)"
    )


def test_on_a_mac_expected_and_specified_memory_are_set_against_the_gpus_working_set() -> None:
    mac = {"peak_memory_gib": 17.41, "working_set_gib": 21.3, "specified_memory_gb": (24, 28)}
    assert changed(**mac)[""] == (
        "21.3 GiB (22.9 GB) is the GPU's working set: expected -3.9 GiB against it, "
        "an early estimate, 24-28 GB: +1.1 to +5.1 GB"
    )
    assert changed(**mac | {"peak_memory_gib": 25.0, "working_set_gib": 24.0})[""] == (
        "24.0 GiB (25.8 GB) is the GPU's working set: expected +1.0 GiB against it, "
        "an early estimate, 24-28 GB: -1.8 to +2.2 GB"
    )


def test_parts_of_the_memory_that_would_read_nothing_are_left_out() -> None:
    parts = {"weights": 3.841, "lora": 0.049, "logits": 0.0, "attention_mask": 1.25, "activations": 7.82}
    row = changed(memory_parts=parts)["memory"]
    assert row == "13.0 GiB expected (activations 7.8, weights 3.8, attention mask 1.2), 79.1 GiB free"
    assert changed(memory_parts={"lora": 0.01, "weights": 0.02})["memory"].startswith("13.0 GiB expected (weights 0.0)")


def test_the_time_says_who_measured_the_speed_and_short_ones_are_in_minutes() -> None:
    assert changed(hours_from="2,950 tokens/s on a GPU, a.json")["time"] == "3.5 h at 2,950 tokens/s on a GPU, a.json"
    assert changed(hours=0.25, hours_from=None)["time"] == "15 min"
    expected = {
        "hours": None,
        "hours_from": None,
        "hours_expected": (0.25, 2.5),
        "hours_expected_from": "25-50 tokens/s",
    }
    assert changed(**expected)["time"] == "15 min to 2.5 h at 25-50 tokens/s"
    assert changed(**expected | {"hours_expected": (1e-5, 2e-5)})["time"] == "under 1 s at 25-50 tokens/s"


def test_the_cost_is_told_where_an_hour_has_a_price() -> None:
    assert "cost" not in changed()
    assert changed(cost_per_hour=2.5)["cost"] == "8.65 (2.50 an hour)"
    assert changed(cost_per_hour=2.5, hours=None)["cost"] == "not measured (2.50 an hour)"
    assert changed(cost_per_hour=1000, hours=3)["cost"] == "3,000.00 (1,000.00 an hour)"


def test_a_full_gpu_is_not_taken_for_an_unknown_one() -> None:
    assert changed(memory_available_gib=0.0)["memory"].endswith(", 0.0 GiB free")
