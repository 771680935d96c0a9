"""Real NF4 through bitsandbytes on the CPU: what is loaded is what the config asks for, and LoRA on it is exact."""

from __future__ import annotations

import functools
import socket
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune.config.load import load_config
from finetune.config.schema import MISTRAL, Config
from finetune.errors import CheckFailed
from finetune.model import load as model_module
from finetune.model import lora as lora_module
from finetune.model.load import load_base
from finetune.model.lora import add_lora
from finetune.model.verify import verify_base

LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def config(tiny_mistral: Path) -> Config:
    return load_config("cpu", [f"model.name={tiny_mistral}", "lora.lora_dropout=0"])[0]


def base_model(config: Config, **quantization: Any) -> Any:
    return load_base(config.model, replace(config.quantization, **quantization), "cpu")


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


def trained_state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def base_state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items() if "lora_" not in name}


def same(these: dict[str, torch.Tensor], those: dict[str, torch.Tensor]) -> bool:
    return these.keys() == those.keys() and all(torch.equal(these[name], those[name]) for name in these)


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
        config = replace(
            config,
            model=replace(config.model, dtype="bfloat16"),
            quantization=replace(config.quantization, bnb_4bit_compute_dtype="bfloat16"),
        )

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


# --- what was loaded is what was asked for


def left_unquantised(base: Any) -> None:
    base.model.layers[0].self_attn.q_proj = torch.nn.Linear(64, 64, bias=False)


def without_quant_state(base: Any) -> None:
    base.get_submodule(LAYER).weight.quant_state = None


def norm_in_bfloat16(base: Any) -> None:
    base.model.layers[1].input_layernorm.to(torch.bfloat16)


def eager_attention(base: Any) -> None:
    base.set_attn_implementation("eager")


def quantised_head(base: Any) -> None:
    base.lm_head = bitsandbytes.nn.Linear4bit(64, 32000, bias=False)


def one_layer_elsewhere(base: Any) -> None:
    base.model.norm.to("meta")


def nothing(base: Any) -> None: ...


@functools.cache
def layers() -> list[str]:
    """Names of the 14 linear layers of the tiny model's decoder, in order."""
    attention = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")]
    names = [*attention, *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]
    return [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in names]


def on_each_layer(text: str) -> list[str]:
    return [*(f"{name} {text}" for name in layers()[:10]), "... and 4 more"]


DOWNGRADES: list[tuple[str, dict[str, Any], Callable[[Any], None], list[str]]] = [
    ("a layer on another device", {}, one_layer_elsewhere, ["model.norm.weight is on meta, wanted cpu"]),
    ("a layer not quantised", {}, left_unquantised, [f"{LAYER} is Linear, wanted Linear4bit"]),
    ("a layer without its scales", {}, without_quant_state, [f"{LAYER} is not quantised, wanted nf4"]),
    ("fp4", {"bnb_4bit_quant_type": "fp4"}, nothing, on_each_layer("has bnb_4bit_quant_type fp4, wanted nf4")),
    (
        "no double quantisation",
        {"bnb_4bit_use_double_quant": False},
        nothing,
        on_each_layer("has bnb_4bit_use_double_quant False, wanted True"),
    ),
    (
        "another compute dtype",
        {"bnb_4bit_compute_dtype": "bfloat16"},
        nothing,
        on_each_layer("has bnb_4bit_compute_dtype bfloat16, wanted float32"),
    ),
    ("expanded", {"storage": "expanded"}, nothing, on_each_layer("is Linear, wanted Linear4bit")),
    (
        "another dtype",
        {},
        norm_in_bfloat16,
        ["model.layers.1.input_layernorm.weight has dtype bfloat16, wanted float32"],
    ),
    ("another attention", {}, eager_attention, ["attention is eager, wanted sdpa"]),
    ("a quantised output layer", {}, quantised_head, ["lm_head is Linear4bit, wanted Linear"]),
]


@pytest.mark.parametrize(
    ("loaded", "change", "problems"), [row[1:] for row in DOWNGRADES], ids=[row[0] for row in DOWNGRADES]
)
def test_a_base_that_is_not_what_was_asked_for_is_named(
    config: Config, loaded: dict[str, Any], change: Callable[[Any], None], problems: list[str]
) -> None:
    base = base_model(config, **loaded)
    change(base)
    with pytest.raises(CheckFailed) as failure:
        verify_base(base, config.model, config.quantization, "cpu", "packed")
    assert str(failure.value) == "model: not loaded as the config asks\n  " + "\n  ".join(problems)


def test_a_base_on_the_wrong_device_is_named_parameter_by_parameter(config: Config) -> None:
    base = base_model(config)
    names = [name for name, _ in base.named_parameters()]
    problems = [f"{name} is on cpu, wanted cuda" for name in names[:10]]
    with pytest.raises(CheckFailed) as failure:
        verify_base(base, config.model, config.quantization, "cuda", "packed")
    more = f"... and {len(names) - 10} more"
    assert str(failure.value) == "model: not loaded as the config asks\n  " + "\n  ".join([*problems, more])


def test_a_packed_layer_in_an_expanded_base_is_named(config: Config) -> None:
    expanded = replace(config.quantization, storage="expanded")
    base = base_model(config, storage="expanded")
    verify_base(base, config.model, expanded, "cpu", "expanded")
    base.model.layers[0].self_attn.q_proj = base_model(config).get_submodule(LAYER)
    with pytest.raises(CheckFailed) as failure:
        verify_base(base, config.model, expanded, "cpu", "expanded")
    problem = f"{LAYER} is Linear4bit, wanted Linear"
    assert str(failure.value) == f"model: not loaded as the config asks\n  {problem}"


def test_load_base_verifies_what_it_loaded(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    real = AutoModelForCausalLM.from_pretrained

    def ignores_the_attention(*args: Any, **kwargs: Any) -> Any:
        return real(*args, **{**kwargs, "attn_implementation": "eager"})

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", ignores_the_attention)
    with pytest.raises(CheckFailed, match="attention is eager, wanted sdpa"):
        base_model(config)


# --- weights that are not there


def test_a_folder_without_safetensors_is_told_and_pickles_are_not_read(
    config: Config, tiny_mistral: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_mistral / "config.json").read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckFailed) as failure:
        base_model(replace(config, model=replace(config.model, name=str(tmp_path))))
    found = f"Error no file named model.safetensors found in directory {tmp_path}."
    assert str(failure.value) == f"model: {tmp_path} cannot be loaded: {found}"


def test_a_hub_model_that_cannot_be_fetched_says_how_to_get_it(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def gated(name: str, **kwargs: Any) -> Any:
        asked.update(kwargs, name=name)
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it.")

    monkeypatch.setattr(model_module.AutoModelForCausalLM, "from_pretrained", gated)
    with pytest.raises(CheckFailed) as failure:
        base_model(replace(config, model=replace(config.model, name=MISTRAL, revision="abc")))
    assert str(failure.value) == (
        f"model: {MISTRAL} cannot be fetched: You are trying to access a gated repo.\n"
        f"Accept its terms at https://huggingface.co/{MISTRAL} once, then export HF_TOKEN=hf_...; or put its files in "
        "a folder and type --set model.name=FOLDER"
    )
    wanted = {"name": MISTRAL, "revision": "abc", "trust_remote_code": False, "use_safetensors": True}
    assert {key: asked[key] for key in wanted} == wanted
    assert asked["device_map"] == {"": "cpu"}


# --- LoRA


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
    bfloat16 = replace(
        lora_config,
        model=replace(lora_config.model, dtype="bfloat16"),
        quantization=replace(lora_config.quantization, bnb_4bit_compute_dtype="bfloat16"),
    )
    assert {value.dtype for value in adapter(bfloat16, 42, 0).values()} == {torch.float32}


def test_adapter_weights_that_are_not_fp32_are_refused(lora_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    real = lora_module.get_peft_model
    monkeypatch.setattr(lora_module, "get_peft_model", lambda *args: real(*args).to(torch.bfloat16))
    with pytest.raises(CheckFailed) as failure:
        adapter(replace(lora_config, quantization=replace(lora_config.quantization, storage="expanded")), 42, 0)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert str(failure.value) == f"model: {name} has dtype torch.bfloat16, wanted float32 adapter weights"


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


def test_for_a_device_without_4_bit_kernels_the_base_is_quantised_and_expanded_on_the_cpu(
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
    base = load_base(config.model, replace(config.quantization, storage="expanded"), "meta")
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
        ("mps", "packed", "mps"),
        ("cuda", "expanded", "cuda"),
        ("cuda", "packed", "cuda"),
        ("cpu", "expanded", "cpu"),
        ("cpu", "packed", "cpu"),
    ],
)
def test_only_an_expanded_base_for_mps_is_quantised_elsewhere(
    device: str, storage: str, where: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = []

    def noted(*_: Any, device_map: dict[str, str], **__: Any) -> None:
        maps.append(device_map)
        raise OSError("enough")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", noted)
    with pytest.raises(CheckFailed, match="enough"):
        load_base(config.model, replace(config.quantization, storage=storage), device)
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
        "without flash-attn: --set model.attn_implementation=sdpa"
    )
