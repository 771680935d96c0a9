"""Trials of optimizers: their numbers on a healthy CPU, and that each goes wrong with what it tries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch

from finetune.checks.device import OPTIMIZER_TOLERANCE, TOLERANCE
from finetune.checks.numerics.optimizer import optimizer_step

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
OPTIMIZERS = ("paged_adamw_32bit", "paged_adamw_8bit", "adamw_torch_fused", "adamw_torch")


def most(name: str) -> float:
    return OPTIMIZER_TOLERANCE.get(name, TOLERANCE["float32"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_that_a_config_may_name_moves_like_adamw(name: str) -> None:
    assert optimizer_step(name, "cpu") < most(name) / 5


def test_the_8_bit_optimizer_keeps_8_bits() -> None:
    assert optimizer_step("paged_adamw_8bit", "cpu") > TOLERANCE["float32"]


def made_with(make: Callable[..., Any], **wrong: Any) -> Callable[..., Any]:
    return lambda weights, **options: make(weights, **{**options, **wrong})


@pytest.mark.parametrize(
    "wrong", [{"betas": (0.8, 0.999)}, {"betas": (0.9, 0.99)}, {"eps": 1e-3}, {"lr": 0.0101}, {"weight_decay": 0.1}]
)
def test_another_beta_epsilon_rate_or_decay_is_seen(wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    optim = bitsandbytes.optim
    monkeypatch.setattr(optim, "PagedAdamW32bit", made_with(optim.PagedAdamW32bit, **wrong))
    assert optimizer_step("paged_adamw_32bit", "cpu") > most("paged_adamw_32bit")


@pytest.mark.parametrize("make", [made_with(torch.optim.SGD), made_with(torch.optim.AdamW, lr=0.011)])
def test_an_8_bit_optimizer_that_is_another_is_seen(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitsandbytes.optim, "PagedAdamW8bit", make)
    assert optimizer_step("paged_adamw_8bit", "cpu") > most("paged_adamw_8bit")
