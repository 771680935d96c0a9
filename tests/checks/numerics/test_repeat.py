"""The trial of repeated bits: what a stand-in of flash-attn gives another time is named, and nothing else."""

from __future__ import annotations

import pytest

from finetune.checks.numerics.repeat import differing
from finetune.config.load import load_config
from support.stand_ins import by_document, install_flash_attn, install_varlen_attn, small

NAMES = ("gradient of the input", "gradient of q_proj.lora_A", "gradient of q_proj.lora_B")
UNORDERED = [f"{part}'s {name}" for part in ("attention", "the layer") for name in NAMES]


@pytest.mark.parametrize(
    ("attention", "variable", "found"),
    [
        ("sdpa", "0", []),
        ("torch_varlen", "0", []),
        ("flash_attention_2", "1", []),
        ("flash_attention_2", "0", UNORDERED),
    ],
)
def test_what_differs_between_passes_is_named(
    attention: str, variable: str, found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers hands FLASH_ATTENTION_DETERMINISTIC to flash-attn, whose gradient of queries depends on it."""
    install_flash_attn(monkeypatch, by_document)
    install_varlen_attn(monkeypatch)
    small(monkeypatch)
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", variable)
    assert differing(load_config("h100", [f"model.attn_implementation={attention}"])[0], "cpu") == found
