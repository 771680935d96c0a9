"""In bfloat16 nothing is kept wider than it has to be: norms, hidden states, logits; only the adapters are float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedTokenizerFast
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralMLP, MistralRMSNorm

from finetune.training.trainer import Trainer
from support.training import Case

BFLOAT16 = ("model.dtype=bfloat16", "quantization.bnb_4bit_compute_dtype=bfloat16", "training.bf16=true")


@pytest.fixture(params=["packed", "expanded"])
def trainer(
    request: pytest.FixtureRequest,
    tiny_mistral: Path,
    conversations: Path,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
) -> Trainer:
    case = Case(tiny_mistral, conversations, tmp_path, tokenizer)
    keys = *BFLOAT16, f"quantization.storage={request.param}", "model.max_seq_length=256", "training.max_steps=1"
    return case.trainer(*keys, first=False)


def test_only_the_adapters_are_float32(trainer: Trainer) -> None:
    dtypes = {name: value.dtype for name, value in trainer.model.named_parameters() if value.is_floating_point()}
    assert {dtype for name, dtype in dtypes.items() if "lora_" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "lora_" not in name} == {torch.bfloat16}
    assert sum("norm" in name for name in dtypes) == 5


def test_norms_layers_and_linear_layers_hand_on_bfloat16_in_a_training_step(trainer: Trainer) -> None:
    seen: dict[str, set[torch.dtype]] = {}

    def look(module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        seen.setdefault(type(module).__name__, set()).add(output.dtype)

    for module in trainer.model.modules():
        if isinstance(module, MistralDecoderLayer | MistralRMSNorm | MistralMLP | torch.nn.Linear | LoraLayer):
            module.register_forward_hook(look)
    trainer.train()
    linear = {"Linear4bit"} if trainer.model.is_quantized else set()
    assert set(seen) == {"MistralDecoderLayer", "MistralRMSNorm", "MistralMLP", "Linear"} | linear
    assert set().union(*seen.values()) == {torch.bfloat16}


def test_no_logits_of_all_tokens_are_kept_for_the_backward_pass(trainer: Trainer) -> None:
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    logits = batch["input_ids"].numel() * trainer.model.config.vocab_size
    kept: list[torch.Size] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() >= logits / 2:
            kept.append(tensor.shape)
        return tensor

    trainer.model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), trainer.compute_loss_context_manager():
        trainer.compute_loss(trainer.model, batch)
    assert batch["input_ids"].numel() > 200
    assert kept == []
