"""The shipped YAML files are artifacts: each loads, says what it should, and can be read without another."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.config import yaml_file
from finetune.config.load import BASE_FILE, load_config
from finetune.config.schema import Config, Mark, keys, marked
from finetune.files import ROOT
from finetune.plan.memory import peak_gib
from finetune.plan.model_shape import MISTRAL_7B

FILES = sorted((ROOT / "configs").glob("*.yaml"))
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
both_platforms = pytest.mark.parametrize("name", ["h100", "m4"])

# The platform's own keys: (h100, m4). Nothing else may differ.
OWN = {
    "platform": ("h100", "m4"),
    "model.attn_implementation": ("flash_attention_2", "sdpa"),
    "model.max_seq_length": (4096, 2048),
    "quantization.storage": ("packed", "expanded"),
    "training.per_device_train_batch_size": (4, 1),
    "training.per_device_eval_batch_size": (4, 1),
    "training.gradient_accumulation_steps": (4, 16),
    "training.optim": ("paged_adamw_32bit", "adamw_torch"),
    "training.checkpointed_layers": ("auto", "all"),
    "training.fused_lora": ("auto", False),
    "training.fused_kernels": ("auto", False),
    "training.logging_steps": (10, 1),
    "training.eval_steps": (100, 5),
    "training.save_steps": (500, 5),
    "tracking.run_name": ("mistral-7b-qlora-h100", "mistral-7b-qlora-m4"),
}

# The same on both.
SHARED = {
    "model.name": "mistralai/Mistral-7B-Instruct-v0.2",
    "model.revision": "63a8b081895390a26e140280378bc85ec8bce07a",
    "model.dtype": "bfloat16",
    "quantization.load_in_4bit": True,
    "quantization.bnb_4bit_quant_type": "nf4",
    "quantization.bnb_4bit_use_double_quant": True,
    "quantization.bnb_4bit_compute_dtype": "bfloat16",
    "lora.r": 16,
    "lora.lora_alpha": 32,
    "lora.lora_dropout": 0.05,
    "lora.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "lora.bias": "none",
    "lora.task_type": "CAUSAL_LM",
    "lora.init_from": None,
    "training.num_train_epochs": 3,
    "training.max_steps": -1,
    "training.learning_rate": 0.0002,
    "training.lr_scheduler_type": "cosine",
    "training.warmup_ratio": 0.03,
    "training.weight_decay": 0.01,
    "training.max_grad_norm": 0.3,
    "training.bf16": True,
    "training.fp16": False,
    "training.gradient_checkpointing": True,
    "training.packing": True,
    "training.save_total_limit": 3,
    "training.metric_for_best_model": "eval_loss",
    "training.load_best_model_at_end": True,
    "training.early_stopping_patience": 5,
    "training.save_minutes": 30,
    "training.time_budget_hours": None,
    "training.time_budget_partial": False,
    "training.seed": 42,
    "dataset.train_file": "data/processed/train.jsonl",
    "dataset.validation_file": "data/processed/val.jsonl",
    "dataset.validation_split": 0.1,
    "dataset.max_rows": None,
    "dataset.max_validation_rows": None,
    "dataset.train_on": "all",
    "dataset.truncation": True,
    "dataset.padding_side": "right",
    "dataset.on_bad_row": "fail",
    "dataset.max_bad_share": 0.1,
    "dataset.on_duplicate": "keep",
    "dataset.certificate": True,
    "dataset.sample_prompts": None,
    "system_prompt": None,
    "tracking.report_to": "wandb",
    "tracking.project": "mistral-7b-qlora",
    "tracking.cost_per_hour": None,
    "output.dir": "adapters",
    "output.copy_to": None,
    "output.copy_checkpoints": False,
}


def platform_file(name: str) -> Path:
    return ROOT / "configs" / f"training_config_{name}.yaml"


def load(path: Path, local_model: Path, settings: tuple[str, ...] = ()) -> Config:
    """The resolved config; where the file's base model is the demo, which may not be made yet, a folder stands in."""
    demo = yaml_file.load_yaml(path)["model"]["name"] == "models/demo-135m"
    stand_in = [f"model.name={local_model}"] if demo else []
    return load_config(str(path), [*stand_in, *settings])[0]


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted path -> value, in the file's order."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def key_lines(node: yaml.MappingNode, lines: list[str]) -> Iterator[tuple[str, str]]:
    """Each key that holds a value, with what follows the value on its line; a block list begins below its key."""
    for key, value in node.value:
        if isinstance(value, yaml.MappingNode):
            yield from key_lines(value, lines)
            continue
        end = value.end_mark if value.start_mark.line == key.start_mark.line else key.end_mark
        yield key.value, lines[end.line][end.column :]


def quoted_settings(text: str) -> list[list[str]]:
    """The `--set` arguments that comments tell a person to type: those of one command together."""
    commands: list[list[str]] = []
    goes_on = False
    for line in text.splitlines():
        found = re.findall(r"--set ([\w.]+\.\w+=[\w./-]+)", line)
        if found:
            commands = [*commands[:-1], commands[-1] + found] if goes_on else [*commands, found]
        goes_on = bool(found)
    return commands


def test_five_config_files_are_shipped() -> None:
    assert len(FILES) == 5


@every_file
def test_a_shipped_config_loads(path: Path, tmp_path: Path) -> None:
    load(path, tmp_path)


def test_the_base_loads_alone_and_holds_every_key_of_the_schema(tmp_path: Path) -> None:
    base = leaves(yaml_file.load_yaml(BASE_FILE))
    sections = {"model", "quantization", "lora", "training", "dataset", "tracking", "output"}
    assert list(base) == [path for path in keys() if path not in sections]
    assert load(BASE_FILE, tmp_path).platform == "cpu"


def test_the_macs_demo_is_the_macs_run_but_for_a_small_base_its_length_data_and_pace(tmp_path: Path) -> None:
    demo, mac = (leaves(load(platform_file(name), tmp_path).as_dict()) for name in ("m4_demo", "m4"))
    assert [key for key in mac if demo[key] != mac[key]] == [
        "model.name", "model.revision", "model.max_seq_length", "training.num_train_epochs",
        "training.gradient_accumulation_steps", "training.learning_rate", "dataset.train_file",
        "dataset.validation_file", "tracking.report_to", "tracking.run_name",
    ]  # fmt: skip


@both_platforms
def test_a_platform_file_restates_every_key_of_the_base_in_its_order(name: str) -> None:
    base, platform = (leaves(yaml_file.load_yaml(path)) for path in (BASE_FILE, platform_file(name)))
    assert list(platform) == list(base)


@both_platforms
def test_a_platform_file_holds_exactly_these_values(name: str, tmp_path: Path) -> None:
    own = {key: values[("h100", "m4").index(name)] for key, values in OWN.items()}
    assert leaves(load(platform_file(name), tmp_path).as_dict()) == SHARED | own
    assert leaves(yaml_file.load_yaml(platform_file(name))) == SHARED | own


def test_the_two_platforms_differ_in_their_own_keys_only(tmp_path: Path) -> None:
    h100, m4 = (leaves(load(platform_file(name), tmp_path).as_dict()) for name in ("h100", "m4"))
    assert {key: (h100[key], m4[key]) for key in h100 if h100[key] != m4[key]} == OWN
    assert OWN.keys() == {*marked(Mark.PER_PLATFORM)}


def test_both_platforms_take_sixteen_sequences_an_optimizer_step(tmp_path: Path) -> None:
    assert [load(platform_file(name), tmp_path).effective_batch_size for name in ("h100", "m4")] == [16, 16]


@every_file
def test_every_key_of_a_shipped_config_has_a_comment_on_its_line(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    node = yaml.compose(text, yaml.SafeLoader)
    assert isinstance(node, yaml.MappingNode)
    bare = [key for key, rest in key_lines(node, text.splitlines()) if not re.match(r":?\s+# *\S", rest)]
    assert bare == []


@every_file
def test_a_key_has_the_same_comment_in_every_file(path: Path) -> None:
    base = yaml_file.comments(BASE_FILE)
    assert {key: (text, base[key]) for key, text in yaml_file.comments(path).items() if text != base[key]} == {}


@every_file
def test_a_shipped_config_has_no_line_over_120_characters(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [number for number, line in enumerate(lines, 1) if len(line) > 120] == []


@both_platforms
def test_what_the_notes_tell_a_person_to_type_is_accepted_and_fits_the_machine(name: str, tmp_path: Path) -> None:
    commands = quoted_settings(platform_file(name).read_text(encoding="utf-8"))
    assert len(commands) >= 7
    for command in commands:
        config = load(platform_file(name), tmp_path, tuple(command))
        assert peak_gib(config, MISTRAL_7B) < {"h100": 80, "m4": 32}[name]


@both_platforms
def test_every_batch_size_in_the_notes_keeps_sixteen_sequences_a_step(name: str, tmp_path: Path) -> None:
    commands = quoted_settings(platform_file(name).read_text(encoding="utf-8"))
    batches = [command for command in commands if any("train_batch_size" in setting for setting in command)]
    assert batches
    for command in batches:
        assert load(platform_file(name), tmp_path, tuple(command)).effective_batch_size == 16
