"""The tree of a config: frozen, hashed by its values, written and read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from finetune.config.load import BASE_FILE
from finetune.config.schema import Mark, keys, marked
from finetune.config.yaml_file import dump
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


@pytest.mark.filterwarnings("ignore:Pydantic serializer")  # no config has such values
def test_the_hash_changes_with_any_value(local_model: str) -> None:
    tree = load(str(BASE_FILE), local_model)
    hashes = {tree.sha256()}
    for path in leaves(tree.as_dict()):
        section, _, key = path.rpartition(".")
        changed: Any = getattr(tree, section) if section else tree
        changed = changed.model_copy(update={key: other(getattr(changed, key))})
        hashes.add((tree.model_copy(update={section: changed}) if section else changed).sha256())
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
    for path in keys():
        section, _, key = path.rpartition(".")
        holder: Any = getattr(tree, section) if section else tree
        with pytest.raises(ValidationError):
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


def test_a_change_replaces_values_of_one_section_and_leaves_the_config_as_it_was(local_model: str) -> None:
    tree = load(str(BASE_FILE), local_model)
    other = tree.changed("lora", r=8, lora_dropout=0)
    assert (other.lora.r, other.lora.lora_dropout, tree.lora.r) == (8, 0.0, 16)
    assert leaves(other.as_dict()) == leaves(tree.as_dict()) | {"lora.r": 8, "lora.lora_dropout": 0.0}


@pytest.mark.parametrize("values", [{"rank": 8}, {"r": 0}, {"r": "8"}])
def test_a_change_to_what_no_config_could_say_is_an_error(values: dict[str, Any], local_model: str) -> None:
    with pytest.raises(ValidationError):
        load(str(BASE_FILE), local_model).changed("lora", **values)


def test_what_may_change_on_resume_decides_no_token_and_no_weight() -> None:
    """Whoever marks another key must say it here too: the default is strict."""
    assert set(marked(Mark.MAY_CHANGE)) == {
        *(f"training.{key}" for key in ("logging_steps", "per_device_eval_batch_size", "checkpointed_layers")),
        *(f"training.{key}" for key in ("save_total_limit", "save_minutes")),
        *(f"training.{key}" for key in ("time_budget_hours", "time_budget_partial")),
        *(
            f"dataset.{key}"
            for key in ("sample_prompts", "train_file", "validation_file", "certificate", "max_bad_share")
        ),
        *(f"tracking.{key}" for key in ("report_to", "project", "run_name", "cost_per_hour")),
        *("output.dir", "output.copy_to", "output.copy_checkpoints", "lora.init_from"),
    }


def test_a_key_is_compared_by_a_receipt_or_differs_by_design_or_is_left_out() -> None:
    assert set(marked(Mark.BY_DESIGN)) & set(marked(Mark.NOT_COMPARED)) == set()


@pytest.mark.parametrize(
    ("setting", "files", "named"),
    [
        ("a.jsonl", [("a.jsonl", 1)], "a.jsonl"),
        ("[a.jsonl]", [("a.jsonl", 1)], "a.jsonl"),
        (
            "[a.jsonl, {path: b.jsonl, weight: 2}, {path: c.jsonl}, {path: d.jsonl, weight: 0.5}]",
            [("a.jsonl", 1), ("b.jsonl", 2), ("c.jsonl", 1), ("d.jsonl", 0.5)],
            "a.jsonl, b.jsonl (weight 2), c.jsonl, d.jsonl (weight 0.5)",
        ),
    ],
    ids=["a path", "one", "several"],
)
def test_training_files_are_one_or_several_each_with_a_weight(
    setting: str, files: list[tuple[str, float]], named: str, local_model: str, tmp_path: Path
) -> None:
    config = load(str(BASE_FILE), local_model, f"dataset.train_file={setting}")
    assert [(file.path, file.weight) for file in config.dataset.train_files] == files
    assert config.dataset.train_files_named == named
    resolved = tmp_path / "config.yaml"
    resolved.write_text(dump(config.as_dict()))
    assert load(str(resolved)) == config


def test_a_section_has_no_marks_of_its_own() -> None:
    assert [path for mark in Mark for path in marked(mark) if any(key.startswith(f"{path}.") for key in keys())] == []
