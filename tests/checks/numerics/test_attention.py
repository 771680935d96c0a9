"""Trials of attention: their numbers on a healthy CPU, and that each goes wrong with what it tries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from finetune.checks.device import TOLERANCE
from finetune.checks.numerics.attention import packed_attention, sdpa
from support.stand_ins import (
    Deaf,
    across_documents,
    by_document,
    install_flash_attn,
    install_varlen_attn,
    see_the_future,
)


def sees_the_future(*packed: Any, **_: Any) -> Any:
    return by_document(*packed, causal=False)


def forgets_the_gradient_of_values(q: Any, k: Any, v: Any, *packed: Any, causal: bool) -> Any:
    return by_document(q, k, Deaf.apply(v), *packed, causal=causal)


def test_attention_over_each_document_alone_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    install_flash_attn(monkeypatch, by_document)
    assert 1e-3 < packed_attention("flash_attention_2", "cpu") < TOLERANCE["bfloat16"] / 3


def test_torch_varlen_is_tried_as_it_trains_and_a_leak_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    install_varlen_attn(monkeypatch, "2.10")
    assert 1e-3 < packed_attention("torch_varlen", "cpu") < TOLERANCE["bfloat16"] / 3
    install_varlen_attn(monkeypatch, "2.10", across_documents)
    assert packed_attention("torch_varlen", "cpu") > 10 * TOLERANCE["bfloat16"]


@pytest.mark.parametrize("function", [across_documents, sees_the_future, forgets_the_gradient_of_values])
def test_attention_that_leaks_or_loses_a_gradient_is_seen(
    function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    install_flash_attn(monkeypatch, function)
    assert packed_attention("flash_attention_2", "cpu") > 10 * TOLERANCE["bfloat16"]


def test_without_flash_attn_it_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    install_flash_attn(monkeypatch, None)
    with pytest.raises(ImportError):
        packed_attention("flash_attention_2", "cpu")


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.float32, 0, 1e-5), (torch.bfloat16, 1e-3, 0.015)])
def test_torchs_attention_is_right_but_for_rounding(dtype: torch.dtype, least: float, most: float) -> None:
    assert least < sdpa("cpu", dtype) < most <= TOLERANCE["bfloat16"] / 2


@pytest.mark.parametrize("with_gradient", [False, True])
def test_attention_that_sees_the_future_with_or_without_a_gradient_is_seen(
    with_gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    see_the_future(monkeypatch, with_gradient)
    assert sdpa("cpu", torch.bfloat16) > 10 * TOLERANCE["bfloat16"]


@pytest.mark.parametrize("changed", ["attn_mask", "scale", "enable_gqa"])
def test_a_mask_a_scale_or_grouped_heads_that_are_not_heeded_are_seen(
    changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.nn.functional.scaled_dot_product_attention

    def deaf(q: Any, k: Any, v: Any, **how: Any) -> Any:
        if changed == "enable_gqa":  # every head of queries has the one head of keys: take another for some
            k = torch.cat([k, *([k.flip(2)] * 3)], 1) if k.shape[1] == 1 else k.roll(1, 2)
            v = v.expand(-1, 4, -1, -1)
        elif how.get("attn_mask") is not None or changed == "scale":
            how[changed] = {"attn_mask": None, "scale": 1.0}[changed]
        return real(q, k, v, **how)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", deaf)
    assert sdpa("cpu", torch.bfloat16) > 10 * TOLERANCE["bfloat16"]
