"""What a run will cost, by arithmetic alone: steps, evaluations, memory, disk. No GPU, weights or network."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Protocol

from finetune.config import Config
from finetune.geometry import Geometry
from finetune.platforms import GIB, PLATFORMS, Machine, memory_available_gib

BYTES = {"bfloat16": 2, "float32": 4}

# Saved activations of one decoder layer that is not checkpointed, per token, in elements for each input and output
# feature of its seven linear layers: 257 KiB a token for Mistral-7B in bf16 with PEFT's LoRA and dropout, by counting
# the tensors that autograd keeps. Not measured on a GPU yet.
LIVE_ELEMENTS_PER_FEATURE = 257 * 1024 / 2 / 81_920

# TRL scores the vocabulary in tiles; 12 bytes a logit are its bf16 value, its fp32 copy and its gradient.
LOSS_BYTES_PER_LOGIT = 12
LOSS_TILE_TOKENS = 1024


class RowCounts(Protocol):
    """What the plan reads of `encoding.Statistics`."""

    rows: int
    tokens: int
    supervised_tokens: int
    truncated: int
    dropped_long: int
    dropped_bad: int
    certified: int


@dataclass(frozen=True)
class Plan:
    """The numbers of `--dry-run --json`. Memory and disk in GiB; `memory_parts` adds up to `peak_memory_gib`.

    `hours` is None where nothing has been measured on this platform. `problems` are things to change before a long run,
    each with what to type.
    """

    rows_train: int
    rows_validation: int
    tokens_train: int
    supervised_tokens_train: int
    rows_truncated: int
    rows_dropped: int
    sequences_train: int
    packing_efficiency: float
    effective_batch_size: int
    steps_per_epoch: int
    steps: int
    warmup_steps: int
    evaluations: int
    checkpoints: int
    peak_memory_gib: float
    memory_parts: dict[str, float]
    memory_available_gib: float | None
    disk_gib: float
    hours: float | None
    certificate: dict[str, int]
    problems: list[str]

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return dataclasses.asdict(self)


def make_plan(
    config: Config, train: RowCounts, validation: RowCounts, sequences: int, geometry: Geometry, machine: Machine
) -> Plan:
    """The plan of a run over `sequences` training sequences (packed ones where packing is on)."""
    training = config.training
    steps_per_epoch, steps = count_steps(config, sequences)
    parts = memory_parts(config, geometry)
    tokens = config.model.max_seq_length * sequences if training.packing else train.tokens
    plan = Plan(
        rows_train=train.rows,
        rows_validation=validation.rows,
        tokens_train=train.tokens,
        supervised_tokens_train=train.supervised_tokens,
        rows_truncated=train.truncated + validation.truncated,
        rows_dropped=sum(split.dropped_long + split.dropped_bad for split in (train, validation)),
        sequences_train=sequences,
        packing_efficiency=round(train.tokens / tokens, 4),
        effective_batch_size=config.effective_batch_size,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        warmup_steps=math.ceil(steps * training.warmup_ratio),
        evaluations=1 + math.ceil(steps / training.eval_steps),  # before the first step, and always after the last
        checkpoints=math.ceil(steps / training.save_steps),
        peak_memory_gib=round(sum(parts.values()), 2),
        memory_parts={name: round(gib, 3) for name, gib in parts.items()},
        memory_available_gib=_rounded(memory_available_gib(PLATFORMS[config.platform], machine)),
        disk_gib=round(disk_bytes(config, geometry, train.tokens + validation.tokens) / GIB, 2),
        hours=None,
        certificate={"rows": train.certified + validation.certified, "mismatches": 0},
        problems=[],
    )
    return dataclasses.replace(plan, problems=_problems(plan, config))


def _rounded(gib: float | None) -> float | None:
    return None if gib is None else round(gib, 2)


def count_steps(config: Config, sequences: int) -> tuple[int, int]:
    """(optimizer steps an epoch, in all) as transformers' Trainer counts them: a last, smaller batch is a step too."""
    micro_batches = math.ceil(sequences / config.training.per_device_train_batch_size)
    steps_per_epoch = math.ceil(micro_batches / config.training.gradient_accumulation_steps)
    if config.training.max_steps > 0:
        return steps_per_epoch, config.training.max_steps
    return steps_per_epoch, math.ceil(config.training.num_train_epochs * steps_per_epoch)


def lora_parameters(config: Config, geometry: Geometry) -> int:
    """r x (in + out) for each target layer (Hu et al. 2021, section 4.1)."""
    shapes = geometry.linear_shapes()
    features = sum(sum(shapes[name]) for name in config.lora.target_modules)
    return config.lora.r * features * geometry.num_hidden_layers


def memory_parts(config: Config, geometry: Geometry) -> dict[str, float]:
    """Expected peak memory by part, GiB.

    NF4 takes half a byte a weight and one scale per 64 weights: 4 bytes, or with double quantisation 1 byte and 4 more
    per 256 scales (Dettmers et al. 2023, section 3). LoRA weights, gradients and AdamW's two moments are fp32. With
    checkpointing, each layer keeps its input and one layer at a time keeps everything.
    """
    width = BYTES[config.model.dtype]
    shapes = geometry.linear_shapes().values()
    layers, hidden, vocab = geometry.num_hidden_layers, geometry.hidden_size, geometry.vocab_size
    linear = sum(inputs * outputs for inputs, outputs in shapes) * layers
    scale_bytes = 1 / 64 + 4 / (64 * 256) if config.quantization.bnb_4bit_use_double_quant else 4 / 64
    per_weight = 0.5 + scale_bytes if config.quantization.storage == "packed" else width
    embeddings = vocab * hidden * width * (1 if geometry.tie_word_embeddings else 2)
    moments = 2 if config.training.optim == "paged_adamw_8bit" else 8
    tokens = config.training.per_device_train_batch_size * config.model.max_seq_length
    live_layer = LIVE_ELEMENTS_PER_FEATURE * width * sum(map(sum, shapes)) * tokens
    inputs = layers * hidden * width * tokens
    checkpointed = config.training.gradient_checkpointing
    loss = LOSS_BYTES_PER_LOGIT * min(tokens, LOSS_TILE_TOKENS) * vocab
    parts = {
        "weights": linear * per_weight + embeddings,
        "lora_and_optimizer": lora_parameters(config, geometry) * (4 + 4 + moments),
        "activations": inputs + live_layer if checkpointed else live_layer * layers,
        "loss": loss,
        "workspace": hidden * geometry.intermediate_size * width,
    }
    if config.model.attn_implementation == "sdpa" and config.training.packing:
        parts["attention_mask"] = tokens * tokens  # block-diagonal, one byte a pair of tokens
    return {name: size / GIB for name, size in parts.items()}


def disk_bytes(config: Config, geometry: Geometry, tokens: int) -> float:
    """Checkpoints (adapter and two moments, fp32), the best and the final adapter, and the cache of encoded rows."""
    adapter = 4 * lora_parameters(config, geometry)
    kept = config.training.save_total_limit + 2  # the best ones, the newest, and the one being written
    return kept * 3 * adapter + 2 * adapter + 8 * tokens


def _problems(plan: Plan, config: Config) -> list[str]:
    problems = []
    if plan.steps < config.training.eval_steps:
        every = max(1, plan.steps // 5)
        problems.append(
            f"{plan.steps} steps, but training.eval_steps is {config.training.eval_steps}: evaluated only before and "
            f"after; --set training.eval_steps={every} --set training.save_steps={every} evaluates every {every}"
        )
    if plan.memory_available_gib is not None and plan.peak_memory_gib > plan.memory_available_gib:
        problems.append(
            f"{plan.peak_memory_gib:.1f} GiB expected, {plan.memory_available_gib:.1f} GiB free: lower "
            "training.per_device_train_batch_size (and raise training.gradient_accumulation_steps as much), then "
            "model.max_seq_length"
        )
    return problems
