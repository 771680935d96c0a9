"""The config as transformers' and TRL's arguments."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainingArguments

from finetune.machine.platforms import PLATFORMS
from finetune.training.arguments import training_arguments
from support.training import Case


def test_only_one_gpu_is_used_however_many_are_in_sight(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def eight(self: TrainingArguments) -> torch.device:
        self._n_gpu = 8
        return torch.device("cpu")

    monkeypatch.setattr(TrainingArguments, "_setup_devices", property(eight))
    assert training_arguments(case.config().training, case.run, PLATFORMS["cpu"], True).n_gpu == 1
