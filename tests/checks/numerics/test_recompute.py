"""The trial of recomputed layers: equal on a healthy CPU, and far off where dropout draws other masks again."""

from __future__ import annotations

import pytest

from finetune.checks.numerics.recompute import recomputed_gradient
from finetune.config.load import load_config
from finetune.machine.platforms import PLATFORMS, Platform
from support.stand_ins import keep_no_random_numbers

CPU = PLATFORMS["cpu"]


def test_layers_computed_again_have_the_same_gradient() -> None:
    assert recomputed_gradient(CPU, load_config("m4")[0].lora) == 0.0


@pytest.mark.parametrize(("dropout", "least", "most"), [(0.05, 0.1, 1.0), (0.0, 0.0, 0.0)])
def test_other_dropout_masks_are_seen(
    dropout: float, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_no_random_numbers(monkeypatch)
    lora = load_config("m4", [f"lora.lora_dropout={dropout}"])[0].lora
    assert least <= recomputed_gradient(CPU, lora) <= most


def test_a_platform_whose_random_numbers_are_apart_keeps_them_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_no_random_numbers(monkeypatch)
    monkeypatch.setattr(Platform, "random_state_apart", True)
    assert recomputed_gradient(CPU, load_config("m4")[0].lora) == 0.0
