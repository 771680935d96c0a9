"""The config of a tiny Mistral."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.config.load import load_config
from finetune.config.schema import Config


@pytest.fixture
def config(tiny_mistral: Path) -> Config:
    return load_config("cpu", [f"model.name={tiny_mistral}", "lora.lora_dropout=0"])[0]
