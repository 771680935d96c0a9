"""The smallest change of a config that makes a run fit into the memory there is."""

from __future__ import annotations

import pytest

from finetune.plan.fit import Change, smallest_change
from finetune.plan.memory import peak_gib
from finetune.plan.model_shape import MISTRAL_7B
from support.plans import load


def test_a_run_that_fits_is_left_as_it_is() -> None:
    assert smallest_change(load(), MISTRAL_7B, 80) == Change((), 13.4, "nothing to change; 13.4 GiB expected")


def test_fewer_rows_at_once_and_more_accumulation_come_first() -> None:
    found = smallest_change(load("training.gradient_checkpointing=false"), MISTRAL_7B, 80)
    assert found == Change(
        ("training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=8"),
        67.51,
        "training.per_device_train_batch_size 4 -> 2, training.gradient_accumulation_steps 4 -> 8 keeps the effective "
        "batch of 16; 67.5 GiB expected",
    )
    assert found.command == (
        "--set training.per_device_train_batch_size=2 --set training.gradient_accumulation_steps=8"
    )


def test_where_only_some_layers_are_checkpointed_all_come_before_anything_else() -> None:
    found = smallest_change(load("training.checkpointed_layers=8"), MISTRAL_7B, 80)
    text = "training.checkpointed_layers 8 -> all; 13.4 GiB expected"
    assert found == Change(("training.checkpointed_layers=all",), 13.4, text)


def test_changes_add_up_in_their_order_until_the_run_fits() -> None:
    wasteful = load(
        "training.gradient_checkpointing=false",
        "quantization.storage=expanded",
        "training.per_device_train_batch_size=6",
    )
    found = smallest_change(wasteful, MISTRAL_7B, 5.8)
    assert found is not None
    assert found.settings == (
        "training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=24",
        "training.gradient_checkpointing=true", "quantization.storage=packed", "model.max_seq_length=2048",
    )  # fmt: skip
    assert found.sentence == (
        "training.per_device_train_batch_size 6 -> 1, training.gradient_accumulation_steps 4 -> 24 keeps the effective "
        "batch of 24; training.gradient_checkpointing false -> true; "
        "quantization.storage expanded -> packed; model.max_seq_length 4096 -> 2048 cuts longer rows; "
        "5.7 GiB expected"
    )


@pytest.mark.parametrize("capacity", [6, 8, 10, 13, 20, 40, 60])
@pytest.mark.parametrize("platform", ["h100", "m4"])
def test_what_is_suggested_loads_fits_and_keeps_the_effective_batch(platform: str, capacity: float) -> None:
    before = load("training.gradient_checkpointing=false", platform=platform)
    found = smallest_change(before, MISTRAL_7B, capacity)
    assert found is not None
    after = load("training.gradient_checkpointing=false", *found.settings, platform=platform)
    assert round(peak_gib(after, MISTRAL_7B), 2) == found.peak_gib <= capacity
    assert after.effective_batch_size == before.effective_batch_size


def test_an_evaluation_that_is_too_large_gets_fewer_rows_and_training_stays() -> None:
    found = smallest_change(load("training.per_device_eval_batch_size=64"), MISTRAL_7B, 17)
    assert found is not None
    assert found.settings == ("training.per_device_eval_batch_size=16",)


def test_a_measured_peak_corrects_what_is_expected() -> None:
    wanted = load("training.per_device_eval_batch_size=64")
    expected = peak_gib(wanted, MISTRAL_7B)
    found = smallest_change(wanted, MISTRAL_7B, 17, measured_gib=0.65 * expected)
    assert found is not None
    assert found.settings == ("training.per_device_eval_batch_size=32",)
    half = peak_gib(load("training.per_device_eval_batch_size=32"), MISTRAL_7B)
    assert found.peak_gib == round(0.65 * half, 2)


def test_nothing_fits_in_less_than_the_weights() -> None:
    assert smallest_change(load(), MISTRAL_7B, 4) is None
