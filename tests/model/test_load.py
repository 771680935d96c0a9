"""Real NF4 through bitsandbytes on the CPU: what is loaded is what the config asks for, and LoRA on it is exact."""

from __future__ import annotations

import socket
import weakref
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune.config.base_model import MISTRAL
from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.errors import CheckFailed
from finetune.model import load as model_module
from finetune.model.load import load_base
from finetune.model.lora import add_lora
from finetune.model.verify import verify_base
from support.bases import LAYER, base_model, layers, same, trained_state


def tuned_model(config: Config, **quantization: Any) -> Any:
    """LoRA on the base, moved off its start, where B is zero and so are A's gradients."""
    model = add_lora(base_model(config, **quantization), config.lora, 1)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 32000, (2, 24), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "labels": ids}


def base_state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items() if "lora_" not in name}


# --- the Hub


@pytest.mark.parametrize("revision", [None, "0123456789abcdef0123456789abcdef01234567"])
def test_a_base_in_the_hubs_cache_is_loaded_without_a_word_to_anybody(
    hub_cache: Path, revision: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(list(hub_cache.glob("*/snapshots/*/model-*.safetensors"))) > 1
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub_cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)  # as quiet_libraries does
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("asked"))
    settings = [f"model.name={MISTRAL}", *([f"model.revision={revision}"] if revision else [])]
    base = base_model(load_config("cpu", settings)[0])
    assert (base.config.num_hidden_layers, base.name_or_path) == (2, MISTRAL)


# --- storage


def logits_and_gradients(config: Config, storage: str, checkpointing: bool) -> dict[str, torch.Tensor]:
    model = tuned_model(config, storage=storage)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert model.is_gradient_checkpointing is checkpointing
    output = model(**batch(), use_cache=False)
    output.loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    return {"logits": output.logits.detach(), **gradients}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient checkpointing"])
def test_expanded_computes_the_same_bits_as_packed_forward_and_backward(config: Config, checkpointing: bool) -> None:
    packed = logits_and_gradients(config, "packed", checkpointing)
    assert all(value.abs().sum() > 0 for value in packed.values())
    assert same(packed, logits_and_gradients(config, "expanded", checkpointing))


def test_packed_layers_hold_half_a_byte_a_weight_and_expanded_ones_four(config: Config) -> None:
    assert base_model(config).get_submodule(LAYER).weight.nbytes == 64 * 64 / 2
    assert base_model(config, storage="expanded").get_submodule(LAYER).weight.nbytes == 64 * 64 * 4


def test_nf4_is_not_the_weights_as_they_are_on_disk(config: Config, tiny_mistral: Path) -> None:
    """Else the equality above would say nothing."""
    plain = AutoModelForCausalLM.from_pretrained(tiny_mistral).get_submodule(LAYER).weight
    expanded = base_model(config, storage="expanded").get_submodule(LAYER).weight
    assert 0 < (plain - expanded).abs().max() < 0.2 * plain.abs().max()


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
def test_evaluation_changes_neither_the_packed_base_nor_the_losses_after_it(
    config: Config, monkeypatch: pytest.MonkeyPatch, bfloat16: bool
) -> None:
    # Every CPU is taken for one with AVX512-BF16, where bitsandbytes would repack the weights for good.
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    if bfloat16:
        config = config.changed("model", dtype="bfloat16").changed("quantization", bnb_4bit_compute_dtype="bfloat16")

    def losses(evaluate: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
        model = tuned_model(config)
        before = base_state(model)
        optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-2)
        found = []
        for _ in range(3):
            if evaluate:
                model.eval()
                with torch.no_grad():
                    model(**batch())
                packed = [module.weight for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
                assert len(packed) == 14
                assert all(weight.shape[1] == 1 for weight in packed)  # a repacked weight is [out, in / 2]
            model.train()
            loss = model(**batch()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        assert same(before, base_state(model))
        return found, trained_state(model)

    (without, adapter_without), (with_evaluation, adapter_with) = losses(False), losses(True)
    assert without == with_evaluation
    assert same(adapter_without, adapter_with)
    assert without[2] < without[0]


def test_load_base_verifies_what_it_loaded(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    real = AutoModelForCausalLM.from_pretrained

    def ignores_the_attention(*args: Any, **kwargs: Any) -> Any:
        return real(*args, **{**kwargs, "attn_implementation": "eager"})

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", ignores_the_attention)
    with pytest.raises(CheckFailed, match="attention is eager, expected sdpa"):
        base_model(config)


# --- weights that are not there


def test_a_folder_without_safetensors_is_told_and_pickles_are_not_read(
    config: Config, tiny_mistral: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_mistral / "config.json").read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckFailed) as failure:
        base_model(config.changed("model", name=str(tmp_path)))
    found = f"Error no file named model.safetensors found in directory {tmp_path}."
    assert str(failure.value) == f"model: {tmp_path} cannot be loaded: {found}"


def test_a_hub_model_that_cannot_be_fetched_says_how_to_get_it(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def gated(name: str, **kwargs: Any) -> Any:
        asked.update(kwargs, name=name)
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it.")

    monkeypatch.setattr(model_module.AutoModelForCausalLM, "from_pretrained", gated)
    with pytest.raises(CheckFailed) as failure:
        base_model(config.changed("model", name=MISTRAL, revision="abc"))
    assert str(failure.value) == (
        f"model: {MISTRAL} cannot be fetched: You are trying to access a gated repo.\n"
        f"Accept its terms at https://huggingface.co/{MISTRAL} once, then export HF_TOKEN=hf_...; or put its files in "
        "a folder and type --set model.name=FOLDER"
    )
    wanted = {"name": MISTRAL, "revision": "abc", "trust_remote_code": False, "use_safetensors": True}
    assert {key: asked[key] for key in wanted} == wanted
    assert asked["device_map"] == {"": "cpu"}
    assert asked["tqdm_class"].__module__ == "finetune.model.load_progress"


def test_an_expanded_base_is_verified_before_its_scales_are_gone(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = []
    monkeypatch.setattr(model_module, "verify_base", lambda *arguments: stages.append(arguments[-1]))
    base_model(config, storage="expanded")
    assert stages == ["packed", "expanded"]


def test_a_packed_layer_is_gone_before_the_next_is_expanded(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all packed ones, some 4 GB of a 7B, would lie beside the expanded."""
    packed: list[weakref.ref[Any]] = []
    there: list[int] = []
    dequantize = bitsandbytes.functional.dequantize_4bit

    def verified(base: Any, *_: Any) -> None:
        packed.extend(weakref.ref(it.weight) for it in base.modules() if isinstance(it, bitsandbytes.nn.Linear4bit))

    def watched(*arguments: Any) -> torch.Tensor:
        there.append(sum(reference() is not None for reference in packed))
        return dequantize(*arguments)

    monkeypatch.setattr(model_module, "verify_base", verified)
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", watched)
    base_model(config, storage="expanded")
    assert there == list(range(14, 0, -1))


def test_without_4_bit_kernels_the_base_is_quantized_and_expanded_on_the_cpu(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`meta` stands for MPS: a device that is neither CUDA's nor the CPU, and on which no value can be computed."""
    wanted = base_model(config, storage="expanded")
    devices: list[str] = []
    values: list[torch.Tensor] = []
    moved: list[list[str]] = []
    bases: list[Any] = []
    quantize, dequantize = bitsandbytes.functional.quantize_4bit, bitsandbytes.functional.dequantize_4bit
    verify = verify_base

    def quantized(weights: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        devices.append(weights.device.type)
        return quantize(weights, *arguments, **options)

    def dequantized(packed: torch.Tensor, *arguments: Any) -> torch.Tensor:
        devices.append(packed.device.type)
        plain = [name for name in layers() if type(bases[0].get_submodule(name)) is torch.nn.Linear]
        moved.append([bases[0].get_submodule(name).weight.device.type for name in plain])
        values.append(dequantize(packed, *arguments))
        return values[-1]

    def verified(base: Any, *arguments: Any) -> None:
        bases.append(base)
        verify(base, *arguments)

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", quantized)
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", dequantized)
    monkeypatch.setattr(model_module, "verify_base", verified)
    base = load_base(config.model, config.changed("quantization", storage="expanded").quantization, "meta")
    assert devices == ["cpu"] * 28  # each of 14 layers there and back
    assert moved == [["meta"] * number for number in range(14)]  # each has left the host when the next is expanded
    assert {value.device.type for value in (*base.parameters(), *base.buffers())} == {"meta"}
    for name, value in zip(layers(), values, strict=True):
        assert torch.equal(value, wanted.get_submodule(name).weight), name
    assert [(name, value.dtype, value.shape) for name, value in base.state_dict().items()] == [
        (name, value.dtype, value.shape) for name, value in wanted.state_dict().items()
    ]


@pytest.mark.parametrize(
    ("device", "storage", "where"),
    [
        ("mps", "expanded", "cpu"),
        ("mps", "packed", "cpu"),
        ("cuda", "expanded", "cuda"),
        ("cuda", "packed", "cuda"),
        ("cpu", "expanded", "cpu"),
        ("cpu", "packed", "cpu"),
    ],
)
def test_only_a_base_for_mps_is_quantized_elsewhere(
    device: str, storage: str, where: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = []

    def noted(*_: Any, device_map: dict[str, str], **__: Any) -> None:
        maps.append(device_map)
        raise OSError("enough")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", noted)
    with pytest.raises(CheckFailed, match="enough"):
        load_base(config.model, config.changed("quantization", storage=storage).quantization, device)
    assert maps == [{"": where}]


def test_a_library_that_is_missing_is_told_with_what_to_set(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any, **__: Any) -> None:
        raise ImportError("FlashAttention2 has been toggled on, but it cannot be used\nmore")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", absent)
    with pytest.raises(CheckFailed) as failure:
        base_model(config)
    assert str(failure.value) == (
        f"model: {config.model.name} needs a library that is not installed: "
        "FlashAttention2 has been toggled on, but it cannot be used\n"
        "without flash-attn: --set model.attn_implementation=torch_varlen"
    )
