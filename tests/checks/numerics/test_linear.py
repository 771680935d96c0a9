"""Trials of linear layers: their numbers on a healthy CPU, and that each goes wrong with what it tries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch

from finetune.checks.device import TOLERANCE
from finetune.checks.numerics import linear

FP32, BF16 = torch.float32, torch.bfloat16


def test_nf4_loses_what_was_measured() -> None:
    least, most = linear.NF4_LOSS
    assert linear.nf4_loss("cpu") == pytest.approx(0.0920, abs=0.0005)
    assert least < 0.092 < most


def changed(function: Callable[..., Any], change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    return lambda *arguments, **options: change(function(*arguments, **options))


@pytest.mark.parametrize(
    ("change", "lost"), [(torch.zeros_like, 1.0), (lambda back: back * 1.2, 0.224), (lambda back: back.flip(0), 1.43)]
)
def test_unpacking_that_gives_other_weights_loses_more_than_is_allowed(
    change: Callable[[torch.Tensor], torch.Tensor], lost: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = bitsandbytes.functional.dequantize_4bit
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", changed(real, change))
    assert linear.nf4_loss("cpu") == pytest.approx(lost, abs=0.02)
    assert linear.nf4_loss("cpu") > linear.NF4_LOSS[1]


def test_packing_that_packs_nothing_loses_less_than_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", lambda weights, **_: (weights, None))
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", lambda packed, _: packed)
    assert linear.nf4_loss("cpu") < linear.NF4_LOSS[0]


@pytest.mark.parametrize("storage", ["packed", "expanded"])
def test_a_qlora_step_is_the_same_in_fp32_and_rounded_in_bfloat16(storage: str) -> None:
    assert linear.qlora_step("cpu", FP32, storage) <= 1e-6
    assert 1e-4 < linear.qlora_step("cpu", BF16, storage) < TOLERANCE["bfloat16"] / 3


@pytest.mark.parametrize("change", [torch.zeros_like, lambda y: y * 0.5, lambda y: y * float("nan")])
@pytest.mark.parametrize(("dtype", "most"), [(FP32, TOLERANCE["float32"]), (BF16, TOLERANCE["bfloat16"])])
def test_a_4_bit_layer_that_computes_something_else_is_seen(
    change: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = bitsandbytes.nn.Linear4bit
    monkeypatch.setattr(layer, "forward", changed(layer.forward, change))
    assert linear.qlora_step("cpu", dtype, "packed") > most


@pytest.mark.parametrize("wrong", [lambda rows: rows <= 1536, lambda rows: rows > 1536])
def test_either_kernel_of_bitsandbytes_on_an_h100_is_tried(
    wrong: Callable[[int], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """_gemm_4bit_custom_max_m of bitsandbytes 0.50.2 is 1,536."""
    real = bitsandbytes.nn.Linear4bit.forward
    monkeypatch.setattr(
        bitsandbytes.nn.Linear4bit, "forward", lambda layer, x: real(layer, x) * (0.5 if wrong(len(x)) else 1)
    )
    assert linear.qlora_step("cpu", BF16, "packed") > TOLERANCE["bfloat16"]


@pytest.mark.parametrize("change", [torch.zeros_like, lambda y: y * 0.5, lambda y: y * float("nan")])
def test_an_expanded_layer_that_computes_something_else_is_seen(
    change: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, since the reference is such a layer too, in fp32."""
    real = torch.nn.Linear.forward

    def forward(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return change(real(layer, x)) if x.dtype == BF16 else real(layer, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    assert linear.qlora_step("cpu", BF16, "expanded") > TOLERANCE["bfloat16"]


def test_an_expanded_layer_does_without_4_bit_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such kernel here")

    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", broken)
    assert linear.qlora_step("cpu", BF16, "expanded") < TOLERANCE["bfloat16"] / 3
    with pytest.raises(RuntimeError, match="no such kernel here"):
        linear.qlora_step("cpu", BF16, "packed")


def test_a_step_that_does_not_follow_the_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real, steps = torch.optim.AdamW, []

    def every_other(*arguments: Any, **options: Any) -> torch.optim.Optimizer:
        """The first one made, the device's, steps with half the learning rate."""
        steps.append(options["lr"])
        return real(*arguments, **{**options, "lr": options["lr"] / (2 if len(steps) == 1 else 1)})

    monkeypatch.setattr(torch.optim, "AdamW", every_other)
    assert linear.qlora_step("cpu", FP32, "packed") == pytest.approx(0.5, abs=0.01)


def test_a_bfloat16_product_is_rounded_and_no_more() -> None:
    assert 1e-3 < linear.bfloat16_product("cpu") < TOLERANCE["bfloat16"] / 3


@pytest.mark.parametrize("change", [torch.zeros_like, lambda y: y * 1.1, lambda y: y.flip(0)])
def test_a_bfloat16_product_that_is_another_is_seen(
    change: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.Tensor.__matmul__

    def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return change(real(left, right)) if left.dtype == BF16 else real(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    assert linear.bfloat16_product("cpu") > TOLERANCE["bfloat16"]
