"""A device that draws dropout from random numbers of its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune.machine.platforms import PLATFORMS
from finetune.training import trainer as trainer_module
from finetune.training.trainer import Trainer


class DeviceDropout(torch.nn.Module):
    """Dropout that draws from random numbers of its own, as on a device whose generator is not the CPU's."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        kept = torch.rand(values.shape, generator=self.generator) > 0.5
        return values * kept if self.training else values


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> torch.Generator:
    """The random numbers of a stand-in for MPS; the model computes on the CPU, its dropout draws from these."""
    generator = torch.Generator()
    device = SimpleNamespace(get_rng_state=generator.get_state, set_rng_state=generator.set_state)
    monkeypatch.setattr(torch, "get_device_module", {"mps": device, "cpu": torch.cpu}.__getitem__)
    monkeypatch.setattr(Trainer, "platform", PLATFORMS["m4"])
    monkeypatch.setattr(trainer_module, "peak_memory_gib", lambda _platform: 1.0)  # it would ask MPS
    make = trainer_module.SFTTrainer.__init__

    def with_dropout(self: Any, *arguments: Any, **named: Any) -> None:
        make(self, *arguments, **named)
        for module in self.model.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = DeviceDropout(generator)

    monkeypatch.setattr(trainer_module.SFTTrainer, "__init__", with_dropout)
    return generator
