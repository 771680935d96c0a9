"""Measured speed: which entry of benchmarks/results a run is told from, and what a bad file says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import ConfigError
from finetune.plan.model_shape import MISTRAL_7B
from finetune.plan.throughput import RESULTS, Throughput, find
from support.plans import load
from support.throughput import ENTRY


def write(folder: Path, name: str, date: str, *entries: dict[str, Any]) -> Path:
    machine = {"cpu_cores": 2, "cpu": "Some Processor"}
    document = {"date": date, "machine": machine, "throughput": [ENTRY | entry for entry in entries]}
    path = folder / name
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def test_every_shipped_result_can_be_read() -> None:
    assert len([*RESULTS.glob("*.json")]) >= 2
    find(load(), MISTRAL_7B)


def test_an_entry_under_the_same_conditions_is_told_with_its_file_and_machine(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", "2026-11-23", {})
    assert find(load(), MISTRAL_7B, tmp_path) == Throughput(3000.0, 9000.0, str(path), "2 cores of Some Processor")


@pytest.mark.parametrize(
    "setting",
    [
        "model.max_seq_length=2048", "training.packing=false", "quantization.storage=expanded",
        "model.attn_implementation=sdpa", "training.gradient_checkpointing=false", "training.checkpointed_layers=24",
        "training.fused_lora=true", "training.fused_kernels=true",
    ],
)  # fmt: skip
def test_an_entry_under_other_conditions_is_not_used(setting: str, tmp_path: Path) -> None:
    write(tmp_path, "a.json", "2026-11-23", {})
    assert find(load(setting), MISTRAL_7B, tmp_path) is None


@pytest.mark.parametrize("other", [{"platform": "m4"}, {"hidden_size": 576}, {"num_hidden_layers": 30}])
def test_an_entry_of_another_platform_or_model_is_not_used(other: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, "a.json", "2026-11-23", other)
    assert find(load(), MISTRAL_7B, tmp_path) is None


def test_all_layers_and_their_number_are_the_same_condition(tmp_path: Path) -> None:
    write(tmp_path, "a.json", "2026-11-23", {})
    assert find(load("training.checkpointed_layers=32"), MISTRAL_7B, tmp_path) is not None


def test_what_is_auto_takes_the_speed_of_what_was_chosen_there(tmp_path: Path) -> None:
    write(tmp_path, "a.json", "2026-11-23", {"fused_lora": True, "fused_kernels": True, "checkpointed_layers": 2})
    auto = [f"training.{key}=auto" for key in ("checkpointed_layers", "fused_lora", "fused_kernels")]
    assert find(load(*auto), MISTRAL_7B, tmp_path) is not None
    assert (
        find(load(*auto[:2], "training.fused_kernels=false"), MISTRAL_7B, tmp_path) is None
    )  # fused_kernels false, and measured with them


def test_what_does_not_decide_speed_may_differ(tmp_path: Path) -> None:
    write(tmp_path, "a.json", "2026-11-23", {})
    assert find(load("training.learning_rate=1e-5", "training.num_train_epochs=1"), MISTRAL_7B, tmp_path) is not None


def test_the_newest_file_counts_by_its_date_and_not_by_its_name(tmp_path: Path) -> None:
    write(tmp_path, "z.json", "2026-01-01", {"tokens_per_second": 1})
    write(tmp_path, "a.json", "2026-11-23", {"tokens_per_second": 2}, {"tokens_per_second": 3})
    write(tmp_path, "b.json", "2026-12-01", {"platform": "m4", "tokens_per_second": 4})
    found = find(load(), MISTRAL_7B, tmp_path)
    assert found is not None
    assert found.tokens_per_second == 3  # the last of its file


def test_a_gpu_is_the_machines_name_where_one_is_recorded(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", "2026-11-23", {"eval_tokens_per_second": None})
    document = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(document | {"machine": {"gpu": "NVIDIA H100 80GB HBM3"}}), encoding="utf-8")
    found = find(load(), MISTRAL_7B, tmp_path)
    assert found == Throughput(3000.0, None, str(path), "NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize("document", [{"medians": {}}, {"throughput": []}])
def test_a_file_without_throughput_is_left_alone(document: Any, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(document), encoding="utf-8")
    assert find(load(), MISTRAL_7B, tmp_path) is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[1]", "AttributeError: 'list' object has no attribute 'get'"),
        (json.dumps({"throughput": [3]}), "AttributeError: 'int' object has no attribute 'items'"),
        (json.dumps({"throughput": [ENTRY | {"tokens_per_second": "fast"}]}),
            "ValueError: could not convert string to float: 'fast'"),
        (json.dumps({"throughput": [ENTRY]}), "KeyError: 'machine'"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_an_error_that_names_it(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        find(load(), MISTRAL_7B, tmp_path)
    assert str(error.value) == f"config: 1 problem\n  {path}: {problem}; restore or remove the file"
