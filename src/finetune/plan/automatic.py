"""The keys of `training` that may be `auto`, and the values a run uses instead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.plan.memory import checkpointed_layers
from finetune.plan.model_shape import Geometry

if TYPE_CHECKING:
    from finetune.config.schema import Config

FUSED = {"fused_kernels": "fused kernels", "fused_lora": "fused LoRA"}
PLAIN = dict.fromkeys(FUSED, False)


def left_open(config: Config) -> list[str]:
    """The keys of the fused paths that are `auto`."""
    return [key for key in FUSED if getattr(config.training, key) == "auto"]


def settled(config: Config, values: dict[str, Any]) -> Config:
    """`config` with each `auto` in `training` replaced by the key's value, if there is one."""
    known = {key: value for key, value in values.items() if getattr(config.training, key) == "auto"}
    return config.changed("training", **known)


def used(config: Config, geometry: Geometry) -> dict[str, Any]:
    """The values a run uses, for manifest and checkpoints; `auto` as the plan counts it."""
    fused = {key: getattr(config.training, key) is True for key in FUSED}
    return {**fused, "checkpointed_layers": checkpointed_layers(config, geometry)}


def in_words(values: dict[str, Any]) -> str:
    """`fused kernels and fused LoRA`, or `plain`, for the values of `used`."""
    return " and ".join(name for key, name in FUSED.items() if values[key]) or "plain"
