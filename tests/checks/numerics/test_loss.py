"""The trial of TRL's loss: its numbers on a healthy CPU, and that it goes wrong with what it tries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trl.kernels import chunked_logprob

from finetune.checks.device import TOLERANCE
from finetune.checks.numerics.loss import chunked_loss
from support.stand_ins import write_side_by_side

FP32, BF16 = torch.float32, torch.bfloat16


def test_the_loss_is_exact_in_fp32_and_rounded_in_bfloat16() -> None:
    assert chunked_loss("cpu", FP32) < TOLERANCE["float32"] / 10
    assert 1e-3 < chunked_loss("cpu", BF16) < TOLERANCE["bfloat16"] / 3


def test_products_that_ignore_the_strides_of_the_tile_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    write_side_by_side(monkeypatch)
    assert chunked_loss("cpu", BF16) > 5 * TOLERANCE["bfloat16"]


@pytest.mark.parametrize("name", ["_forward_tile", "_backward_tile"])
def test_a_kernel_that_takes_another_target_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = getattr(chunked_logprob, name)

    def shifted(tile: Any, stride: Any, targets: Any, *more: Any, **flags: Any) -> None:
        real(tile, stride, targets.clone().sub_(1), *more, **flags)

    monkeypatch.setattr(chunked_logprob, name, shifted)
    assert chunked_loss("cpu", FP32) > 100 * TOLERANCE["float32"]
