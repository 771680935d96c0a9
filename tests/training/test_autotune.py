"""`auto` for the fused paths: what a rehearsal tries, what it takes and refuses, and that a resumed run keeps it."""

from __future__ import annotations

import itertools
import re
import shutil
from dataclasses import replace
from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune.config.schema import Config
from finetune.files import seal_facts
from finetune.machine import platforms
from finetune.model import fused_kernels, fused_lora
from finetune.plan.automatic import in_words, used
from finetune.plan.model_shape import read_geometry
from finetune.runs.resume import decide
from finetune.terminal import Terminal
from finetune.training import autotune
from finetune.training.autotune import Variant
from finetune.training.job import Job
from finetune.training.rehearsal import look_ahead, rehearse
from finetune.training.trainer import Trainer, train
from finetune.wording import Report
from support.rehearsals import PLENTY_GIB, attributes, loaded, rehearsed
from support.steps import BFLOAT16
from support.training import FINGERPRINT, Case, adapter_weights, same

ON = ("training.gradient_checkpointing=true", "training.packing=true", "lora.lora_dropout=0.05")
LORA = (*ON, "training.fused_lora=auto")
KERNELS = (*ON, "training.fused_kernels=auto")
PLAIN_NAME, LORA_NAME, KERNELS_NAME = (
    f"{name}; 2 of 2 layers checkpointed" for name in ("plain", "fused LoRA", "fused kernels")
)
COMPARED = "baseline"


@pytest.fixture(autouse=True)
def seconds(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Of a micro-batch, by the way it is computed: a stop-watch on a busy machine would make the tests a lottery."""
    times = {"plain": 1.0, "fused LoRA": 0.8, "fused kernels": 0.9, "fused kernels and fused LoRA": 0.7}
    measure = autotune.measure

    def timed(stage: Any) -> Any:
        passes = measure(stage)
        assert 0 < passes.seconds < float("inf")
        passes.seconds = times[in_words(used(stage.config, stage.job.geometry))]
        return passes

    monkeypatch.setattr(autotune, "measure", timed)
    return times


def computed(config: Config) -> str:
    return in_words(used(config, read_geometry(config)))


def why_not(case: Case, *settings: str) -> str:
    """Why the one fused path of `settings` is not used; the run then goes the plain way, and the model is as before."""
    config = case.config(*settings)
    model = loaded(config)
    before, weights = attributes(model), adapter_weights(model)
    found = rehearsed(case, config, model)
    assert computed(found.config) == "plain"
    assert attributes(model)[:-3] == before[:-3] and same(adapter_weights(model), weights)
    plain, other = found.variants
    assert (plain.name, plain.verdict) == (PLAIN_NAME, f"{COMPARED}; used")
    return other.verdict


# --- what is taken


@pytest.mark.parametrize(
    "precision", [pytest.param((), id="float32"), pytest.param(BFLOAT16, id="bfloat16", marks=pytest.mark.slow)]
)
def test_a_path_that_is_right_and_faster_is_used_and_the_table_says_so(case: Case, precision: tuple[str, ...]) -> None:
    config = case.config(*LORA, *precision)
    found = rehearsed(case, config, loaded(config))
    assert found.config == config.changed("training", fused_lora=True)
    plain, fused = found.variants
    tokens = plain.tokens_per_second
    assert found.variants == (
        Variant(PLAIN_NAME, tokens, None, COMPARED),  # no GiB: a process's peak is not measured twice
        Variant(LORA_NAME, pytest.approx(tokens / 0.8, abs=0.1), None, "25 % faster; used"),
    )
    assert found.as_dict()["variants"][1]["verdict"] == "25 % faster; used"
    assert fused.row() == (LORA_NAME, f"{fused.tokens_per_second:>6,.0f} tokens/s            25 % faster; used")


def test_each_variant_that_is_tried_is_reported_with_its_seconds_and_peak(case: Case) -> None:
    config, said = case.config(*LORA), list[str]()
    job = Job(case.run, config, case.data(config), loaded(config), case.tokenizer, Report(said.append))
    rehearse(job, case.run.folder / "rehearsal", PLENTY_GIB)
    figures = [re.sub(r"in \d+ s, peak \d+\.\d GiB$", "in N s, peak N GiB", line) for line in said]
    tried = PLAIN_NAME, LORA_NAME, LORA_NAME
    expected = [line for name in tried for line in (f"rehearsing {name}", f"rehearsed {name} in N s, peak N GiB")]
    assert figures == [*expected, "rehearsing a resume from its checkpoint"]


def test_the_row_of_a_device_that_measures_again_has_gib() -> None:
    row = Variant("plain; 32 of 32 layers checkpointed", 7900.4, 13.41, "used").row()
    assert row == ("plain; 32 of 32 layers checkpointed", " 7,900 tokens/s  13.4 GiB  used")


@pytest.mark.slow
def test_true_and_false_are_not_tried_away(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "measure", lambda _: pytest.fail("tried"))
    for value in (True, False):
        config = case.config(*ON, f"training.fused_lora={str(value).lower()}")
        found = rehearsed(case, config, loaded(config))
        assert found.config == config
        assert [variant.verdict for variant in found.variants] == ["used"]


@pytest.mark.slow
def test_both_paths_are_tried_together_and_must_be_faster_than_either(case: Case) -> None:
    config = case.config(*LORA, *KERNELS)
    found = rehearsed(case, config, loaded(config))
    assert [variant.verdict for variant in found.variants] == [
        COMPARED,
        "11 % faster",
        "25 % faster",
        "14 % faster than fused LoRA; used",
    ]
    assert computed(found.config) == "fused kernels and fused LoRA"


# --- what is not, and why


def test_a_path_that_is_hardly_faster_is_not_used(case: Case, seconds: dict[str, float]) -> None:
    seconds["fused LoRA"] = 0.98
    assert why_not(case, *LORA) == "not used: 2 % faster, 3 % expected"
    seconds["fused LoRA"] = 1.25
    assert why_not(case, *LORA) == "not used: 20 % slower, 3 % expected"


def test_a_path_that_does_not_compile_is_not_used(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise RuntimeError("error: no such instruction")

    for name in ("norm", "swiglu"):
        compiled = torch.compile(lambda left, *_: left + 1, backend=failing)
        monkeypatch.setattr(fused_kernels, name, compiled)
    found = why_not(case, *KERNELS)
    assert found == "not used: fused kernels: torch.compile fails: RuntimeError: error: no such instruction"


def test_where_a_platform_cannot_compile_it_is_said_and_nothing_tried(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(platforms.PLATFORMS, "cpu", replace(platforms.PLATFORMS["cpu"], compiles=False))
    monkeypatch.setattr(autotune, "measure", lambda _: pytest.fail("tried"))
    config = case.config(*KERNELS)
    kernels, plain = rehearsed(case, config, loaded(config)).variants
    assert kernels == Variant("fused kernels", None, None, "not used: does not work on CPU only (cpu)")
    assert (plain.name, plain.verdict) == (PLAIN_NAME, "used")


def broken(monkeypatch: pytest.MonkeyPatch, changed: Any) -> None:
    """Fused LoRA with a fault: `changed` gets a layer and what it would compute."""
    right = fused_lora._forward
    monkeypatch.setattr(fused_lora, "_forward", lambda layer, *given: changed(layer, lambda: right(layer, *given)))


def test_a_path_with_another_loss_is_not_used(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, lambda _layer, compute: compute() * 1.01)
    text = r"not used: the loss differs from plain by [\d.e-]+ of it, at most 1e-05"
    assert re.fullmatch(text, why_not(case, *LORA))


class HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def backward(_ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient / 2


def test_a_path_with_another_gradient_is_not_used_also_where_the_loss_is_the_same(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch, lambda _layer, compute: HalfGradient.apply(compute()))
    text = r"not used: the gradients differ from plain by 0\.\d+ of them, at most 0.0001"
    assert re.fullmatch(text, why_not(case, *LORA))


@pytest.mark.slow
def test_the_gradients_of_a_new_adapter_are_compared_where_b_is_not_zero(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start B is 0, and so are all gradients of A, right or wrong."""

    def without_a(layer: Any, compute: Any) -> torch.Tensor:
        weight = layer.lora_A["default"].weight
        layer.lora_A["default"].weight.requires_grad_(False)
        try:
            return compute() + 0 * weight.sum()
        finally:
            weight.requires_grad_(True)

    broken(monkeypatch, without_a)
    assert why_not(case, *LORA).startswith("not used: the gradients differ from plain by ")


@pytest.mark.slow
def test_a_path_that_leaves_dropout_out_is_not_used(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(layer: Any, compute: Any) -> torch.Tensor:
        noise = layer.lora_dropout["default"]
        noise.p, probability = 0.0, noise.p
        try:
            return compute()
        finally:
            noise.p = probability

    broken(monkeypatch, without)
    text = r"not used: dropout keeps 1\.0000 of its inputs, expected 0\.9500 within 0\.00\d+"
    assert re.fullmatch(text, why_not(case, *LORA))


@pytest.mark.slow
def test_a_path_whose_dropout_is_another_where_a_layer_is_computed_again_is_not_used(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = itertools.count()

    def drawn_anew(_layer: Any, compute: Any) -> torch.Tensor:
        torch.manual_seed(next(seeds))
        return compute()

    broken(monkeypatch, drawn_anew)
    text = r"not used: dropout differs in a recomputed layer: the gradient of \S+ differs by 0\.\d+ of it"
    assert re.fullmatch(text, why_not(case, *LORA))


@pytest.mark.slow
def test_a_path_whose_gradient_has_other_noise_than_its_result_is_not_used(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def apart(_layer: Any, compute: Any) -> torch.Tensor:
        result, gradient = compute(), compute()
        found: torch.Tensor = result.detach() + (gradient - gradient.detach())
        return found

    broken(monkeypatch, apart)
    assert why_not(case, *LORA) == "not used: dropout differs in the backward pass"


@pytest.mark.slow
def test_a_path_that_runs_out_of_memory_is_not_used(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    broken(monkeypatch, full)
    found = why_not(case, *LORA)
    assert found == "not used: out of memory: CUDA out of memory. Tried to allocate 2.00 GiB."


# --- the choice belongs to the run


def started(case: Case, config: Config) -> tuple[str, Any]:
    """What one start of a run of four steps said, and its outlook; the model is trained from the newest checkpoint."""
    said = StringIO()
    terminal = Terminal(stream=said)
    job = Job(case.run, config, case.data(config), loaded(config), case.tokenizer)
    decision = decide(case.run.checkpoints, FINGERPRINT)
    outlook = look_ahead(job, decision, 4, False, terminal)
    made = outlook.job.trainer(decision.checkpoint, SimpleNamespace(all=lambda: []))
    facts = {"fingerprint": FINGERPRINT, "used": outlook.used}
    watchers = outlook.job.watchers(facts, outlook.pace, [], None, terminal)
    train(made, config.training, watchers, 4, decision.checkpoint)
    return said.getvalue(), outlook


SAVES = ("training.save_steps=2", "training.eval_steps=2", "dataset.sample_prompts=[]")
USED = {"fused_kernels": False, "fused_lora": True, "checkpointed_layers": 2}


def test_a_resumed_run_keeps_what_it_began_with_untried_and_ends_with_the_same_bits(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = case.config(*LORA, *SAVES)
    said, outlook = started(case, config)
    assert outlook.used == USED
    assert f"  {LORA_NAME}  " in said and "25 % faster; used\n" in said
    whole = adapter_weights(outlook.job.model)
    for folder in ("checkpoint-2", "checkpoint-4", "best"):
        assert seal_facts(case.run.checkpoints / folder)["used"] == USED
    shutil.rmtree(case.run.checkpoints / "checkpoint-4")
    monkeypatch.setattr(autotune, "measure", lambda _: pytest.fail("tried again"))
    said, outlook = started(case, config)
    assert said.splitlines()[0] == "fused paths: fused LoRA, as before in this run"
    assert outlook.used == USED and outlook.rehearsal is not None
    assert [variant.verdict for variant in outlook.rehearsal.variants] == ["used"]
    assert same(adapter_weights(outlook.job.model), whole)


@pytest.mark.slow
def test_a_smaller_card_checkpoints_more_layers_and_ends_with_the_same_bits(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = case.config(*LORA, *SAVES, "training.checkpointed_layers=auto")
    said, outlook = started(case, config)
    assert outlook.used == {**USED, "checkpointed_layers": 0}
    whole = adapter_weights(outlook.job.model)
    shutil.rmtree(case.run.checkpoints / "checkpoint-4")
    compute_loss = Trainer.compute_loss

    def smaller(self: Trainer, model: Any, *args: Any, **kwargs: Any) -> Any:
        layers = model.get_base_model().model.layers
        if model.training and not all(layer.gradient_checkpointing for layer in layers):
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return compute_loss(self, model, *args, **kwargs)

    monkeypatch.setattr(Trainer, "compute_loss", smaller)
    said, outlook = started(case, config)
    why = "out of memory with the 0 used before; the results stay the same"
    assert f"checkpointed layers: 2 of 2; {why}\n" in said
    assert outlook.used == USED
    assert same(adapter_weights(outlook.job.model), whole)


def test_without_a_rehearsal_a_new_run_goes_the_plain_way_and_a_resumed_one_its_own(case: Case) -> None:
    config, said = case.config(*LORA), StringIO()
    job = Job(case.run, config, case.data(config), loaded(config), case.tokenizer)
    decision = decide(case.run.checkpoints, FINGERPRINT)
    outlook = look_ahead(job, decision, 4, True, Terminal(stream=said))
    assert outlook.used == {**USED, "fused_lora": False}
    assert said.getvalue() == "fused paths: none; the rehearsal, which would try them, is skipped\n"
    said = StringIO()
    outlook = look_ahead(job, replace(decision, used=USED), 4, True, Terminal(stream=said))
    assert outlook.used == USED
    assert said.getvalue() == "fused paths: fused LoRA, as before in this run\n"
