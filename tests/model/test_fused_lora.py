"""LoRA that keeps less computes what PEFT's computes: the same loss and gradients, and the same kind of noise."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open

from finetune.config.schema import Config
from finetune.errors import CheckFailed
from finetune.model import fused_lora
from finetune.plan.memory import _Sizes
from finetune.plan.model_shape import read_geometry
from support.steps import BFLOAT16, autocast, checkpointings, distance, in_training, loss_and_gradients, settings
from support.training import Case, adapter_weights, same

TOLERANCE = 5e-6  # relative, float32: sums in another order


storages = pytest.mark.parametrize("storage", ["packed", "expanded"])


@storages
@checkpointings
def test_without_dropout_loss_and_all_gradients_are_pefts(tiny_mistral: Path, storage: str, checkpointing: str) -> None:
    keys = "lora.lora_dropout=0", f"quantization.storage={storage}", f"training.gradient_checkpointing={checkpointing}"
    config = settings(tiny_mistral, *keys)
    peft, fused = (loss_and_gradients(in_training(config, fused), config) for fused in (False, True))
    assert distance(fused, peft) < TOLERANCE


class SameNoise(torch.nn.Module):
    """Dropout in PEFT's place whose noise is what the fused layer would make, from the same random numbers."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seed = int(torch.randint(2**62, ()))
        masks = [mask for _, mask in fused_lora._masks(x.reshape(-1, x.shape[-1]), self.probability, seed)]
        return x * torch.cat(masks).view(x.shape) / (1 - self.probability)  # type: ignore[arg-type]


@storages
@checkpointings
def test_under_the_same_noise_loss_and_all_gradients_are_pefts(
    tiny_mistral: Path, storage: str, checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_lora, "NOISE_TOKENS", 20)  # 48 tokens are two whole parts and one of eight
    keys = (
        "lora.lora_dropout=0.3",
        f"quantization.storage={storage}",
        f"training.gradient_checkpointing={checkpointing}",
    )
    config = settings(tiny_mistral, *keys)
    peft = in_training(config, fused=False)
    for layer in peft.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_dropout["default"] = SameNoise(0.3)
    wanted = loss_and_gradients(peft, config)
    assert distance(loss_and_gradients(in_training(config, fused=True), config), wanted) < TOLERANCE


def test_in_bfloat16_loss_and_gradients_are_no_further_from_float32_than_pefts(tiny_mistral: Path) -> None:
    """In the mean of several samples: of one, the rounding is as often the larger for PEFT as for the fused layer."""
    exact = settings(tiny_mistral, "lora.lora_dropout=0")
    config = settings(tiny_mistral, "lora.lora_dropout=0", *BFLOAT16)
    reference, samples = in_training(exact, fused=False), range(16)
    wanted = [loss_and_gradients(reference, exact, sample) for sample in samples]
    peft, fused = (
        fmean(distance(loss_and_gradients(model, config, sample), wanted[sample]) for sample in samples)
        for model in (in_training(config, fused) for fused in (False, True))
    )
    assert 0.001 < peft < 0.1
    assert fused < 1.1 * peft


# --- noise


def noise(features: int, seed: int) -> torch.Tensor:
    return torch.cat(
        [mask for _, mask in fused_lora._masks(torch.empty(5000, features), 0.05, seed) if mask is not None]
    )


def test_noise_hides_one_in_twenty_of_every_layers_inputs_at_every_step_anew() -> None:
    first, again, other = (noise(100, seed) for seed in (7, 7, 8))
    assert first.shape == (5000, 100)
    assert set(first.unique().tolist()) == {0, 1}
    assert float((first == 0).float().mean()) == pytest.approx(0.05, abs=0.002)  # 6 standard deviations
    assert torch.equal(first, again)
    both = float(((first == 0) & (other == 0)).float().mean())
    assert both == pytest.approx(0.05**2, abs=0.0005)
    parts = first[:2048], first[2048:4096]
    assert float(((parts[0] == 0) & (parts[1] == 0)).float().mean()) == pytest.approx(0.05**2, abs=0.0007)


def test_each_layer_and_each_step_draws_a_seed_of_its_own_and_what_is_left_is_scaled_up(
    tiny_mistral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tiny_mistral, "lora.lora_dropout=0.5", "training.gradient_checkpointing=false")
    seeds, masks = [], fused_lora._masks

    def recorded(x: torch.Tensor, probability: float, seed: int) -> Any:
        seeds.append(seed)
        return masks(x, probability, seed)

    monkeypatch.setattr(fused_lora, "_masks", recorded)
    model = in_training(config, fused=True)
    with torch.no_grad():
        for _ in range(3):
            model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
    assert len(set(seeds)) == len(seeds) == 3 * 14  # seven layers of two decoder layers

    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    x = torch.ones(1, 20_000, 64)
    with torch.no_grad():
        found, wanted = layer(x).mean(1), layer.eval()(x).mean(1)
    assert float((found - wanted).norm() / wanted.norm()) < 0.02


# --- where it does not apply


def test_where_triton_cannot_make_its_kernels_the_run_ends_with_how_to_train_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "finetune.model.fused_dropout", raising=False)  # a test before may have it
    monkeypatch.delattr("finetune.model.fused_dropout", raising=False)
    on_a_gpu: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    with pytest.raises(CheckFailed) as failed:
        fused_lora.install(on_a_gpu)
    assert str(failed.value) == (
        "fused LoRA: Triton's kernels cannot be compiled: import of triton halted; None in sys.modules\n"
        "to train without it: --set training.fused_lora=false"
    )


def test_evaluation_and_a_disabled_adapter_go_pefts_own_way(
    tiny_mistral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = in_training(settings(tiny_mistral), fused=True)
    monkeypatch.setattr(fused_lora._AdaptedLinear, "apply", lambda *_: pytest.fail("the fused layer ran"))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        with model.disable_adapter():
            model(input_ids=ids)
        model.eval()
        model(input_ids=ids)
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)


def saved_adapter(model: PeftModel, folder: Path) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """(adapter_config.json, shape of each tensor)"""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["target_modules"].sort()
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return config, {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def test_what_is_saved_is_the_adapter_that_peft_saves(tiny_mistral: Path, tmp_path: Path) -> None:
    config = settings(tiny_mistral)
    peft, fused = (saved_adapter(in_training(config, fused), tmp_path / str(fused)) for fused in (False, True))
    assert fused == peft
    assert len(peft[1]) == 28


@pytest.mark.parametrize("checkpointing", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(case: Case, checkpointing: str) -> None:
    keys = (
        *("training.fused_lora=true", f"training.gradient_checkpointing={checkpointing}", "lora.lora_dropout=0.2"),
        *("training.eval_steps=2", "training.save_steps=2", "training.load_best_model_at_end=false"),
    )
    _, whole, _ = case.train(*keys)
    _, resumed, _ = case.train(*keys, checkpoint=case.run.checkpoints / "checkpoint-2")
    assert same(adapter_weights(whole), adapter_weights(resumed))


# --- what is kept


@contextmanager
def counted(tokens: int) -> Iterator[dict[int, int]]:
    """Bytes of each storage with `tokens` rows that autograd keeps in the block, by its address."""
    sizes: dict[int, int] = {}
    held = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tokens in tensor.shape:
            storage = tensor.untyped_storage()
            held.append(storage)  # so that no address is used twice
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield sizes


def kept_a_token(config: Config, fused: bool) -> float:
    """Bytes a token that LoRA keeps in a decoder layer: what the layer keeps, less what it keeps without adapters."""
    model, tokens = in_training(config, fused), 37
    decoder = model.get_base_model().model
    x = torch.randn(1, tokens, 64, dtype=model.dtype, requires_grad=True)
    angles = decoder.rotary_emb(x, torch.arange(tokens)[None])
    with autocast(config):
        with counted(tokens) as adapted:
            held = decoder.layers[1](x, position_embeddings=angles)
        with model.disable_adapter(), counted(tokens) as plain:
            held = held, decoder.layers[1](x, position_embeddings=angles)
    return (sum(adapted.values()) - sum(plain.values())) / tokens


@storages
@pytest.mark.parametrize("precision", [(), BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0, 0.05])
@pytest.mark.parametrize("fused", [False, True], ids=["PEFT", "fused"])
def test_autograd_keeps_what_the_memory_model_says(
    tiny_mistral: Path, storage: str, precision: tuple[str, ...], dropout: float, fused: bool
) -> None:
    keys = f"lora.lora_dropout={dropout}", f"quantization.storage={storage}", "training.gradient_checkpointing=false"
    config = settings(tiny_mistral, *keys, *precision, f"training.fused_lora={str(fused).lower()}")
    assert kept_a_token(config, fused) == _Sizes(config, read_geometry(config)).lora_a_token()


def test_with_dropout_lora_keeps_a_quarter_of_what_peft_keeps(tiny_mistral: Path) -> None:
    keys = *BFLOAT16, "training.gradient_checkpointing=false"
    config = settings(tiny_mistral, *keys)
    # PEFT on a CPU: input after dropout, 2 bytes, and noise, 4, of 6 x 64 + 128 features. Fused: inputs, 64 + 64 + 128.
    assert kept_a_token(config, fused=False) == 6 * (6 * 64 + 128) + 7 * 16 * 2
    assert kept_a_token(config, fused=True) == 2 * (64 + 64 + 128) + 7 * 16 * 2
