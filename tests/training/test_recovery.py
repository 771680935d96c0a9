"""Memory that runs out in a micro-batch: the step is computed again with more layers checkpointed, to the same bits."""

from __future__ import annotations

import gc
import os
import random
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.errors import OutOfResource, Stopped
from finetune.files import read_seal
from finetune.machine import device
from finetune.training import recovery
from finetune.training.trainer import Trainer
from support.training import Case
from support.whole_trainings import ended

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which ..."
SETTINGS = (
    "training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=4", "training.max_steps=4",
    "training.eval_steps=4", "training.save_steps=4", "training.save_minutes=null", "training.logging_steps=2",
    "training.gradient_checkpointing=true", "training.checkpointed_layers=0", "training.packing=true",
    "lora.lora_dropout=0.2", "model.max_seq_length=128",
)  # fmt: skip
STEPS = [1, 1, 1, 1, 2, 2, 2, 2, 3, 4, 4, 4, 4]  # of each micro-batch: an epoch ends with the ninth


class Memory:
    """Runs out in those of a training's micro-batches whose numbers are given, in one of PLACES of each.

    The numbers count every attempt, from 1. What the failing frame held has to be gone when the next attempt begins.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, runs_out: dict[int, str]) -> None:
        self.runs_out, self.steps = runs_out, list[int]()  # of each attempt so far
        self.held: Callable[[], Any] = lambda: None
        self.acts: Callable[[int], None] = lambda _: None
        compute_loss = Trainer.compute_loss

        def counted(trainer: Trainer, model: Any, *args: Any, **kwargs: Any) -> Any:
            if not model.training:
                return compute_loss(trainer, model, *args, **kwargs)
            self.steps.append(trainer.state.global_step + 1)
            assert self.held() is None
            self.acts(len(self.steps))
            place = self.runs_out.get(len(self.steps))
            if place == "before the forward":
                self._end()
            loss = compute_loss(trainer, model, *args, **kwargs)
            if place == "after the forward":
                self._end()
            if place == "in the backward":  # the last layer's gradients are added by then, the first's are not
                loss.register_hook(lambda gradient: self._arm(trainer.model) or gradient)
            return loss

        monkeypatch.setattr(Trainer, "compute_loss", counted)

    def _arm(self, model: Any) -> None:
        first = next(value for name, value in model.named_parameters() if "layers.0" in name and value.requires_grad)
        handle = first.register_hook(lambda _: (handle.remove(), self._end()))

    def _end(self) -> None:
        tensor = torch.zeros(1)
        self.held = weakref.ref(tensor)
        raise torch.OutOfMemoryError(MESSAGE)


PLACES = BEFORE, AFTER, BACKWARD = "before the forward", "after the forward", "in the backward"


def undisturbed(case: Case, *settings: str) -> dict[str, Any]:
    return ended(case, *case.train(*SETTINGS, *settings)[:2])


def later(case: Case, name: str) -> Case:
    return Case(case.base, Path(case.train_file), case.folder / name, case.tokenizer)


def disturbed(case: Case, runs_out: dict[int, str], *settings: str) -> tuple[dict[str, Any], list[int]]:
    """What such a run ends with, and the step of each of its attempts."""
    with pytest.MonkeyPatch.context() as patch:
        memory = Memory(patch, runs_out)
        outcome, model, printed = case.train(*SETTINGS, *settings)
    assert [line for line in printed.splitlines() if "memory" in line] == [sentence for _, sentence in case.ran_out]
    return ended(case, outcome, model), memory.steps


@pytest.mark.parametrize(
    "fused", [pytest.param("false", id="PEFT's LoRA", marks=pytest.mark.slow), pytest.param("true", id="fused LoRA")]
)
def test_memory_that_runs_out_in_any_micro_batch_changes_no_bit_of_the_run(case: Case, fused: str) -> None:
    lora, chance = f"training.fused_lora={fused}", random.Random(fused)
    whole = undisturbed(case, lora)
    anywhere = chance.randrange(2, len(STEPS))
    for number in (anywhere,) if fused == "true" else (1, anywhere, len(STEPS)):
        again, place = later(case, str(number)), chance.choice(PLACES)
        found, steps = disturbed(again, {number: place}, lora)
        assert found == whole, (number, place)
        step = STEPS[number - 1]
        assert steps == sorted([*STEPS, *STEPS[STEPS.index(step) : number]]), (number, place)
        text = (
            f"checkpointed layers: 1 of 2 from step {step} on, which is computed again; "
            "with 0 memory ran out (CUDA out of memory. Tried to allocate 2.00 GiB)"
        )
        assert again.ran_out == [(1, text)]
        assert read_seal(again.run.checkpoints / "checkpoint-4")["used"]["checkpointed_layers"] == 1


@pytest.mark.slow
def test_memory_may_run_out_again_in_the_same_step_and_in_a_later_one(case: Case) -> None:
    whole = undisturbed(case)
    gc.disable()  # what the first error held has to be gone without luck
    try:
        for runs_out in ({7: BACKWARD, 8: AFTER}, {2: BACKWARD, 14: BACKWARD}):
            again = later(case, str(runs_out))
            assert disturbed(again, runs_out)[0] == whole, runs_out
            assert [layers for layers, _ in again.ran_out] == [1, 2]
    finally:
        gc.enable()


@pytest.mark.slow
def test_a_devices_own_random_numbers_begin_the_step_again(
    case: Case, apart: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed: list[Any] = []
    monkeypatch.setattr(recovery, "free_cache", freed.append)
    apart.manual_seed(1)
    whole = undisturbed(case)
    apart.manual_seed(1)
    assert disturbed(later(case, "again"), {7: BACKWARD})[0] == whole
    assert [platform.name for platform in freed] == ["m4"]


@pytest.mark.parametrize(
    ("setting", "ends_in"),
    [
        ("training.checkpointed_layers=all", {3: BACKWARD}),
        ("training.checkpointed_layers=1", {3: BACKWARD, 5: AFTER}),
        ("training.gradient_checkpointing=false", {3: BEFORE}),
    ],
)
def test_where_no_more_layers_can_be_checkpointed_the_run_ends(
    case: Case, monkeypatch: pytest.MonkeyPatch, setting: str, ends_in: dict[int, str]
) -> None:
    memory = Memory(monkeypatch, ends_in)
    settings = [*SETTINGS, "training.checkpointed_layers=all", setting]
    with pytest.raises(OutOfResource) as end, device.memory_errors_explained("what would fit: ..."):
        case.train(*settings)
    assert (str(end.value), end.value.exit_code) == (f"out of memory: {MESSAGE}\nwhat would fit: ...", 6)
    assert len(memory.steps) == max(ends_in)


def test_another_error_ends_the_run_as_it_is(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(number: int) -> None:
        if number == 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    memory = Memory(monkeypatch, {})
    memory.acts = wrong
    with pytest.raises(RuntimeError, match="illegal memory access"):
        case.train(*SETTINGS)
    assert (len(memory.steps), case.ran_out) == (3, [])


def test_memory_that_runs_out_in_an_evaluation_or_the_optimizer_ends_the_run(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runs_out(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError(MESSAGE)

    for name, owner in (("prediction_step", Trainer), ("step", torch.optim.AdamW)):
        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(owner, name, runs_out)
            later(case, name).train(*SETTINGS)


@pytest.mark.slow
def test_a_signal_after_memory_ran_out_ends_the_run_and_a_resume_has_the_same_bits(case: Case) -> None:
    whole = undisturbed(case)
    for number, step in ((8, 1), (13, 3)):  # in the step that is computed again, and in a later one
        stopped = later(case, str(number))
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped) as stop:
            memory = Memory(patch, {6: BACKWARD})
            memory.acts = lambda attempt, number=number: attempt == number and os.kill(os.getpid(), signal.SIGTERM)
            stopped.train(*SETTINGS)
        assert str(stop.value) == f"stopped by SIGTERM at step {step}; the same command resumes from checkpoint-{step}"
        resumed = stopped.train(*SETTINGS, checkpoint=stopped.run.checkpoints / f"checkpoint-{step}")
        assert ended(stopped, *resumed[:2]) == whole
