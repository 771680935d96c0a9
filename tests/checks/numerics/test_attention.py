"""Trials of attention: their numbers on a healthy CPU, and that each goes wrong with what it tries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from finetune.checks.device import TOLERANCE
from finetune.checks.numerics.attention import packed_attention
from support.stand_ins import Deaf, across_documents, by_document, install_flash_attn, install_varlen_attn


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
