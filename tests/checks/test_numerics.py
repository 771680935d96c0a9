"""Trials of the device: their numbers on a healthy CPU, and that each goes wrong with what it tries."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import bitsandbytes
import pytest
import torch

from finetune.checks import numerics
from finetune.checks.device import OPTIMIZER_TOLERANCE, TOLERANCE
from support.stand_ins import across_documents, by_document, install_flash_attn

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("found", "wanted", "far"),
    [
        ([1.0, -2.0], [1.0, -2.0], 0.0),
        ([1.0, -1.0], [1.0, -2.0], 0.5),
        ([3.0, -4.0], [1.0, -2.0], 1.0),
        ([float("nan"), 0.0], [1.0, -2.0], float("inf")),
        ([float("-inf"), 0.0], [1.0, -2.0], float("inf")),
    ],
)
def test_distance_is_the_largest_difference_over_the_largest_value(
    found: list[float], wanted: list[float], far: float
) -> None:
    assert numerics.distance(torch.tensor(found, dtype=BF16), torch.tensor(wanted)) == far


# NF4 ------------------------------------------------------------------------------------------------------------------


def test_nf4_loses_what_was_measured() -> None:
    least, most = numerics.NF4_LOSS
    assert numerics.nf4_loss("cpu") == pytest.approx(0.0920, abs=0.0005)
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
    assert numerics.nf4_loss("cpu") == pytest.approx(lost, abs=0.02)
    assert numerics.nf4_loss("cpu") > numerics.NF4_LOSS[1]


def test_packing_that_packs_nothing_loses_less_than_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", lambda weights, **_: (weights, None))
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", lambda packed, _: packed)
    assert numerics.nf4_loss("cpu") < numerics.NF4_LOSS[0]


# A QLoRA step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["packed", "expanded"])
def test_a_qlora_step_is_the_same_in_fp32_and_rounded_in_bfloat16(storage: str) -> None:
    assert numerics.qlora_step("cpu", FP32, storage) <= 1e-6
    assert 1e-4 < numerics.qlora_step("cpu", BF16, storage) < TOLERANCE["bfloat16"] / 3


class Deaf(torch.autograd.Function):
    """Its input forward, and no gradient backward."""

    @staticmethod
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(gradient)


@pytest.mark.parametrize("change", [torch.zeros_like, lambda y: y * 0.5, lambda y: y * float("nan")])
@pytest.mark.parametrize(("dtype", "most"), [(FP32, TOLERANCE["float32"]), (BF16, TOLERANCE["bfloat16"])])
def test_a_4_bit_layer_that_computes_something_else_is_seen(
    change: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = bitsandbytes.nn.Linear4bit
    monkeypatch.setattr(layer, "forward", changed(layer.forward, change))
    assert numerics.qlora_step("cpu", dtype, "packed") > most


@pytest.mark.parametrize("change", [torch.zeros_like, lambda y: y * 0.5, lambda y: y * float("nan")])
def test_an_expanded_layer_that_computes_something_else_is_seen(
    change: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, since the reference is such a layer too, in fp32."""
    real = torch.nn.Linear.forward

    def forward(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return change(real(layer, x)) if x.dtype == BF16 else real(layer, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    assert numerics.qlora_step("cpu", BF16, "expanded") > TOLERANCE["bfloat16"]


def test_an_expanded_layer_does_without_4_bit_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such kernel here")

    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", broken)
    assert numerics.qlora_step("cpu", BF16, "expanded") < TOLERANCE["bfloat16"] / 3
    with pytest.raises(RuntimeError, match="no such kernel here"):
        numerics.qlora_step("cpu", BF16, "packed")


def test_a_step_that_does_not_follow_the_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real, steps = torch.optim.AdamW, []

    def every_other(*arguments: Any, **options: Any) -> torch.optim.Optimizer:
        """The first one made, the device's, steps with half the learning rate."""
        steps.append(options["lr"])
        return real(*arguments, **{**options, "lr": options["lr"] / (2 if len(steps) == 1 else 1)})

    monkeypatch.setattr(torch.optim, "AdamW", every_other)
    assert numerics.qlora_step("cpu", FP32, "packed") == pytest.approx(0.5, abs=0.01)


# bfloat16 -------------------------------------------------------------------------------------------------------------


def test_a_bfloat16_product_is_rounded_and_no_more() -> None:
    assert 1e-3 < numerics.bfloat16_product("cpu") < TOLERANCE["bfloat16"] / 3


@pytest.mark.parametrize("change", [torch.zeros_like, lambda y: y * 1.1, lambda y: y.flip(0)])
def test_a_bfloat16_product_that_is_another_is_seen(
    change: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.Tensor.__matmul__

    def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return change(real(left, right)) if left.dtype == BF16 else real(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    assert numerics.bfloat16_product("cpu") > TOLERANCE["bfloat16"]


# Optimizers -----------------------------------------------------------------------------------------------------------

OPTIMIZERS = ("paged_adamw_32bit", "paged_adamw_8bit", "adamw_torch_fused", "adamw_torch")


def most(name: str) -> float:
    return OPTIMIZER_TOLERANCE.get(name, TOLERANCE["float32"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_that_a_config_may_name_moves_like_adamw(name: str) -> None:
    assert numerics.optimizer_step(name, "cpu") < most(name) / 5


def test_the_8_bit_optimizer_keeps_8_bits() -> None:
    assert numerics.optimizer_step("paged_adamw_8bit", "cpu") > TOLERANCE["float32"]


def made_with(make: Callable[..., Any], **wrong: Any) -> Callable[..., Any]:
    return lambda weights, **options: make(weights, **{**options, **wrong})


@pytest.mark.parametrize(
    "wrong", [{"betas": (0.8, 0.999)}, {"betas": (0.9, 0.99)}, {"eps": 1e-3}, {"lr": 0.0101}, {"weight_decay": 0.1}]
)
def test_another_beta_epsilon_rate_or_decay_is_seen(wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    optim = bitsandbytes.optim
    monkeypatch.setattr(optim, "PagedAdamW32bit", made_with(optim.PagedAdamW32bit, **wrong))
    assert numerics.optimizer_step("paged_adamw_32bit", "cpu") > most("paged_adamw_32bit")


@pytest.mark.parametrize("make", [made_with(torch.optim.SGD), made_with(torch.optim.AdamW, lr=0.011)])
def test_an_8_bit_optimizer_that_is_another_is_seen(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitsandbytes.optim, "PagedAdamW8bit", make)
    assert numerics.optimizer_step("paged_adamw_8bit", "cpu") > most("paged_adamw_8bit")


# flash-attn -----------------------------------------------------------------------------------------------------------


def sees_the_future(*packed: Any, **_: Any) -> Any:
    return by_document(*packed, causal=False)


def forgets_the_gradient_of_values(q: Any, k: Any, v: Any, *packed: Any, causal: bool) -> Any:
    return by_document(q, k, Deaf.apply(v), *packed, causal=causal)


def test_attention_over_each_document_alone_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    install_flash_attn(monkeypatch, by_document)
    assert 1e-3 < numerics.flash_attention("cpu") < TOLERANCE["bfloat16"] / 3


@pytest.mark.parametrize("function", [across_documents, sees_the_future, forgets_the_gradient_of_values])
def test_attention_that_leaks_or_loses_a_gradient_is_seen(
    function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    install_flash_attn(monkeypatch, function)
    assert numerics.flash_attention("cpu") > 10 * TOLERANCE["bfloat16"]


def test_without_flash_attn_it_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    install_flash_attn(monkeypatch, None)
    with pytest.raises(ImportError):
        numerics.flash_attention("cpu")


# The device -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trial",
    [
        numerics.nf4_loss,
        numerics.bfloat16_product,
        numerics.flash_attention,
        *(partial(numerics.optimizer_step, name) for name in ("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit")),
    ],
)
def test_a_trial_computes_on_the_device_that_is_named(
    trial: Callable[[str], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    install_flash_attn(monkeypatch, by_document)
    trial("cpu")
    with pytest.raises((NotImplementedError, RuntimeError), match=r"meta|cget_managed_ptr"):  # no numbers, no pages
        trial("meta")
