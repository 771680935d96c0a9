"""The tree of a config: frozen, hashed by its values, written and read again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.config import typed
from finetune.config.load import BASE_FILE
from finetune.config.schema import Config
from support.configs import leaves, load, written


def other(value: Any) -> Any:
    """Some other value of the same kind."""
    if isinstance(value, dict):
        raise TypeError(value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return [*value, "more"] if isinstance(value, list | tuple) else f"{value}x"


def test_the_hash_changes_with_any_value(local_model: str) -> None:
    tree = load(str(BASE_FILE), local_model)
    hashes = {tree.sha256()}
    for path in leaves(tree.as_dict()):
        section, _, key = path.rpartition(".")
        changed: Any = getattr(tree, section) if section else tree
        changed = dataclasses.replace(changed, **{key: other(getattr(changed, key))})
        hashes.add((dataclasses.replace(tree, **{section: changed}) if section else changed).sha256())
    assert len(hashes) == 1 + len(leaves(tree.as_dict()))


def test_the_hash_does_not_change_with_comments_order_or_spelling(tmp_path: Path, local_model: str) -> None:
    one = written(tmp_path, "lora: {r: 8, lora_alpha: 16}\ntraining:\n  learning_rate: 0.0002\n  weight_decay: 0\n")
    first = load(one, local_model).sha256()
    two = written(
        tmp_path, "# notes\ntraining: {weight_decay: 0.0, learning_rate: 2e-4}\nlora: {lora_alpha: 16, r: 8}\n"
    )
    assert load(two, local_model).sha256() == first
    assert load(two, local_model, "lora.r=9").sha256() != first
    assert len(first) == 64


def test_the_tree_is_frozen_at_every_depth(local_model: str) -> None:
    tree = load(str(BASE_FILE), local_model)
    for path in typed.paths(Config):
        section, _, key = path.rpartition(".")
        holder: Any = getattr(tree, section) if section else tree
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(holder, key, None)
    assert hash(tree) == hash(load(str(BASE_FILE), local_model))


def test_the_tree_as_a_mapping_is_json_and_loads_again_to_the_same_tree(tmp_path: Path, local_model: str) -> None:
    settings = ["dataset.sample_prompts=['a: b', é, '2e-4 x']", "training.learning_rate=1e-5", "system_prompt=hello"]
    tree = load("m4", local_model, *settings)
    again = json.loads(json.dumps(tree.as_dict()))
    assert again == tree.as_dict()
    path = written(tmp_path, yaml.safe_dump(again))
    assert load(path) == tree
    assert load(written(tmp_path, json.dumps(again))) == tree


def test_a_step_takes_the_micro_batch_times_the_accumulation(local_model: str) -> None:
    settings = ["training.per_device_train_batch_size=3", "training.gradient_accumulation_steps=5"]
    assert load(str(BASE_FILE), local_model, *settings).effective_batch_size == 15
