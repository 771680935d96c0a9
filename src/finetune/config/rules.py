"""Rules for values that do not work on a platform or do not work together."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from finetune import wording
from finetune.cli import command
from finetune.config.base_model import MISTRAL, is_local
from finetune.config.problems import Problems
from finetune.config.schema import HUB, Config
from finetune.files import ROOT, resolve
from finetune.machine.platforms import PLATFORMS


def _base_model(config: Config, problems: Problems) -> None:
    name = config.model.name
    if name == MISTRAL or is_local(name):
        return
    if resolve(name) == ROOT / "models" / "demo-135m":
        problems.add("model.name", f"{name} does not exist; run: {command('scripts/make_demo_model.py')}")
    else:
        problems.add("model.name", f"found {wording.show(name)}, expected {MISTRAL} or a local folder that holds it")


def _platform_values(config: Config, problems: Problems) -> None:
    row = PLATFORMS[config.platform]
    chosen = {
        "training.optim": (config.training.optim, row.optimizers),
        "model.attn_implementation": (config.model.attn_implementation, row.attentions),
    }
    for path, (value, works) in chosen.items():
        if value not in works:
            problems.add(path, f"{value} does not work on {row.label} ({row.name}); expected {' | '.join(works)}")


def _backward(config: Config, problems: Problems) -> None:
    row = PLATFORMS[config.platform]
    rows, length = config.training.per_device_train_batch_size, config.model.max_seq_length
    if row.backward_tokens is not None and rows * length > row.backward_tokens:
        text = f"{rows} x model.max_seq_length {length} is {rows * length:,} tokens in one backward pass; above "
        text += f"{row.backward_tokens:,}, gradients are wrong on {row.label} ({row.name}), pytorch#177116"
        problems.add("training.per_device_train_batch_size", f"{text}; set it to {row.backward_tokens // length}")


def _precision(config: Config, problems: Problems) -> None:
    if config.training.fp16:
        problems.add("training.fp16", "Mistral's activations overflow fp16; set training.bf16: true and fp16: false")
    if config.training.bf16 and config.model.dtype != "bfloat16":
        found = f"true, but model.dtype is {config.model.dtype}"
        problems.add("training.bf16", f"{found}; set model.dtype: bfloat16 or bf16: false")
    if config.model.attn_implementation == "torch_varlen" and config.model.dtype != "bfloat16":
        found = f"torch_varlen does not support model.dtype {config.model.dtype}"
        problems.add("model.attn_implementation", f"{found}; set model.dtype: bfloat16, or this to sdpa")
    if config.quantization.bnb_4bit_compute_dtype != config.model.dtype:
        found = f"{config.quantization.bnb_4bit_compute_dtype}, but model.dtype is {config.model.dtype}"
        problems.add("quantization.bnb_4bit_compute_dtype", f"{found}; set both to the same")


def _quantization(config: Config, problems: Problems) -> None:
    if not config.quantization.load_in_4bit:
        problems.add("quantization.load_in_4bit", "false, but QLoRA trains on a 4-bit base; set it to true")


def _lora_targets(config: Config, problems: Problems) -> None:
    known = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    wrong = [name for name in config.lora.target_modules if name not in known]
    if wrong or not config.lora.target_modules:
        found = ", ".join(wrong) or "an empty list"
        problems.add("lora.target_modules", f"found {found}, expected some of {', '.join(known)}")


def _schedule(config: Config, problems: Problems) -> None:
    training = config.training
    if training.save_steps % training.eval_steps:
        text = f"{training.save_steps} is not a multiple of training.eval_steps {training.eval_steps}"
        text += ", so saved steps would have no eval_loss to rank by"
        nearest = max(1, round(training.save_steps / training.eval_steps)) * training.eval_steps
        problems.add("training.save_steps", f"{text}; set it to {nearest}")
    if training.lr_scheduler_type == "constant" and training.warmup_ratio > 0:
        text = f"{training.warmup_ratio:g}, but lr_scheduler_type constant has no warmup"
        problems.add("training.warmup_ratio", f"{text}; set it to 0, or lr_scheduler_type: constant_with_warmup")
    if training.max_steps == 0:
        problems.add("training.max_steps", "0 trains nothing; set a number of steps, or -1 for num_train_epochs")


def _time_budget(config: Config, problems: Problems) -> None:
    if config.training.time_budget_partial and config.training.time_budget_hours is None:
        text = "true has no effect without training.time_budget_hours; set those hours, or this to false"
        problems.add("training.time_budget_partial", text)


def _checkpointed_layers(config: Config, problems: Problems) -> None:
    found = config.training.checkpointed_layers
    if isinstance(found, int) and not config.training.gradient_checkpointing:
        text = f"{found} has no effect with gradient_checkpointing: false; set that to true, or this to all"
        problems.add("training.checkpointed_layers", text)


def cannot_fuse(config: Config) -> dict[str, str]:
    """The fused paths that do not work with the rest of `config`, by key, each with the reason."""
    row, found = PLATFORMS[config.platform], {}
    if not row.compiles:
        found["fused_kernels"] = f"does not work on {row.label} ({row.name})"
    if config.model.dtype == "bfloat16" and not config.training.bf16:
        where = "with model.dtype bfloat16 and no autocast (training.bf16: false)"
        found["fused_lora"] = f"does not work {where}: adapters would lose their precision"
    return found


def _fused(config: Config, problems: Problems) -> None:
    for key, why in cannot_fuse(config).items():
        if getattr(config.training, key) is True:
            problems.add(f"training.{key}", f"true {why}; set it to false")


def _train_files(config: Config, problems: Problems) -> None:
    paths = [os.path.normpath(resolve(file.path)) for file in config.dataset.train_files]
    twice = [file.path for file, path in zip(config.dataset.train_files, paths, strict=True) if paths.count(path) > 1]
    if twice:
        text = f"{twice[0]} is listed twice; list it once, or to repeat its rows type {{path: {twice[0]}, weight: 2}}"
        problems.add("dataset.train_file", text)


def _system_prompt(config: Config, problems: Problems) -> None:
    if config.system_prompt is not None and not config.system_prompt.strip():
        problems.add("system_prompt", "empty; set it to null for none")


def _run_name(config: Config, problems: Problems) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", config.run_name):
        expected = "letters, digits, '.', '_' and '-', beginning with a letter or digit"
        problems.add("tracking.run_name", f"found {wording.show(config.run_name)}, expected {expected}")


def _copy_to(config: Config, problems: Problems) -> None:
    output = config.output
    if output.copy_to is None:
        if output.copy_checkpoints:
            text = "true has no effect without output.copy_to; set that, or this to false"
            problems.add("output.copy_checkpoints", text)
    elif output.copy_to.startswith(HUB):
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", output.copy_to.removeprefix(HUB)):
            found = wording.show(output.copy_to)
            problems.add("output.copy_to", f"found {found}, expected hf://OWNER/NAME or a folder")
    elif resolve(output.copy_to).resolve() == resolve(output.dir).resolve():
        problems.add("output.copy_to", "is output.dir itself; name a folder on another disk")


RULES: tuple[Callable[[Config, Problems], None], ...] = (
    _base_model,
    _platform_values,
    _backward,
    _precision,
    _quantization,
    _lora_targets,
    _schedule,
    _time_budget,
    _checkpointed_layers,
    _fused,
    _train_files,
    _system_prompt,
    _run_name,
    _copy_to,
)
