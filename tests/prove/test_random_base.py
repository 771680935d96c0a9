"""A base of random weights: NF4 as load_base gives it, the same each time, and one that load_base reads from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch

from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.errors import CheckFailed
from finetune.machine.platforms import PLATFORMS
from finetune.model.load import load_base
from finetune.plan.model_shape import Geometry
from finetune.prove import random_base

TINY = Geometry(64, 192, 2, 4, 2, 1000, False)


def config(*settings: str) -> Config:
    return load_config("cpu", ["model.name=mistralai/Mistral-7B-Instruct-v0.2", *settings])[0]


def made(*settings: str) -> Any:
    return random_base.make_base(config(*settings), TINY, PLATFORMS["cpu"])


def loss(base: Any) -> float:
    tokens = torch.arange(3, 67)[None]
    with torch.no_grad():
        return float(base(input_ids=tokens, labels=tokens, use_cache=False).loss)


def nf4(base: Any) -> list[Any]:
    return [module for module in base.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]


def test_it_is_nf4_whole_and_the_same_every_time() -> None:
    base = made()
    assert loss(base) == loss(made())
    assert loss(base) == pytest.approx(6.9, abs=0.3)  # ln 1000
    assert len(nf4(base)) == 7 * TINY.num_hidden_layers
    assert all(module.weight.quant_state is not None for module in nf4(base))
    assert {tensor.device.type for tensor in (*base.parameters(), *base.buffers())} == {"cpu"}
    assert base.is_loaded_in_4bit


def test_expanded_it_has_no_nf4_and_the_same_loss() -> None:
    base = made("quantization.storage=expanded")
    assert loss(base) == pytest.approx(loss(made()), rel=1e-6)
    assert nf4(base) == []


def test_what_is_not_as_the_config_asks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_base, "expand", lambda *_arguments: None)
    with pytest.raises(CheckFailed) as caught:
        made("quantization.storage=expanded")
    parts = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    layers = [f"model.layers.{layer}.{part} is Linear4bit, expected Linear" for layer in range(2) for part in parts]
    expected = ["model: not loaded as the config asks", *layers[:10], "... and 4 more"]
    assert str(caught.value) == "\n  ".join(expected)


def test_a_saved_one_is_read_as_any_base(tmp_path: Path) -> None:
    random_base.save_base(tmp_path, TINY)
    saved = load_config("cpu", [f"model.name={tmp_path}"])[0]
    assert len(nf4(load_base(saved.model, saved.quantization, "cpu"))) == 7 * TINY.num_hidden_layers
