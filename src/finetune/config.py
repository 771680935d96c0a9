"""The config: one frozen, typed tree from the base file, the platform's file and `--set`; all problems at once.

What a config means for one platform is checked by RULES; the types and bounds of its keys are schema.py's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from finetune import typed, wording, yaml_source
from finetune.cli import command
from finetune.errors import ConfigError
from finetune.files import ROOT, resolve, shown
from finetune.machine.inspect import read_machine
from finetune.machine.platforms import PLATFORMS, choose
from finetune.schema import (
    DatasetConfig,
    LoraConfig,
    ModelConfig,
    OutputConfig,
    QuantizationConfig,
    TrackingConfig,
    TrainingConfig,
)

BASE_FILE = ROOT / "configs" / "training_config.yaml"
MISTRAL = "mistralai/Mistral-7B-Instruct-v0.2"
DEFAULT_VALIDATION_FILE = "data/processed/val.jsonl"

# What no run can do without; the base brings them all, unless somebody broke it.
REQUIRED = (
    "model.name",
    "model.max_seq_length",
    *(f"lora.{key}" for key in ("r", "lora_alpha", "lora_dropout", "target_modules", "bias", "task_type")),
    "training.per_device_train_batch_size",
    "training.per_device_eval_batch_size",
    "training.gradient_accumulation_steps",
)


@dataclass(frozen=True)
class Config:
    """The whole tree; what a run is."""

    platform: Literal["h100", "m4", "cpu"]
    model: ModelConfig
    quantization: QuantizationConfig
    lora: LoraConfig
    training: TrainingConfig
    dataset: DatasetConfig
    system_prompt: str | None
    tracking: TrackingConfig
    output: OutputConfig

    def as_dict(self) -> dict[str, Any]:
        """The tree as plain mappings and lists, as YAML and JSON hold it."""
        tree: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return tree

    def sha256(self) -> str:
        """Hash of the resolved values."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()

    @property
    def effective_batch_size(self) -> int:
        """Sequences per optimizer step."""
        return self.training.per_device_train_batch_size * self.training.gradient_accumulation_steps

    @property
    def run_name(self) -> str:
        """`tracking.run_name`, which `load` fills in where a file leaves it null."""
        assert self.tracking.run_name is not None
        return self.tracking.run_name

    @property
    def run_folder(self) -> Path:
        """`output.dir`/`run_name`, absolute."""
        return resolve(self.output.dir) / self.run_name


def config_file(choice: str | None) -> tuple[Path, str]:
    """The file that `--config` names (a path, or a platform's name) and why; without one, the detected platform's."""
    if choice is None:
        platform, reason = choose(read_machine())
        return shown(ROOT / "configs" / f"training_config_{platform.name}.yaml"), reason
    if choice in PLATFORMS:
        return shown(ROOT / "configs" / f"training_config_{choice}.yaml"), f"--config {choice}"
    path = Path(choice)
    try:
        found = path.is_file()
    except OSError as error:
        raise ConfigError(f"--config {choice}: {error.strerror}") from None
    if not found:
        names = ", ".join(PLATFORMS)
        raise ConfigError(f"--config {choice}: no such file; type a path or one of: {names}")
    return path, f"--config {choice}"


def load(choice: str | None, settings: Iterable[str] = ()) -> tuple[Config, str]:
    """The resolved config and one sentence on which file it comes from and why.

    Raises ConfigError with every problem: unknown, missing and duplicate keys, wrong types and values, and combinations
    that the platform cannot honour.
    """
    path, reason = config_file(choice)
    merged, places = yaml_source.read(BASE_FILE)
    unread: list[str] = []
    sources = [partial(yaml_source.read, path), *(partial(yaml_source.override, [setting]) for setting in settings)]
    for source in sources:
        try:
            values, value_places = source()
        except ConfigError as error:
            unread += error.problems
            continue
        merged = yaml_source.deep_merge(merged, values)
        places |= value_places
    sections = {name for name, value in merged.items() if isinstance(value, dict)}
    yaml_source.validate_required_fields(merged, (path for path in REQUIRED if path.split(".")[0] in sections))
    problems = typed.Problems(places, unread)
    everywhere = typed.paths(Config)
    config = typed.build(Config, merged, "", problems, everywhere)
    if not problems.found:
        config = _with_run_name(config, path)
        for rule in RULES:
            rule(config, problems)
    if problems.found:
        raise ConfigError(*sorted(set(problems.found), key=_by_line))
    return config, f"{os.path.relpath(path)} ({reason})"


def _by_line(problem: str) -> list[str | int]:
    # Digits as numbers, so that line 9 comes before line 10.
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"([0-9]{1,18})", problem))]


def _with_run_name(config: Config, path: Path) -> Config:
    """Stable from the config file's name, so that the same command means the same run."""
    if config.tracking.run_name is not None:
        return config
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem)
    return dataclasses.replace(config, tracking=dataclasses.replace(config.tracking, run_name=name))


def is_local(name: str) -> bool:
    """Whether `model.name` is a folder here rather than a Hub id."""
    try:
        return resolve(name).is_dir()
    except OSError:  # too long, or not ours to look at
        return False


def _base_model(config: Config, problems: typed.Problems) -> None:
    name = config.model.name
    if name == MISTRAL or is_local(name):
        return
    if resolve(name) == ROOT / "models" / "demo-135m":
        problems.add("model.name", f"{name} is not there; type: {command('scripts/make_demo_model.py')}")
    else:
        problems.add("model.name", f"found {wording.show(name)}, wanted {MISTRAL} or a local folder that holds it")


def _platform_values(config: Config, problems: typed.Problems) -> None:
    row = PLATFORMS[config.platform]
    chosen = {
        "training.optim": (config.training.optim, row.optimizers),
        "model.attn_implementation": (config.model.attn_implementation, row.attentions),
    }
    for path, (value, works) in chosen.items():
        if value not in works:
            problems.add(path, f"{value} does not work on {row.label} ({row.name}); wanted {' | '.join(works)}")


def _precision(config: Config, problems: typed.Problems) -> None:
    if config.training.fp16:
        problems.add("training.fp16", "Mistral's activations overflow fp16; set training.bf16: true and fp16: false")
    if config.training.bf16 and config.model.dtype != "bfloat16":
        problems.add(
            "training.bf16", f"true beside model.dtype {config.model.dtype}; set model.dtype: bfloat16 or bf16: false"
        )
    if config.quantization.bnb_4bit_compute_dtype != config.model.dtype:
        found = f"{config.quantization.bnb_4bit_compute_dtype} beside model.dtype {config.model.dtype}"
        problems.add("quantization.bnb_4bit_compute_dtype", f"{found}; set both to the same")


def _quantization(config: Config, problems: typed.Problems) -> None:
    if not config.quantization.load_in_4bit:
        problems.add("quantization.load_in_4bit", "false, but QLoRA trains on a 4-bit base; set it to true")


def _lora_targets(config: Config, problems: typed.Problems) -> None:
    known = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    wrong = [name for name in config.lora.target_modules if name not in known]
    if wrong or not config.lora.target_modules:
        problems.add(
            "lora.target_modules", f"found {', '.join(wrong) or 'an empty list'}, wanted some of {', '.join(known)}"
        )


def _schedule(config: Config, problems: typed.Problems) -> None:
    training = config.training
    if training.save_steps % training.eval_steps:
        text = f"{training.save_steps} is not a multiple of training.eval_steps {training.eval_steps}"
        nearest = max(1, round(training.save_steps / training.eval_steps)) * training.eval_steps
        problems.add(
            "training.save_steps", f"{text}, so saved steps would have no eval_loss to rank by; set it to {nearest}"
        )
    if training.lr_scheduler_type == "constant" and training.warmup_ratio > 0:
        text = f"{training.warmup_ratio:g} beside lr_scheduler_type constant, which has no warm-up"
        problems.add("training.warmup_ratio", f"{text}; set it to 0, or lr_scheduler_type: constant_with_warmup")
    if training.max_steps == 0:
        problems.add("training.max_steps", "0 trains nothing; set a number of steps, or -1 for num_train_epochs")


def _time_budget(config: Config, problems: typed.Problems) -> None:
    if config.training.time_budget_partial and config.training.time_budget_hours is None:
        text = "true has no effect without training.time_budget_hours; set those hours, or this to false"
        problems.add("training.time_budget_partial", text)


def _checkpointed_layers(config: Config, problems: typed.Problems) -> None:
    found = config.training.checkpointed_layers
    if found != "all" and not config.training.gradient_checkpointing:
        text = f"{found} has no effect beside gradient_checkpointing false; set that to true, or this to all"
        problems.add("training.checkpointed_layers", text)


def _levers(config: Config, problems: typed.Problems) -> None:
    row = PLATFORMS[config.platform]
    if config.training.fused_kernels and not row.compiles:
        problems.add("training.fused_kernels", f"true does not work on {row.label} ({row.name}); set it to false")
    if config.training.fused_lora and config.model.dtype == "bfloat16" and not config.training.bf16:
        text = "true beside model.dtype bfloat16 without autocast, so adapters would lose their precision"
        problems.add("training.fused_lora", f"{text}; set training.bf16: true, or this to false")


def _system_prompt(config: Config, problems: typed.Problems) -> None:
    if config.system_prompt is not None and not config.system_prompt.strip():
        problems.add("system_prompt", "empty; set it to null for none")


def _run_name(config: Config, problems: typed.Problems) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", config.run_name):
        wanted = "letters, digits, '.', '_' and '-', beginning with a letter or digit"
        problems.add("tracking.run_name", f"found {wording.show(config.run_name)}, wanted {wanted}")


RULES: tuple[Callable[[Config, typed.Problems], None], ...] = (
    _base_model,
    _platform_values,
    _precision,
    _quantization,
    _lora_targets,
    _schedule,
    _time_budget,
    _checkpointed_layers,
    _levers,
    _system_prompt,
    _run_name,
)
