"""LoRA on the base: in fp32, on the targets only, the same for the same seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.errors import CheckFailed
from finetune.model import lora as lora_module
from finetune.model.lora import add_lora, begin_with, load_adapter
from support.bases import base_model, same, trained_state


@pytest.fixture(scope="module")
def lora_config(tiny_mistral: Path) -> Config:
    return load_config("cpu", [f"model.name={tiny_mistral}", "lora.target_modules=[q_proj, down_proj]", "lora.r=4"])[0]


def adapter(config: Config, seed: int, draws: int) -> dict[str, torch.Tensor]:
    base = base_model(config)
    torch.rand(draws)
    return trained_state(add_lora(base, config.lora, seed))


def test_the_same_seed_gives_the_same_adapter_whatever_was_drawn_before(lora_config: Config) -> None:
    torch.manual_seed(7)
    first = adapter(lora_config, seed=42, draws=3)
    torch.manual_seed(8)
    assert same(first, adapter(lora_config, seed=42, draws=1000))
    assert not same(first, adapter(lora_config, seed=43, draws=3))


def test_only_fp32_lora_weights_train_and_only_on_the_targets(lora_config: Config) -> None:
    model = add_lora(base_model(lora_config), lora_config.lora, 42)
    trained = trained_state(model)
    wanted = {
        f"base_model.model.model.layers.{layer}.{target}.lora_{matrix}.default.weight": shape
        for layer in (0, 1)
        for target, inputs, outputs in (("self_attn.q_proj", 64, 64), ("mlp.down_proj", 128, 64))
        for matrix, shape in (("A", (4, inputs)), ("B", (outputs, 4)))
    }
    assert {name: tuple(value.shape) for name, value in trained.items()} == wanted
    assert {value.dtype for value in trained.values()} == {torch.float32}
    peft_config = model.peft_config["default"]
    assert (peft_config.lora_alpha, peft_config.lora_dropout, peft_config.bias) == (32, 0.05, "none")


def test_lora_on_a_bfloat16_base_is_fp32(lora_config: Config) -> None:
    bfloat16 = lora_config.changed("model", dtype="bfloat16").changed("quantization", bnb_4bit_compute_dtype="bfloat16")
    assert {value.dtype for value in adapter(bfloat16, 42, 0).values()} == {torch.float32}


def test_adapter_weights_that_are_not_fp32_are_refused(lora_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    real = lora_module.get_peft_model
    monkeypatch.setattr(lora_module, "get_peft_model", lambda *args: real(*args).to(torch.bfloat16))
    with pytest.raises(CheckFailed) as failure:
        adapter(lora_config.changed("quantization", storage="expanded"), 42, 0)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert str(failure.value) == f"model: {name} has dtype torch.bfloat16, expected float32 adapter weights"


# A saved adapter ------------------------------------------------------------------------------------------------------

TENSOR = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"


@pytest.fixture
def saved(lora_config: Config, tmp_path: Path) -> Path:
    """The folder of an adapter that is off its start."""
    model = add_lora(base_model(lora_config), lora_config.lora, 42)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def rewritten(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return rewrite


def test_a_saved_adapter_is_loaded_as_it_was_saved(lora_config: Config, saved: Path) -> None:
    model = load_adapter(base_model(lora_config), saved)
    loaded = {name.replace(".default", ""): value for name, value in model.state_dict().items() if ".lora_" in name}
    assert same(loaded, load_file(saved / "adapter_model.safetensors"))


@pytest.mark.filterwarnings("error:Found missing adapter keys")
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda path: path.unlink(), "PEFT cannot load this adapter: No such file or directory: {path}"),
        (lambda path: path.write_bytes(b"abc"),
            "PEFT cannot load this adapter: Error while deserializing header: header too small"),
        (rewritten(lambda tensors: tensors.pop(TENSOR)), f"not an adapter of this base: {TENSOR} in one of them only"),
        (rewritten(lambda tensors: tensors.update({"x": torch.ones(1), "y": torch.ones(1)})),
            "not an adapter of this base: x and 1 more in one of them only"),
        (rewritten(lambda tensors: tensors.update({TENSOR: torch.ones(2, 128)})),
            "PEFT cannot load this adapter: Error(s) in loading state_dict for PeftModelForCausalLM: size mismatch for "
            f"{TENSOR.replace('.weight', '.default.weight')}: copying a param with shape torch.Size([2, 128]) from "
            "checkpoint, the shape in current model is torch.Size([4, 128])."),
        (rewritten(lambda tensors: tensors[TENSOR][0, 0].fill_(float("nan"))), f"damaged: {TENSOR} not finite"),
    ],
    ids=["absent", "cut short", "less", "more", "of another rank", "not finite"],
)  # fmt: skip
def test_one_that_is_damaged_or_of_another_base_is_refused(
    lora_config: Config, saved: Path, change: Callable[[Path], Any], fault: str
) -> None:
    path = saved / "adapter_model.safetensors"
    change(path)
    with pytest.raises(CheckFailed) as refused:
        load_adapter(base_model(lora_config), saved)
    assert str(refused.value) == f"{saved}: {fault.format(path=path)}"


@pytest.mark.parametrize(
    ("content", "fault"),
    [("{", "Expecting property name"), ("{}", "KeyError 'peft_type'"), ('{"peft_type": "NO"}', "KeyError 'NO'")],
)
def test_a_config_of_no_adapter_is_refused(lora_config: Config, saved: Path, content: str, fault: str) -> None:
    (saved / "adapter_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckFailed) as refused:
        load_adapter(base_model(lora_config), saved)
    assert str(refused.value).startswith(f"{saved}: PEFT cannot load this adapter: {fault}")


def test_an_adapter_to_begin_with_is_taken_over_bit_for_bit(lora_config: Config, tmp_path: Path) -> None:
    first = add_lora(base_model(lora_config), lora_config.lora, 1)
    with torch.no_grad():
        for parameter in first.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    first.save_pretrained(tmp_path)
    second = add_lora(base_model(lora_config), lora_config.lora, 2)
    begin_with(second, tmp_path)
    assert same(trained_state(first), trained_state(second))


def test_an_adapter_to_begin_with_that_is_not_finite_is_refused(lora_config: Config, tmp_path: Path) -> None:
    model = add_lora(base_model(lora_config), lora_config.lora, 1)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(CheckFailed) as refused:
        begin_with(model, tmp_path)
    assert refused.value.found == f"{tmp_path}: damaged: {name} not finite"
