"""Configs of one file and settings, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.config import load as config_load
from finetune.config.schema import Config
from finetune.errors import ConfigError


def written(folder: Path, text: str, name: str = "mine.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def load(choice: str, *settings: str) -> Config:
    return config_load.load_config(choice, settings)[0]


def problems(choice: str | None, *settings: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        config_load.load_config(choice, settings)
    return caught.value.problems


def leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted path -> value."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= leaves(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {f"{prefix}{key}": inner}
    return found
