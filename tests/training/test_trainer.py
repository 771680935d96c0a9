"""What the trainer adds to TRL's: exact evaluation, fp32 adapters, the best adapter kept, clear stops."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import load_peft_weights
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerFast,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers import Trainer as TransformersTrainer
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from finetune.errors import DiskFull, Diverged, Stopped
from finetune.machine.platforms import PLATFORMS
from finetune.model.load import load_base
from finetune.model.lora import add_lora
from finetune.plan.schedule import Pace
from finetune.runs.checkpoints import read_seal, saved
from finetune.runs.folder import Run
from finetune.runs.outcome import Outcome
from finetune.terminal import Terminal
from finetune.training import progress as progress_module
from finetune.training import trainer as trainer_module
from finetune.training.arguments import training_arguments
from finetune.training.keeper import Keeper
from finetune.training.progress import Progress
from finetune.training.stopper import EvaluationStopped, Stopper
from finetune.training.trainer import Trainer, evaluates_first, is_over
from support.training import FINGERPRINT, Case, adapter_weights, same

# --- steps


def test_the_operations_of_a_batch_are_those_that_transformers_counts_and_the_parameters_are_counted_once(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = case.trainer()
    batches = [{"input_ids": torch.zeros(rows, 7, dtype=torch.long)} for rows in (1, 3)]
    wanted = [TransformersTrainer.floating_point_ops(trainer, batch) for batch in batches]
    counted: list[int] = []
    count = trainer.model.num_parameters
    monkeypatch.setattr(trainer.model, "num_parameters", lambda **how: counted.append(1) or count(**how))
    assert [trainer.floating_point_ops(batch) for batch in batches] == wanted
    assert (wanted[0] > 0, len(counted)) == (True, 1)


# --- evaluation


def spread_logits(base: Any) -> None:
    """Losses of rows then differ by much more than rounding, and so does a mean of batch means."""
    base.lm_head.weight.data *= 50


def test_eval_loss_is_the_mean_over_tokens_whatever_the_batch_size(case: Case) -> None:
    found = {}
    for size in (1, 3, 8):
        trainer = case.trainer(f"training.per_device_eval_batch_size={size}", change=spread_logits)
        found[size] = trainer.evaluate()["eval_loss"]
    rows = case.data(case.config()).validation
    assert len(rows.lengths) > 8
    assert len(rows.lengths) % 3 or len(rows.lengths) % 8
    loss_sum, tokens, means = 0.0, 0, []
    with torch.no_grad():
        for index in range(len(rows.lengths)):
            _, ids, labels = (torch.tensor(value) for value in rows.row(index))
            logits = trainer.model.eval()(input_ids=ids[None].long()).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, labels[1:].long(), reduction="none", ignore_index=-100)
            loss_sum, tokens = loss_sum + losses.sum().item(), tokens + int((labels[1:] != -100).sum())
            means.append(losses.sum().item() / int((labels[1:] != -100).sum()))
    wanted = loss_sum / tokens
    assert found == {size: pytest.approx(wanted, rel=1e-6) for size in (1, 3, 8)}
    assert abs(sum(means) / len(means) - wanted) > 1e-3 * wanted  # a mean over rows would be another number


def test_evaluation_counts_its_rows_and_leaves_the_adapter_alone(case: Case) -> None:
    trainer = case.trainer()
    before = adapter_weights(trainer.model)
    output = trainer.evaluation_loop(trainer.get_eval_dataloader(), "")
    assert output.num_samples == len(case.data(case.config()).validation.lengths)
    assert list(output.metrics) == ["eval_loss"]
    assert same(before, adapter_weights(trainer.model))


# --- fp32 adapters


def test_making_a_trainer_leaves_the_adapter_weights_as_they_were_in_fp32(case: Case) -> None:
    config = case.config()
    base = load_base(config.model, config.quantization, "cpu")
    fresh = adapter_weights(add_lora(base, config.lora, config.training.seed))
    after = adapter_weights(case.trainer().model)
    assert {value.dtype for value in after.values()} == {torch.float32}
    assert same(fresh, after)


def test_only_one_gpu_is_used_however_many_are_in_sight(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def eight(self: TrainingArguments) -> torch.device:
        self._n_gpu = 8
        return torch.device("cpu")

    monkeypatch.setattr(TrainingArguments, "_setup_devices", property(eight))
    assert training_arguments(case.config().training, case.run, [], PLATFORMS["cpu"], True).n_gpu == 1


# --- the keeper


class Adapter:
    """Saves its text where a PeftModel would save its weights."""

    def __init__(self, text: str) -> None:
        self.text = text

    def parameters(self) -> list[Any]:
        return []

    def save_pretrained(self, folder: Path, save_embedding_layers: bool) -> None:
        assert save_embedding_layers is False  # PEFT would ask the Hub
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_text(self.text)


def evaluated(keeper: Keeper, step: int, loss: float, stopping: bool = False) -> Any:
    """What the keeper makes of control after an evaluation."""
    control = SimpleNamespace(should_save=False, should_training_stop=stopping)
    state = SimpleNamespace(global_step=step)
    keeper.on_evaluate(None, state, control, {"eval_loss": loss}, model=Adapter(f"weights of step {step}"))
    return control


@pytest.fixture
def keeper(tmp_path: Path) -> Keeper:
    run = Run(tmp_path / "run", False, None)
    run.checkpoints.mkdir(parents=True)
    return Keeper(run, FINGERPRINT, 3)


def test_the_best_adapter_is_kept_at_once_also_between_two_saves(keeper: Keeper) -> None:
    assert keeper.best is None
    seen = []
    for step, loss in {0: 3.0, 100: 2.0, 200: 2.5, 300: 2.0, 400: 1.5, 500: 1.6}.items():
        evaluated(keeper, step, loss)
        best = keeper.run.checkpoints / "best"
        facts = read_seal(best)
        assert (best / "adapter_model.safetensors").read_text() == f"weights of step {facts['step']}"
        assert facts["fingerprint"] == FINGERPRINT
        assert keeper.best == {key: facts[key] for key in ("step", "eval_loss", "fingerprint")}
        seen.append((facts["step"], facts["eval_loss"]))
    assert seen == [(0, 3.0), (100, 2.0), (100, 2.0), (100, 2.0), (400, 1.5), (400, 1.5)]
    assert [path.name for path in keeper.run.checkpoints.iterdir()] == ["best"]


def test_a_new_keeper_knows_the_best_adapter_of_the_one_before(keeper: Keeper) -> None:
    evaluated(keeper, 100, 2.0)
    later = Keeper(keeper.run, FINGERPRINT, 3)
    evaluated(later, 200, 2.5)
    assert later.best == read_seal(keeper.run.checkpoints / "best")
    assert (keeper.run.checkpoints / "best" / "adapter_model.safetensors").read_text() == "weights of step 100"


def test_a_best_adapter_half_written_by_a_killed_run_is_replaced(keeper: Keeper) -> None:
    partial = keeper.run.checkpoints / "best.partial"
    partial.mkdir()
    (partial / "adapter_model.safetensors").write_text("half")
    evaluated(keeper, 0, 2.0)
    assert [path.name for path in keeper.run.checkpoints.iterdir()] == ["best"]
    assert (keeper.run.checkpoints / "best" / "adapter_model.safetensors").read_text() == "weights of step 0"


def test_an_evaluation_asks_for_a_save_only_where_training_stops(keeper: Keeper) -> None:
    assert evaluated(keeper, 100, 2.0).should_save is False
    assert evaluated(keeper, 200, 2.0, stopping=True).should_save is True


def test_a_checkpoint_is_sealed_with_its_loss_and_the_older_ones_thinned_out(keeper: Keeper) -> None:
    for step, loss in {2: 5.0, 4: 1.0, 6: 2.0, 8: 3.0, 10: 9.0}.items():
        evaluated(keeper, step, loss)
        folder = keeper.run.checkpoints / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "optimizer.pt").write_text("moments")
        keeper.on_save(None, SimpleNamespace(global_step=step), TrainerControl())
    facts = {folder.name: read_seal(folder) for folder in saved(keeper.run.checkpoints)}
    found = {name: (fact["step"], fact["eval_loss"], list(fact["files"])) for name, fact in facts.items()}
    losses = {4: 1.0, 6: 2.0, 8: 3.0, 10: 9.0}
    assert found == {f"checkpoint-{step}": (step, loss, ["optimizer.pt"]) for step, loss in losses.items()}


def test_a_disk_too_small_for_the_best_adapter_keeps_the_one_before(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated(keeper, 0, 3.0)
    usage = SimpleNamespace(free=-1)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(DiskFull, match=r"^no space left: "):
        evaluated(keeper, 100, 2.0)
    assert read_seal(keeper.run.checkpoints / "best")["step"] == 0


# --- whole trainings


BETWEEN = ("training.eval_steps=4", "training.save_steps=4", "lora.lora_dropout=0.2")


def test_a_save_by_the_clock_between_two_evaluations_goes_on_bit_identically(
    case: Case, tiny_mistral: Path, conversations: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    _, whole, _ = case.train(*BETWEEN, "training.save_minutes=0.00001", "training.save_total_limit=10")
    assert case.checkpoints() == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    assert read_seal(case.run.checkpoints / "checkpoint-3")["eval_loss"] is None
    later = Case(tiny_mistral, conversations, tmp_path / "later", tokenizer)
    for name in ("checkpoint-3", "best"):
        shutil.copytree(case.run.checkpoints / name, later.run.checkpoints / name)
    checkpoint = later.run.checkpoints / "checkpoint-3"
    _, model, _ = later.train(*BETWEEN, checkpoint=checkpoint)
    assert same(adapter_weights(model), adapter_weights(whole))
    assert later.checkpoints() == ["checkpoint-3", "checkpoint-4"]


def test_seconds_and_speed_are_of_all_starts_of_a_run(
    case: Case, tiny_mistral: Path, conversations: Path, tmp_path: Path
) -> None:
    whole, _, _ = case.train(*BETWEEN, "training.save_minutes=0.00001", "training.save_total_limit=10")
    assert whole.tokens_per_second * whole.seconds > (tokens := case.metrics()[-2]["num_tokens"])
    later = Case(tiny_mistral, conversations, tmp_path / "later", case.tokenizer)
    for name in ("checkpoint-3", "best"):
        shutil.copytree(case.run.checkpoints / name, later.run.checkpoints / name)
    path = later.run.checkpoints / "checkpoint-3" / "trainer_state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    state["stateful_callbacks"]["Sums"]["attributes"] |= {"seconds": 1000.0, "step_seconds": 500.0}
    path.write_text(json.dumps(state), encoding="utf-8")
    started = time.monotonic()
    outcome, _, _ = later.train(*BETWEEN, checkpoint=path.parent)
    assert 1000 < outcome.seconds < 1000 + time.monotonic() - started
    assert outcome.tokens_per_second == pytest.approx(tokens / 500, rel=0.01)  # the fourth step takes milliseconds
    assert later.metrics()[-2]["num_tokens"] == tokens


@pytest.mark.parametrize(
    ("step", "due", "waited", "patience", "over"),
    [
        (4, False, 0, 5, False),
        (10, False, 0, 5, True),
        (10, True, 0, 5, False),
        (4, False, 5, 5, True),
        (4, False, 6, 5, True),
        (4, False, 4, 5, False),
        (4, False, 99, None, False),
    ],
)
def test_a_run_is_over_at_its_last_step_if_that_is_evaluated_or_at_the_end_of_its_patience(
    case: Case, tmp_path: Path, step: int, due: bool, waited: int, patience: int | None, over: bool
) -> None:
    control, stopping = TrainerControl(should_evaluate=due), EarlyStoppingCallback()
    stopping.early_stopping_patience_counter = waited
    state = TrainerState(global_step=step, stateful_callbacks=[control, stopping])
    state.save_to_json(str(tmp_path / "trainer_state.json"))
    training = case.config(f"training.early_stopping_patience={'null' if patience is None else patience}").training
    assert is_over(training, 10, tmp_path) is over


class DeviceDropout(torch.nn.Module):
    """Dropout that draws from random numbers of its own, as on a device whose generator is not the CPU's."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        kept = torch.rand(values.shape, generator=self.generator) > 0.5
        return values * kept if self.training else values


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> torch.Generator:
    """The random numbers of a stand-in for MPS; the model computes on the CPU, its dropout draws from these."""
    generator = torch.Generator()
    device = SimpleNamespace(get_rng_state=generator.get_state, set_rng_state=generator.set_state)
    monkeypatch.setattr(torch, "get_device_module", {"mps": device}.__getitem__)
    monkeypatch.setattr(Trainer, "platform", PLATFORMS["m4"])
    monkeypatch.setattr(trainer_module, "peak_memory_gib", lambda _platform: 1.0)  # it would ask MPS
    make = trainer_module.SFTTrainer.__init__

    def with_dropout(self: Any, *arguments: Any, **named: Any) -> None:
        make(self, *arguments, **named)
        for module in self.model.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = DeviceDropout(generator)

    monkeypatch.setattr(trainer_module.SFTTrainer, "__init__", with_dropout)
    return generator


def test_a_resume_goes_on_with_the_devices_own_random_numbers_bit_identically(
    case: Case, apart: torch.Generator, tiny_mistral: Path, conversations: Path, tmp_path: Path
) -> None:
    apart.manual_seed(1)
    _, whole, _ = case.train(*BETWEEN, "training.save_minutes=0.00001")
    later = Case(tiny_mistral, conversations, tmp_path / "later", case.tokenizer)
    for name in ("checkpoint-3", "best"):
        shutil.copytree(case.run.checkpoints / name, later.run.checkpoints / name)
    checkpoint = later.run.checkpoints / "checkpoint-3"
    assert "device_rng.safetensors" in read_seal(checkpoint)["files"]
    apart.manual_seed(2)  # a new process begins anywhere
    _, model, _ = later.train(*BETWEEN, checkpoint=checkpoint)
    assert same(adapter_weights(model), adapter_weights(whole))


def test_a_checkpoint_of_another_platform_brings_no_random_numbers_of_this_device(
    case: Case, request: pytest.FixtureRequest
) -> None:
    case.train(*BETWEEN, "training.save_minutes=0.00001")
    checkpoint = case.run.checkpoints / "checkpoint-3"
    assert not (checkpoint / "device_rng.safetensors").exists()  # the CPU's are in transformers' own file
    request.getfixturevalue("apart")
    assert case.train(*BETWEEN, checkpoint=checkpoint)[0].steps == 4


def test_without_a_clock_saves_come_at_their_steps_only(case: Case) -> None:
    case.train(*BETWEEN, "training.save_minutes=null")
    assert case.checkpoints() == ["checkpoint-4"]


def scripted(monkeypatch: pytest.MonkeyPatch, losses: Iterable[float]) -> dict[int, dict[str, torch.Tensor]]:
    """Evaluations give `losses` by step, the rest of them 100; returns the adapter's weights by step as it goes."""
    by_step = dict(enumerate(losses))
    weights: dict[int, dict[str, torch.Tensor]] = {}

    def evaluation_loop(self: Trainer, *_args: Any, **_kwargs: Any) -> EvalLoopOutput:
        weights[self.state.global_step] = adapter_weights(self.model)
        loss = by_step.get(self.state.global_step, 100.0)
        return EvalLoopOutput(predictions=None, label_ids=None, metrics={"eval_loss": loss}, num_samples=1)

    monkeypatch.setattr(Trainer, "evaluation_loop", evaluation_loop)
    return weights


EVERY_STEP = ("training.max_steps=10", "training.eval_steps=1", "training.save_steps=10")
UNEVEN = (9.0, 8.0, 5.0, 6.0, 7.0, 6.5)  # the best is at step 2, between two saves


def test_early_stopping_saves_where_it_stops_and_leaves_the_best_weights_in_the_model(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = scripted(monkeypatch, UNEVEN)
    outcome, model, _ = case.train(*EVERY_STEP, "training.early_stopping_patience=3")
    assert (outcome.steps, outcome.stopped_early) == (5, True)
    assert (outcome.best_step, outcome.eval_loss, outcome.first_eval_loss) == (2, 5.0, 9.0)
    assert case.checkpoints() == ["checkpoint-5"]
    assert read_seal(case.run.checkpoints / "checkpoint-5")["eval_loss"] == 6.5
    assert same(adapter_weights(model), weights[2])
    assert not same(weights[5], weights[2])


def test_without_load_best_model_at_end_the_last_weights_stay_and_their_loss_is_told(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = scripted(monkeypatch, UNEVEN)
    settings = ("training.early_stopping_patience=3", "training.load_best_model_at_end=false")
    outcome, model, _ = case.train(*EVERY_STEP, *settings)
    assert (outcome.best_step, outcome.eval_loss) == (5, 6.5)
    assert same(adapter_weights(model), weights[5])
    kept = load_peft_weights(str(case.run.checkpoints / "best"), device="cpu")
    assert same(kept, {name.replace(".default", ""): value for name, value in weights[2].items()})


def test_patience_null_never_stops(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, UNEVEN)
    outcome, _, _ = case.train(*EVERY_STEP, "training.early_stopping_patience=null")
    assert (outcome.steps, outcome.stopped_early, outcome.best_step) == (10, False, 2)


def test_the_last_step_is_evaluated_and_saved_whatever_the_intervals(case: Case) -> None:
    outcome, _, printed = case.train("training.max_steps=3", "training.logging_steps=10")
    assert case.checkpoints() == ["checkpoint-3"]
    assert [entry["step"] for entry in case.metrics() if "eval_loss" in entry] == [0, 3]
    assert [entry["step"] for entry in case.metrics() if "loss" in entry] == [3]
    assert outcome.steps == outcome.best_step == 3
    assert [line.split(":")[0] for line in printed.splitlines()] == ["step 0/3", "step 3/3", "step 3/3"]


@pytest.mark.parametrize(("steps", "accumulation"), [(3, 1), (4, 64)], ids=["inside an epoch", "at the end of one"])
def test_a_training_that_had_ended_but_was_not_exported_ends_the_same_when_resumed(
    case: Case, steps: int, accumulation: int
) -> None:
    settings = (f"training.max_steps={steps}", f"training.gradient_accumulation_steps={accumulation}")
    ended, model, _ = case.train(*settings)
    again, resumed, _ = case.train(*settings, checkpoint=case.run.checkpoints / f"checkpoint-{steps}")
    assert again.steps == steps
    assert (again.best_step, again.eval_loss) == (ended.best_step, ended.eval_loss)
    assert same(adapter_weights(resumed), adapter_weights(model))


def test_patience_counts_on_after_a_resume(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, UNEVEN)
    settings = ("training.max_steps=10", "training.eval_steps=1", "training.save_steps=1")
    case.train(*settings, "training.early_stopping_patience=3", "training.save_total_limit=10")
    assert case.checkpoints() == [f"checkpoint-{step}" for step in (1, 2, 3, 4, 5)]
    settings = (*settings, "training.early_stopping_patience=3")
    outcome, _, _ = case.train(*settings, checkpoint=case.run.checkpoints / "checkpoint-4")
    assert (outcome.steps, outcome.stopped_early, outcome.best_step) == (5, True, 2)


# --- the first loss or gradient that is not finite


ADVICE = "look at them with scripts/inspect_data.py, lower training.learning_rate"
EACH_STEP = (
    "training.per_device_train_batch_size=1",
    "training.gradient_accumulation_steps=2",
    "training.logging_steps=10",
    "training.save_minutes=0.00001",
    "training.save_total_limit=10",
    "training.eval_steps=4",
    "training.save_steps=4",
)


def ends(case: Case, trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> Diverged:
    """The end of `trainer`'s run, which case.train begins."""
    monkeypatch.setattr(case, "trainer", lambda *_, **__: trainer)
    with pytest.raises(Diverged) as failure:
        case.train(*EACH_STEP)
    return failure.value


def rows_of_step(case: Case, step: int) -> str:
    """As a message lists them."""
    batches = [batch["lines"] for batch in case.trainer(*EACH_STEP).get_train_dataloader()]
    lines = [line for batch in batches[2 * step - 2 : 2 * step] for line in batch]
    more = f" and {len(lines) - 8} more" if len(lines) > 8 else ""
    return "rows " + ", ".join(f"{case.train_file}:{line}" for line in lines[:8]) + more


def test_a_gradient_that_is_not_finite_ends_the_run_before_it_reaches_the_weights(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of_step(case, 3)
    trainer = case.trainer(*EACH_STEP)
    parameter = next(parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
    parameter.register_hook(lambda gradient: gradient * math.inf if trainer.state.global_step == 2 else gradient)
    failure = ends(case, trainer, monkeypatch)
    goes_on = "; --resume-changed then goes on from checkpoint-2, the last good checkpoint"
    assert (str(failure), failure.exit_code) == (f"step 3: the gradient is not finite on {rows}; {ADVICE}{goes_on}", 5)
    assert case.checkpoints() == ["checkpoint-1", "checkpoint-2"]
    assert all(bool(weight.isfinite().all()) for weight in adapter_weights(trainer.model).values())


def test_a_step_without_loss_and_gradient_ends_the_run_since_nothing_is_learnt(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of_step(case, 2)
    trainer = case.trainer(*EACH_STEP)
    compute_loss = SFTTrainer.compute_loss

    def nothing(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        return compute_loss(self, *args, **kwargs) * (0 if self.state.global_step == 1 else 1)

    monkeypatch.setattr(SFTTrainer, "compute_loss", nothing)
    failure = ends(case, trainer, monkeypatch)
    found = f"step 2: loss and gradient are 0, so nothing is learnt, on {rows}; {ADVICE}"
    assert str(failure) == f"{found}; --resume-changed then goes on from checkpoint-1, the last good checkpoint"


def test_a_gradient_of_zero_beside_a_loss_is_no_reason_to_end(case: Case) -> None:
    trainer = case.trainer()
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(torch.zeros_like)
    trainer.train()
    assert trainer.state.global_step == 4


def infinite(base: Any) -> None:
    base.model.norm.weight.data[0] = float("inf")


def test_the_first_loss_that_is_not_finite_names_the_rows_of_its_batch(case: Case) -> None:
    settings = ("model.max_seq_length=128", "training.per_device_train_batch_size=1")
    trainer = case.trainer(*settings, first=False, change=infinite)
    lines = next(iter(trainer.get_train_dataloader()))["lines"]
    assert len(lines) > 1
    trainer = case.trainer(*settings, first=False, change=infinite)
    with pytest.raises(Diverged) as failure:
        trainer.train()
    rows = ", ".join(f"{case.train_file}:{line}" for line in lines)
    assert str(failure.value) == f"step 1: the loss is not a finite number on rows {rows}; {ADVICE}"
    assert failure.value.exit_code == 5
    assert trainer.state.global_step == 0


def test_an_evaluation_that_is_not_finite_says_so(case: Case) -> None:
    with pytest.raises(Diverged, match=r"the loss is not a finite number on the validation rows; "):
        case.trainer(change=infinite).evaluate()


# --- signals


@pytest.fixture
def stopper(tmp_path: Path) -> Iterator[Stopper]:
    stopper = Stopper(Run(tmp_path, False, None))
    with stopper:
        yield stopper


SAID = "SIGTERM: stopping as soon as the step is done; once more leaves at once\n"


def test_a_signal_ends_the_run_after_the_step_at_hand_with_a_checkpoint(
    stopper: Stopper, capfd: pytest.CaptureFixture[str]
) -> None:
    control = TrainerControl()
    stopper.on_step_end(None, TrainerState(global_step=3), control)
    assert (control.should_save, control.should_training_stop) == (False, False)
    os.kill(os.getpid(), signal.SIGTERM)
    assert capfd.readouterr() == ("", SAID)
    stopper.on_step_end(None, TrainerState(global_step=4), control)
    assert (control.should_save, control.should_training_stop) == (True, True)
    with pytest.raises(EvaluationStopped):
        stopper.on_prediction_step(None, TrainerState(global_step=4), control)
    (stopper.run.checkpoints / "checkpoint-4").mkdir(parents=True)
    with pytest.raises(Stopped) as stopped:
        stopper.leave(4)
    assert (stopped.value.exit_code, str(stopped.value)) == (
        143,
        "stopped by SIGTERM at step 4; the same command goes on from checkpoint-4",
    )


def test_a_signal_in_an_evaluation_ends_it_at_the_next_batch(stopper: Stopper) -> None:
    stopper.on_prediction_step(None, TrainerState(global_step=0), TrainerControl())
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(EvaluationStopped):
        stopper.on_prediction_step(None, TrainerState(global_step=0), TrainerControl())
    with pytest.raises(Stopped) as stopped:
        stopper.leave(0)
    assert (stopped.value.exit_code, str(stopped.value)) == (
        130,
        "stopped by SIGINT at step 0; the same command starts again (no checkpoint yet)",
    )


STEPPED = (
    "training.max_steps=6",
    "training.eval_steps=2",
    "training.save_steps=6",
    "training.logging_steps=4",
    "training.early_stopping_patience=3",
    "lora.lora_dropout=0.2",
)


def signalled(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """SIGTERM in the first batch of the next evaluation of `step`."""
    predict = Trainer.prediction_step
    left = [step]

    def prediction_step(self: Trainer, *arguments: Any, **named: Any) -> Any:
        if self.state.global_step in left:
            left.clear()
            os.kill(os.getpid(), signal.SIGTERM)
        return predict(self, *arguments, **named)

    monkeypatch.setattr(Trainer, "prediction_step", prediction_step)


def ended(case: Case, outcome: Outcome, model: Any) -> dict[str, Any]:
    """All of a finished training that a stop must not change; times and speeds are left out."""
    last = saved(case.run.checkpoints)[-1]
    state = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))
    logged = [
        {key: entry[key] for key in entry if "time" not in key and "second" not in key} for entry in case.metrics()
    ]
    folders = {"last": last, "best": case.run.checkpoints / "best"}
    files = {
        name: sorted(path for path in folder.iterdir() if path.suffix in WEIGHTS) for name, folder in folders.items()
    }
    return {
        "files": {f"{name}/{path.name}": path.read_bytes() for name in files for path in files[name]},
        "metrics": logged,
        "outcome": dataclasses.replace(outcome, seconds=0, tokens_per_second=0),
        "step": (state["global_step"], read_seal(last)["eval_loss"]),
        "weights": {name: value.tolist() for name, value in adapter_weights(model).items()},
    }


WEIGHTS = (".safetensors", ".pt", ".pth")


def test_a_signal_in_an_evaluation_saves_its_step_and_the_same_command_makes_it_first_to_the_same_bits(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ended(case, *case.train(*STEPPED)[:2])
    for step in (2, 6):
        later = Case(case.base, Path(case.train_file), tmp_path / f"stopped at {step}", case.tokenizer)
        signalled(monkeypatch, step)
        with pytest.raises(Stopped) as stopped:
            later.train(*STEPPED)
        goes_on = f"the same command goes on from checkpoint-{step}"
        assert str(stopped.value) == f"stopped by SIGTERM at step {step}; {goes_on}"
        checkpoint = later.run.checkpoints / f"checkpoint-{step}"
        assert read_seal(checkpoint)["eval_loss"] is None
        assert [entry["step"] for entry in later.metrics() if "eval_loss" in entry] == [*range(0, step, 2)]
        outcome, model, _ = later.train(*STEPPED, checkpoint=checkpoint)
        assert ended(later, outcome, model) == whole
        again, model, _ = later.train(*STEPPED, checkpoint=later.run.checkpoints / "checkpoint-6")
        assert ended(later, again, model) == whole  # where the export was killed


def test_a_signal_in_an_evaluation_that_was_due_leaves_it_due(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for checkpoint in (None, case.run.checkpoints / "checkpoint-4"):
        signalled(monkeypatch, 4)
        with pytest.raises(Stopped, match=r"at step 4; the same command goes on from checkpoint-4$"):
            case.train(*STEPPED, checkpoint=checkpoint)
    assert case.checkpoints() == ["checkpoint-4"]
    assert evaluates_first(case.run.checkpoints / "checkpoint-4")
    case.train(*STEPPED, checkpoint=case.run.checkpoints / "checkpoint-4")
    assert [entry["step"] for entry in case.metrics() if "eval_loss" in entry] == [0, 2, 4, 6]


@pytest.mark.parametrize("step", [2, 5], ids=["the best evaluation", "the one that ends patience"])
def test_an_evaluation_that_was_due_counts_for_patience(case: Case, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    settings = (*EVERY_STEP, "training.early_stopping_patience=3")
    scripted(monkeypatch, UNEVEN)
    evaluation_loop = Trainer.evaluation_loop

    def stopping(self: Trainer, *arguments: Any, **named: Any) -> EvalLoopOutput:
        if self.state.global_step == step and not case.checkpoints():
            os.kill(os.getpid(), signal.SIGTERM)
            raise EvaluationStopped
        return evaluation_loop(self, *arguments, **named)

    monkeypatch.setattr(Trainer, "evaluation_loop", stopping)
    with pytest.raises(Stopped):
        case.train(*settings)
    checkpoint = case.run.checkpoints / f"checkpoint-{step}"
    outcome, _, _ = case.train(*settings, checkpoint=checkpoint)
    assert (outcome.steps, outcome.stopped_early, outcome.best_step, outcome.eval_loss) == (5, True, 2, 5.0)
    assert read_seal(checkpoint)["eval_loss"] == UNEVEN[step]


def test_a_second_signal_leaves_at_once(stopper: Stopper) -> None:
    assert stopper.signal_number is None
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        os.kill(os.getpid(), signal.SIGINT)
    assert left.value.code == 130


def test_after_the_training_signals_do_what_they_did_before(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Stopper(Run(tmp_path, False, None)):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_was_ignored_before_the_training_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stopper(Run(tmp_path, False, None)) as stopper:
            os.kill(os.getpid(), signal.SIGINT)
            assert stopper.signal_number is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


class Screen(StringIO):
    """A terminal of unknown size."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def at_noon(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is noon, and this process was started two minutes ago."""

    class Noon(datetime):
        @classmethod
        def now(cls, _: Any = None) -> Any:
            return datetime(2024, 1, 31, 12)

    monkeypatch.setattr(progress_module, "datetime", Noon)
    monkeypatch.setattr(progress_module, "seconds_since_start", lambda: 120.0)


def progressed(progress: Progress, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of 30 s of 100, each logged, then an evaluation."""
    clock = iter([0.0, 30.0, 100.0, 130.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    state = TrainerState(global_step=0, max_steps=100, eval_steps=10, save_steps=50)
    progress.on_train_begin(None, state, None)
    for step in (1, 2):
        progress.on_step_begin(None, state, None)
        state.global_step = step
        progress.on_step_end(None, state, None)
        progress.on_log(None, state, None, {"loss": 3.25, "num_tokens": 60_000.0 * step})
    progress.on_log(None, state, None, {"eval_loss": 2.5})
    progress.on_log(None, state, None, {"train_runtime": 1.0})


@pytest.mark.usefixtures("at_noon")
def test_a_plain_progress_line_says_when_it_ends_and_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = StringIO()
    progress = Progress(Terminal(stream=stream), Pace(1.0, 60.0, 12.0), 3.0, lambda: 12.94)
    progressed(progress, monkeypatch)
    progress.on_train_end(None, TrainerState(), None)
    # 99 steps of 30 s, 10 evaluations of 60 s, 2 saves of 12 s: 3,594 s; with the 120 s since the start 3,714 s
    assert stream.getvalue() == (
        "step 1/100: loss 3.250, 2,000 tokens/s, 60 min left, ends about 12:59, cost 0.10 of 3.10, peak 12.9 GiB\n"
        "step 2/100: loss 3.250, 2,000 tokens/s, 59 min left, ends about 12:59, cost 0.10 of 3.07, peak 12.9 GiB\n"
        "step 2/100: eval_loss 2.5000\n"
    )


@pytest.mark.usefixtures("at_noon")
def test_on_a_terminal_one_line_holds_the_last_of_everything_and_evaluations_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    screen = Screen()
    progress = Progress(Terminal(stream=screen), Pace(1.0, 60.0, 12.0), 3.0, lambda: 12.94)
    progressed(progress, monkeypatch)
    shown = screen.getvalue().split("\r")
    ending = "59 min left, ends about 12:59, eval_loss 2.5000, cost 0.10 of 3.07"
    assert shown[-1] == f"step 2/100: loss 3.250, 2,000 tokens/s, {ending}, peak 12.9 GiB"
    assert [part for part in shown if "\n" in part] == ["step 2/100: eval_loss 2.5000\n"]
    progress.on_train_end(None, TrainerState(), None)
    assert screen.getvalue().endswith(f"\r{' ' * len(shown[-1])}\r")
