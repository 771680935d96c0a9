"""Rehearsals of a tiny run."""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import PeftModel

from finetune.config.schema import Config
from finetune.machine.platforms import PLATFORMS
from finetune.model.load import load_base
from finetune.model.lora import add_lora
from finetune.training.job import Job
from finetune.training.rehearsal import Rehearsal, rehearse
from support.training import Case

PLENTY_GIB = 1000.0


def loaded(config: Config) -> PeftModel:
    return add_lora(load_base(config.model, config.quantization, "cpu"), config.lora, config.training.seed)


def rehearsed(
    case: Case, config: Config, model: PeftModel, capacity_gib: float = PLENTY_GIB, done: int = 0
) -> Rehearsal:
    job = Job(case.run, config, case.data(config), model, case.tokenizer)
    return rehearse(job, case.run.folder / "rehearsal", capacity_gib, done)


def attributes(model: PeftModel) -> list[dict[str, Any]]:
    """Attributes of all modules, with the contents of those that are containers; and accelerate's singletons."""
    found = [vars(module) for module in model.modules()]
    found += [state._shared_state for state in (PartialState, AcceleratorState, GradientState)]
    return [
        {name: list(value) if isinstance(value, dict | set | list) else value for name, value in entry.items()}
        for entry in found
    ]


CPU = PLATFORMS["cpu"]


DROPOUT = ("lora.lora_dropout=0.1", "training.gradient_accumulation_steps=2", "training.eval_steps=2")
KINDS = {
    "packed": ("training.packing=true",),
    "padded, in bf16, recomputed": (
        "training.packing=false",
        "training.per_device_train_batch_size=3",
        "training.gradient_checkpointing=true",
        "model.dtype=bfloat16",
        "quantization.bnb_4bit_compute_dtype=bfloat16",
        "training.bf16=true",
    ),
}
