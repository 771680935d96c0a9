"""Compiled norms, SwiGLU and rotary embedding compute what transformers' do, in training alone; compiling is slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers.models.mistral import modeling_mistral

from finetune.config.schema import Config
from finetune.errors import CheckFailed
from finetune.model import fused_kernels
from support.steps import BFLOAT16, checkpointings, distance, in_training, loss_and_gradients, settings
from support.training import Case, adapter_weights, same

TOLERANCE = 5e-6  # relative, float32: sums in another order, and other exponentials


def with_kernels(config: Config) -> PeftModel:
    model = in_training(config, fused=False)
    fused_kernels.install(model, config.training.bf16)
    return model


def recorded_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The compiled functions that are called from now on, by name."""
    calls: list[str] = []
    for name in ("norm", "swiglu", "rotate"):
        compiled = getattr(fused_kernels, name)

        def call(*values: Any, name: str = name, compiled: Any = compiled) -> Any:
            calls.append(name)
            return compiled(*values)

        monkeypatch.setattr(fused_kernels, name, call)
    return calls


@pytest.mark.slow
@checkpointings
def test_loss_and_all_gradients_are_those_of_transformers_own(
    tiny_mistral: Path, checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tiny_mistral, "lora.lora_dropout=0", f"training.gradient_checkpointing={checkpointing}")
    wanted = loss_and_gradients(in_training(config, fused=False), config)
    model = with_kernels(config)
    calls = recorded_calls(monkeypatch)
    found = loss_and_gradients(model, config)
    assert distance(found, wanted) < TOLERANCE
    again = 2 if checkpointing == "true" else 1
    first = checkpointing == "false"  # the first norm's input then has no gradient, and transformers' own runs
    assert {name: calls.count(name) for name in ("norm", "swiglu", "rotate")} == {
        "norm": 4 * again + 1 - first,
        "swiglu": 2 * again,
        "rotate": 2 * again,
    }


@pytest.mark.slow
def test_in_bfloat16_it_is_no_further_from_float32_than_transformers_own(tiny_mistral: Path) -> None:
    exact = settings(tiny_mistral, "lora.lora_dropout=0")
    wanted = loss_and_gradients(in_training(exact, fused=False), exact)
    config = settings(tiny_mistral, "lora.lora_dropout=0", *BFLOAT16)
    own = loss_and_gradients(in_training(config, fused=False), config)
    found = loss_and_gradients(with_kernels(config), config)
    assert 0.001 < distance(own, wanted) < 0.1
    assert distance(found, wanted) < 1.1 * distance(own, wanted)


@pytest.mark.slow
def test_evaluation_and_answers_go_transformers_own_way(tiny_mistral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_kernels(settings(tiny_mistral))
    calls = recorded_calls(monkeypatch)
    ids = torch.tensor([[5, 6, 7]])
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    assert calls == []


@pytest.mark.slow
def test_other_models_of_the_process_are_left_alone(tiny_mistral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(tiny_mistral)
    with_kernels(config)
    calls = recorded_calls(monkeypatch)
    loss_and_gradients(in_training(config, fused=False), config)
    assert calls == []
    assert modeling_mistral.apply_rotary_pos_emb is fused_kernels.rotate_plain


@pytest.mark.slow
@pytest.mark.parametrize("precision", [(), BFLOAT16], ids=["float32", "bfloat16"])
@checkpointings
def test_a_training_compiles_nothing_whatever_the_lengths_of_its_batches(
    case: Case, checkpointing: str, precision: tuple[str, ...]
) -> None:
    keys = "training.fused_kernels=true", f"training.gradient_checkpointing={checkpointing}"
    trainer = case.trainer(*keys, *precision)
    lengths = []
    trainer.model.register_forward_pre_hook(
        lambda _, __, inputs: lengths.append(inputs["input_ids"].shape), with_kwargs=True
    )
    with torch.compiler.set_stance("fail_on_recompile"):
        trainer.train()
    assert len(set(lengths)) > 2


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(case: Case) -> None:
    keys = (
        *("training.fused_kernels=true", "training.fused_lora=true", "training.gradient_checkpointing=true"),
        *("training.eval_steps=2", "training.save_steps=2", "training.load_best_model_at_end=false"),
    )
    _, whole, _ = case.train(*keys)
    torch._dynamo.reset()  # a new process has compiled nothing yet
    _, resumed, _ = case.train(*keys, checkpoint=case.run.checkpoints / "checkpoint-2")
    assert same(adapter_weights(whole), adapter_weights(resumed))


def test_without_a_compiler_the_run_is_refused_with_the_setting_that_does_without(
    tiny_mistral: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = in_training(settings(tiny_mistral), fused=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    # torch's own patch: pytest's would leave its settings without this one.
    with torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",)}), pytest.raises(CheckFailed) as caught:
        fused_kernels.install(model, bf16=False)
    assert str(caught.value) == (
        "fused kernels: torch.compile fails: InvalidCxxCompiler: No working C++ compiler found in "
        "torch._inductor.config.cpp.cxx: ('/nowhere/g++',)\n"
        "to train without them: --set training.fused_kernels=false"
    )


@pytest.mark.slow
def test_where_a_compiler_fails_the_run_is_refused_with_its_own_error(
    tiny_mistral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise RuntimeError("error: no such instruction\n  in line 7")

    model = in_training(settings(tiny_mistral), fused=False)
    monkeypatch.setattr(fused_kernels, "swiglu", torch.compile(lambda gate, up: gate * up, backend=failing))
    with pytest.raises(CheckFailed) as caught:
        fused_kernels.install(model, bf16=False)
    assert str(caught.value) == (
        "fused kernels: torch.compile fails: RuntimeError: error: no such instruction\n"
        "to train without them: --set training.fused_kernels=false"
    )


def test_a_model_of_another_kind_is_refused(tiny_mistral: Path) -> None:
    model = in_training(settings(tiny_mistral), fused=False)
    model.config.hidden_act = "gelu"
    with pytest.raises(CheckFailed) as caught:
        fused_kernels.install(model, bf16=False)
    assert str(caught.value) == (
        "fused kernels: a mistral model with gelu, expected mistral with silu; "
        "to train without them: --set training.fused_kernels=false"
    )
