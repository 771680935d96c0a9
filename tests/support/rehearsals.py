"""Rehearsals of a tiny run."""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import PeftModel

from finetune.config.schema import Config
from finetune.model.load import load_base
from finetune.model.lora import add_lora
from finetune.training.rehearsal import Rehearsal, rehearse
from support.training import Case

PLENTY_GIB = 1000.0


def loaded(config: Config) -> PeftModel:
    return add_lora(load_base(config.model, config.quantization, "cpu"), config.lora, config.training.seed)


def rehearsed(
    case: Case, config: Config, model: PeftModel, capacity_gib: float = PLENTY_GIB, done: int = 0
) -> Rehearsal:
    folder = case.run.folder / "rehearsal"
    return rehearse(model, case.tokenizer, case.data(config), config, folder, capacity_gib, done)


def attributes(model: PeftModel) -> list[dict[str, Any]]:
    """Attributes of all modules, with the contents of those that are containers; and accelerate's singletons."""
    found = [vars(module) for module in model.modules()]
    found += [state._shared_state for state in (PartialState, AcceleratorState, GradientState)]
    return [
        {name: list(value) if isinstance(value, dict | set | list) else value for name, value in entry.items()}
        for entry in found
    ]
