"""`training.checkpointed_layers: auto`: the fewest layers that stay within the budget, by the formula and by trials."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from finetune.errors import ConfigError
from finetune.plan.checkpointed_layers import TRIALS, Choice, by_formula, by_trials, with_layers
from finetune.plan.memory import checkpointed_layers, peak_gib
from finetune.plan.model_shape import MISTRAL_7B
from support.plans import load

AUTO = "training.checkpointed_layers=auto"


# The key --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["24", "0"])
def test_a_number_of_layers_has_no_effect_without_checkpointing(value: str) -> None:
    setting = f"training.checkpointed_layers={value}"
    with pytest.raises(ConfigError) as refused:
        load("training.gradient_checkpointing=false", setting)
    text = f"{value} has no effect with gradient_checkpointing: false; set that to true, or this to all"
    assert str(refused.value) == f"config: 1 problem\n  --set {setting}  training.checkpointed_layers: {text}"


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ((), 32),
        (("training.gradient_checkpointing=false",), 0),
        (("training.checkpointed_layers=0",), 0),
        (("training.checkpointed_layers=24",), 24),
        ((AUTO,), 32),
    ],
)
def test_the_key_says_how_many_layers_are_checkpointed(settings: tuple[str, ...], layers: int) -> None:
    assert checkpointed_layers(load(*settings), MISTRAL_7B) == layers


# By the formula -------------------------------------------------------------------------------------------------------


def test_without_auto_there_is_nothing_to_choose_and_nothing_to_tell() -> None:
    assert by_formula(load("training.checkpointed_layers=all"), MISTRAL_7B, 1.0, "never told") == Choice(32)
    assert by_formula(load("training.checkpointed_layers=3"), MISTRAL_7B, 1.0, "never told") == Choice(3)
    assert by_formula(load("training.gradient_checkpointing=false"), MISTRAL_7B, 1.0, "never told") == Choice(0)


def test_the_formula_gives_the_fewest_layers_within_nine_tenths_of_the_capacity() -> None:
    auto = load(AUTO)
    found = by_formula(auto, MISTRAL_7B, 80.0, "no trial")
    assert found == Choice(16, "16 of 32: 70.1 GiB expected by the formula alone, at most 72.0 of 80.0; no trial")
    assert peak_gib(with_layers(auto, 16), MISTRAL_7B) <= 72 < peak_gib(with_layers(auto, 15), MISTRAL_7B)
    assert by_formula(auto, MISTRAL_7B, 1000.0, "no trial").layers == 0


def test_where_not_even_all_layers_are_expected_to_fit_it_is_all_of_them() -> None:
    found = by_formula(load(AUTO), MISTRAL_7B, 14.0, "no trial")
    assert found == Choice(32, "32 of 32: 13.4 GiB expected by the formula alone, more than 12.6 of 14.0; no trial")


# By trials ------------------------------------------------------------------------------------------------------------


def machine(static: float, factor: float, capacity: float) -> tuple[Callable[[int], float | None], list[int]]:
    """A device whose peaks are the formula's times `factor` and `static` GiB more; and the trials made on it."""
    made: list[int] = []

    def measure(layers: int) -> float | None:
        made.append(layers)
        peak = static + factor * peak_gib(with_layers(load(AUTO), layers), MISTRAL_7B)
        return peak if peak <= capacity else None

    return measure, made


@pytest.mark.parametrize("static", [0.0, 20.0])
@pytest.mark.parametrize("factor", [0.5, 1.1, 2.0])
def test_trials_find_the_fewest_layers_that_fit_however_far_the_formula_is_off(static: float, factor: float) -> None:
    measure, made = machine(static, factor, 79.0)
    found = by_trials(load(AUTO), MISTRAL_7B, 79.0, measure)
    count = len(made)
    fits = [layers for layers in range(33) if (measure(layers) or 100.0) <= 0.9 * 79.0]
    assert found.layers == min(fits)
    assert made[0] == 32
    assert len(set(made[:count])) == count <= 5


def test_three_trials_are_enough_where_the_difference_is_a_line_and_are_told() -> None:
    measure, made = machine(3.0, 1.1, 79.0)
    found = by_trials(load(AUTO), MISTRAL_7B, 79.0, measure)
    assert made == [32, 24, 19]
    text = "19 of 32: peak 67.6 GiB measured, at most 71.1 of 79.0 (17.7 with 32, 46.8 with 24, 67.6 with 19)"
    assert found == Choice(19, text)


def test_memory_that_ends_in_a_trial_is_told_and_a_trial_with_fewer_whole_layers_follows() -> None:
    peaks: dict[int, float | None] = {32: 14.0, 24: None, 28: 55.0, 27: None}
    found = by_trials(load(AUTO), MISTRAL_7B, 79.0, lambda layers: peaks[layers])
    trials = "14.0 with 32, out of memory with 24, 55.0 with 28, out of memory with 27"
    assert found == Choice(28, f"28 of 32: peak 55.0 GiB measured, at most 71.1 of 79.0 ({trials})")


def test_where_memory_ends_with_any_whole_layer_all_are_checkpointed() -> None:
    made: list[int] = []

    def measure(layers: int) -> float | None:
        made.append(layers)
        return 14.0 if layers == 32 else None

    assert by_trials(load(AUTO), MISTRAL_7B, 79.0, measure).layers == 32
    assert made[0] == 32 and len(made) == len(set(made)) <= TRIALS


def test_what_was_not_tried_is_not_chosen_also_where_the_trials_are_used_up() -> None:
    jumps = iter([14.0, 20.0, 90.0, 25.0, 90.0, 90.0, 90.0])  # no line goes through these
    made: dict[int, float] = {}
    found = by_trials(load(AUTO), MISTRAL_7B, 79.0, lambda layers: made.setdefault(layers, next(jumps)))
    assert len(made) <= TRIALS
    assert made[found.layers] <= 0.9 * 79.0


def test_a_run_that_is_over_the_budget_already_is_tried_once() -> None:
    found = by_trials(load(AUTO), MISTRAL_7B, 79.0, lambda _layers: 75.0)
    assert found == Choice(32, "32 of 32: peak 75.0 GiB measured, more than 71.1 of 79.0 (75.0 with 32)")
