"""A plan, and configs of the H100 to plan for."""

from __future__ import annotations

from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.plan.plan import Plan


def load(*settings: str, platform: str = "h100") -> Config:
    return load_config(platform, settings)[0]


PLAN = Plan(
    rows_train=12_345,
    rows_validation=1_371,
    rows_evaluated=1_371,
    tokens_train=4_000_000,
    supervised_tokens_train=1_500_000,
    rows_truncated=1_204,
    rows_dropped=3,
    sequences_train=1_020,
    packing_efficiency=0.9575,
    effective_batch_size=16,
    steps_per_epoch=64,
    steps=1_920,
    warmup_steps=58,
    evaluations=21,
    tokens_evaluated=8_400_000,
    checkpoints=4,
    peak_memory_gib=12.96,
    memory_parts={"weights": 3.841, "activations": 9.119},
    memory_available_gib=79.13,
    disk_gib=2.66,
    hours=3.46,
    certificate={"rows": 13_719, "of": 13_719, "mismatches": 0},
    checkpointed_layers=32,
    problems=["too few steps", "too little memory"],
)
