"""What was loaded is what was asked for: each way of falling short of the config is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch

from finetune.config.schema import Config
from finetune.errors import CheckFailed
from finetune.model.verify import verify_base, why_not_compiled
from support.bases import LAYER, base_model, layers


def left_unquantized(base: Any) -> None:
    base.model.layers[0].self_attn.q_proj = torch.nn.Linear(64, 64, bias=False)


def without_quant_state(base: Any) -> None:
    base.get_submodule(LAYER).weight.quant_state = None


def norm_in_bfloat16(base: Any) -> None:
    base.model.layers[1].input_layernorm.to(torch.bfloat16)


def eager_attention(base: Any) -> None:
    base.set_attn_implementation("eager")


def quantized_head(base: Any) -> None:
    base.lm_head = bitsandbytes.nn.Linear4bit(64, 32000, bias=False)


def one_layer_elsewhere(base: Any) -> None:
    base.model.norm.to("meta")


def nothing(base: Any) -> None: ...


def on_each_layer(text: str) -> list[str]:
    return [*(f"{name} {text}" for name in layers()[:10]), "... and 4 more"]


DOWNGRADES: list[tuple[str, dict[str, Any], Callable[[Any], None], list[str]]] = [
    ("a layer on another device", {}, one_layer_elsewhere, ["model.norm.weight is on meta, expected cpu"]),
    ("a layer not quantized", {}, left_unquantized, [f"{LAYER} is Linear, expected Linear4bit"]),
    ("a layer without its scales", {}, without_quant_state, [f"{LAYER} is not quantized, expected nf4"]),
    ("fp4", {"bnb_4bit_quant_type": "fp4"}, nothing, on_each_layer("has bnb_4bit_quant_type fp4, expected nf4")),
    ("no double quantization", {"bnb_4bit_use_double_quant": False}, nothing,
        on_each_layer("has bnb_4bit_use_double_quant False, expected True")),
    ("another compute dtype", {"bnb_4bit_compute_dtype": "bfloat16"}, nothing,
        on_each_layer("has bnb_4bit_compute_dtype bfloat16, expected float32")),
    ("expanded", {"storage": "expanded"}, nothing, on_each_layer("is Linear, expected Linear4bit")),
    ("another dtype", {}, norm_in_bfloat16,
        ["model.layers.1.input_layernorm.weight has dtype bfloat16, expected float32"]),
    ("another attention", {}, eager_attention, ["attention is eager, expected sdpa"]),
    ("a quantized output layer", {}, quantized_head, ["lm_head is Linear4bit, expected Linear"]),
]  # fmt: skip


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
    problems = [f"{name} is on cpu, expected cuda" for name in names[:10]]
    with pytest.raises(CheckFailed) as failure:
        verify_base(base, config.model, config.quantization, "cuda", "packed")
    more = f"... and {len(names) - 10} more"
    assert str(failure.value) == "model: not loaded as the config asks\n  " + "\n  ".join([*problems, more])


def test_a_packed_layer_in_an_expanded_base_is_named(config: Config) -> None:
    expanded = config.changed("quantization", storage="expanded").quantization
    base = base_model(config, storage="expanded")
    verify_base(base, config.model, expanded, "cpu", "expanded")
    base.model.layers[0].self_attn.q_proj = base_model(config).get_submodule(LAYER)
    with pytest.raises(CheckFailed) as failure:
        verify_base(base, config.model, expanded, "cpu", "expanded")
    problem = f"{LAYER} is Linear4bit, expected Linear"
    assert str(failure.value) == f"model: not loaded as the config asks\n  {problem}"


def test_where_torch_compile_works_nf4_is_unpacked_by_it() -> None:
    assert why_not_compiled("cpu") is None


def test_why_bitsandbytes_unpacks_without_torch_compile_is_found() -> None:
    """bitsandbytes and torch for real: without a C++ compiler, a CPU's kernel fails to build as MPS's might."""
    torch._dynamo.reset()  # else what compiled before is taken
    found = "InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx: ('/nowhere',)"
    with torch._inductor.config.patch({"cpp.cxx": ("/nowhere",)}):
        assert why_not_compiled("cpu") == found


def test_torch_compile_switched_off_is_no_compiled_unpacking() -> None:
    with torch.compiler.set_stance("force_eager"):
        assert why_not_compiled("cpu") == "it is switched off"
