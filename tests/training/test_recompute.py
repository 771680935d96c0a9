"""Some decoder layers checkpointed and others not: the same bits, whatever their number, and what a rehearsal picks."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from finetune.errors import OutOfResource
from finetune.machine import device as device_module
from finetune.machine import platforms
from finetune.plan.checkpointed_layers import Choice
from finetune.runs.manifest import fingerprint
from finetune.training import short_training
from finetune.training.trainer import Trainer
from support.rehearsals import attributes, loaded, rehearsed
from support.training import Case, adapter_weights, same

ON = ("training.gradient_checkpointing=true", "training.packing=true", "lora.lora_dropout=0.05")
AUTO = (*ON, "training.checkpointed_layers=auto")
LAYERS = 2  # of the tiny model


def first(layers: int | str) -> str:
    return f"training.checkpointed_layers={layers}"


# --- the same bits


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Every loss and every gradient of a training, and how often each layer's attention is computed."""

    def __init__(self, trainer: Trainer) -> None:
        self.recorded: list[dict[str, torch.Tensor]] = []
        self.computed = [0] * LAYERS
        for index, layer in enumerate(trainer.model.get_base_model().model.layers):
            layer.self_attn.register_forward_hook(lambda *_, index=index: self._count(index))
        trainer.add_callback(self)

    def _count(self, index: int) -> None:
        self.computed[index] += 1

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.recorded.append({name: value.grad.clone() for name, value in named if value.grad is not None})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" in logs:
            self.recorded.append({"loss": torch.tensor(logs["loss"], dtype=torch.float64)})


def recorded(case: Case, *settings: str) -> Recorder:
    steps = ("training.max_steps=3", "training.max_grad_norm=1000", "training.logging_steps=1")
    trainer = case.trainer(*ON, *steps, "quantization.storage=packed", *settings, first=False)
    recorder = Recorder(trainer)
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    trainer.train()
    return recorder


@pytest.fixture(params=["the CPU's random numbers", "random numbers apart, which torch's checkpoint does not keep"])
def drawn(request: pytest.FixtureRequest) -> Callable[[], object]:
    """What dropout draws from; called, these numbers begin anew (the CPU's do with every training)."""
    if request.param.startswith("the CPU"):
        return lambda: None
    generator: torch.Generator = request.getfixturevalue("apart")
    return lambda: generator.manual_seed(1)


def test_losses_and_gradients_have_the_same_bits_however_many_layers_are_checkpointed(
    case: Case, drawn: Callable[[], object]
) -> None:
    found = {}
    for layers in (0, 1, "all"):
        drawn()
        found[layers] = recorded(case, first(layers))
    assert {layers: recorder.computed for layers, recorder in found.items()} == {
        0: [3, 3],
        1: [6, 3],  # the first layers are computed again, the last are kept whole
        "all": [6, 6],
    }
    every = found["all"].recorded
    assert len(every) == 6 and len(every[4]) == LAYERS * 7 * 2 and all(value.any() for value in every[4].values())
    for recorder in found.values():
        assert all(same(these, those) for these, those in zip(recorder.recorded, every, strict=True))


def test_a_recomputed_layer_with_other_random_numbers_has_another_gradient(
    case: Case, apart: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch's checkpoint does by itself on a device whose module has no `_initialized`."""
    monkeypatch.setattr(platforms.Platform, "random_state_apart", False)
    found = []
    for layers in (0, "all"):
        apart.manual_seed(1)
        found.append(recorded(case, first(layers), "training.max_steps=1").recorded)
    (gradient, loss), (another, same_loss) = found
    assert same(loss, same_loss) and not same(gradient, another)


def test_a_run_goes_on_with_another_number_of_layers_to_the_same_bits(case: Case, drawn: Callable[[], object]) -> None:
    settings = (*ON, "training.save_steps=2", "training.eval_steps=2")
    drawn()
    whole, model, _ = case.train(*settings, first("all"))
    logged, weights = case.metrics(), adapter_weights(model)
    resumed, model, _ = case.train(*settings, first(1), checkpoint=case.run.checkpoints / "checkpoint-2")
    assert same(adapter_weights(model), weights)
    names = ("step", "loss", "eval_loss", "grad_norm")
    assert [[entry.get(name) for name in names] for entry in case.metrics()] == [
        [entry.get(name) for name in names] for entry in logged
    ]
    assert (resumed.eval_loss, resumed.train_loss) == (whole.eval_loss, whole.train_loss)


def test_a_checkpoint_does_not_depend_on_the_number_of_layers(case: Case) -> None:
    configs = [case.config(*ON, first(layers)) for layers in ("all", "auto", 1)]
    prints = [fingerprint(config, case.data(config)) for config in configs]
    assert prints[0] == prints[1] == prints[2]
    assert "gradient_checkpointing" in prints[0]["config"]["training"]


# --- what a rehearsal picks


def checkpointed(model: Any) -> int:
    return sum(layer.gradient_checkpointing for layer in model.get_base_model().model.layers)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers were checkpointed in each training step of a rehearsal, repeats left out."""
    seen: list[int] = []
    compute_loss = Trainer.compute_loss

    def spy(self: Trainer, model: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training and seen[-1:] != [checkpointed(model)]:
            seen.append(checkpointed(model))
        return compute_loss(self, model, *args, **kwargs)

    monkeypatch.setattr(Trainer, "compute_loss", spy)
    return seen


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tried: list[int]) -> None:
    """A device whose peak can be measured again: 1.0 GiB with both layers checkpointed, 0.4 more for each whole one."""
    monkeypatch.setattr(platforms.Platform, "peak_begins_anew", True)
    monkeypatch.setattr(short_training, "peak_held_gib", lambda _: 1.0 + 0.4 * (LAYERS - tried[-1]))
    compute_loss = Trainer.compute_loss

    def never_twice(self: Trainer, model: Any, *args: Any, **kwargs: Any) -> Any:
        return compute_loss(self, model, *args, **kwargs) * (1 + checkpointed(model))

    monkeypatch.setattr(Trainer, "compute_loss", never_twice)  # as kernels are whose sums have no order


def out_of_memory_below(monkeypatch: pytest.MonkeyPatch, layers: int) -> list[weakref.ref[Trainer]]:
    """With fewer checkpointed layers than that, memory ends in a training step; the trainers to which that happened."""
    ended: list[weakref.ref[Trainer]] = []
    compute_loss = Trainer.compute_loss

    def full(self: Trainer, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(self, model, *args, **kwargs)
        if model.training and checkpointed(model) < layers:
            ended.append(weakref.ref(self))
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss

    monkeypatch.setattr(Trainer, "compute_loss", full)
    return ended


def test_on_a_gpu_what_torch_holds_is_measured_and_a_cpu_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "max_memory_reserved", lambda: 70 * 2**30)
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda: 60 * 2**30)
    rows = platforms.PLATFORMS
    for name in ("h100", "m4"):
        assert (device_module.peak_held_gib(rows[name]), device_module.peak_memory_gib(rows[name])) == (70, 60)
    assert device_module.peak_held_gib(rows["cpu"]) == device_module.peak_memory_gib(rows["cpu"])
    assert {name: row.peak_begins_anew for name, row in rows.items()} == {"h100": True, "m4": True, "cpu": False}


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    ("capacity_gib", "choice", "trials"),
    [
        (2.2, Choice(0, "0 of 2: peak 1.8 GiB measured, at most 2.0 of 2.2 (1.0 with 2, 1.4 with 1, 1.8 with 0)"),
            [2, 1, 0]),
        (1.9, Choice(1, "1 of 2: peak 1.4 GiB measured, at most 1.7 of 1.9 (1.0 with 2, 1.4 with 1)"), [2, 1]),
        (1.4, Choice(2, "2 of 2: peak 1.0 GiB measured, at most 1.3 of 1.4 (1.0 with 2, 1.4 with 1)"), [2, 1]),
    ],
)  # fmt: skip
def test_a_rehearsal_measures_and_picks_the_fewest_layers_within_the_budget(
    case: Case,
    tried: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capacity_gib: float,
    choice: Choice,
    trials: list[int],
) -> None:
    monkeypatch.setattr(short_training, "peak_memory_gib", lambda _: 0.5)  # allocated, of what is held
    config = case.config(*AUTO)
    model = loaded(config)
    before, weights = attributes(model), adapter_weights(model)
    found = rehearsed(case, config, model, capacity_gib)
    assert (found.checkpointed, tried) == (choice, trials)
    assert attributes(model)[:-3] == before[:-3]
    assert same(adapter_weights(model), weights)


@pytest.mark.usefixtures("device")
def test_memory_that_ends_in_a_trial_is_told_given_back_and_no_reason_to_refuse(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = out_of_memory_below(monkeypatch, 1)
    alive: list[int] = []
    load_back = short_training.Stage.load_back

    def watched(self: Any, watch: Any) -> None:
        alive.append(sum(trainer() is not None for trainer in ended))
        load_back(self, watch)

    monkeypatch.setattr(short_training.Stage, "load_back", watched)
    config = case.config(*AUTO)
    gc.disable()  # what is left of the ended trial has to be gone without luck
    try:
        found = rehearsed(case, config, loaded(config))
    finally:
        gc.enable()
    text = "1 of 2: peak 1.4 GiB measured, at most 900.0 of 1000.0 (1.0 with 2, 1.4 with 1, out of memory with 0)"
    assert found.checkpointed == Choice(1, text)
    assert (len(ended), alive) == (1, [0])


@pytest.mark.usefixtures("device")
def test_a_trial_that_takes_more_than_there_is_counts_as_one_in_which_memory_ended(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = iter([0.0, 1.0, 0.0, 5.0])  # before and after each trial
    monkeypatch.setattr(short_training, "peak_memory_gib", lambda _: next(peaks))
    config = case.config(*AUTO)
    found = rehearsed(case, config, loaded(config), capacity_gib=4.0)
    text = "2 of 2: peak 1.0 GiB measured, at most 3.6 of 4.0 (1.0 with 2, out of memory with 1)"
    assert found.checkpointed == Choice(2, text)


def test_on_a_cpu_the_formula_decides_and_says_that_nothing_can_be_measured_twice(case: Case, tried: list[int]) -> None:
    config = case.config(*AUTO)
    found = rehearsed(case, config, loaded(config))
    why = "the resident peak of a process cannot be measured twice"
    text = f"0 of 2: 1.8 GiB expected by the formula alone, at most 900.0 of 1000.0; {why}"
    assert (found.checkpointed, tried) == (Choice(0, text), [0])


def test_where_memory_ends_with_what_the_formula_says_all_layers_are_checkpointed(
    case: Case, monkeypatch: pytest.MonkeyPatch, tried: list[int]
) -> None:
    out_of_memory_below(monkeypatch, 2)
    config = case.config(*AUTO)
    found = rehearsed(case, config, loaded(config))
    assert (found.checkpointed, tried) == (Choice(2, "2 of 2: out of memory with the 0 of the formula"), [0, 2])


@pytest.mark.parametrize("anew", [True, False])
def test_where_memory_ends_with_all_layers_checkpointed_the_run_is_refused(
    case: Case, monkeypatch: pytest.MonkeyPatch, anew: bool
) -> None:
    monkeypatch.setattr(platforms.Platform, "peak_begins_anew", anew)
    out_of_memory_below(monkeypatch, LAYERS + 1)
    config = case.config(*AUTO)
    with pytest.raises(OutOfResource, match=r"^rehearsal: out of memory: CUDA out of memory"):
        rehearsed(case, config, loaded(config))


def test_a_number_is_rehearsed_as_it_is_and_where_it_is_too_much_all_are_advised(
    case: Case, monkeypatch: pytest.MonkeyPatch, tried: list[int]
) -> None:
    config = case.config(*ON, first(1), "training.per_device_eval_batch_size=1")
    assert rehearsed(case, config, loaded(config)).checkpointed == Choice(1)
    assert tried == [1]
    out_of_memory_below(monkeypatch, 2)
    with pytest.raises(OutOfResource) as refused:
        rehearsed(case, config, loaded(config))
    assert str(refused.value).splitlines()[1].startswith("  --set training.checkpointed_layers=all")
