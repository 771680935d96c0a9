"""What the trainer adds to TRL's: exact evaluation, fp32 adapters, resumes to the same bits, clear stops."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import load_peft_weights
from transformers import EarlyStoppingCallback, PreTrainedTokenizerFast, TrainerControl, TrainerState
from transformers import Trainer as TransformersTrainer
from trl import SFTTrainer

from finetune.errors import Diverged
from finetune.files import read_seal
from finetune.model.load import load_base
from finetune.model.lora import add_lora
from finetune.training.trainer import Trainer, is_over
from support.training import Case, adapter_weights, same
from support.whole_trainings import BETWEEN, EVERY_STEP, UNEVEN, scripted

# --- steps


def test_the_operations_of_a_batch_are_those_that_transformers_counts(
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
            ids, labels = map(torch.tensor, rows.row(index)[1:])
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


@pytest.mark.parametrize(
    ("step", "due", "waited", "patience", "over"),
    [
        (4, False, 0, 5, False), (10, False, 0, 5, True), (10, True, 0, 5, False), (4, False, 5, 5, True),
        (4, False, 6, 5, True), (4, False, 4, 5, False), (4, False, 99, None, False),
    ],
)  # fmt: skip
def test_a_run_is_over_at_its_last_evaluated_step_or_at_the_end_of_its_patience(
    case: Case, tmp_path: Path, step: int, due: bool, waited: int, patience: int | None, over: bool
) -> None:
    control, stopping = TrainerControl(should_evaluate=due), EarlyStoppingCallback()
    stopping.early_stopping_patience_counter = waited
    state = TrainerState(global_step=step, stateful_callbacks=[control, stopping])
    state.save_to_json(str(tmp_path / "trainer_state.json"))
    training = case.config(f"training.early_stopping_patience={'null' if patience is None else patience}").training
    assert is_over(training, 10, tmp_path) is over


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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("steps", "accumulation"),
    [pytest.param(3, 1, id="inside an epoch"), pytest.param(4, 64, id="at the end of one", marks=pytest.mark.slow)],
)
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
    "training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=2", "training.logging_steps=10",
    "training.save_minutes=0.00001", "training.save_total_limit=10", "training.eval_steps=4", "training.save_steps=4",
)  # fmt: skip


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
    return f"rows {', '.join(lines[:8])}{more}"


def test_a_gradient_that_is_not_finite_ends_the_run_before_it_reaches_the_weights(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of_step(case, 3)
    trainer = case.trainer(*EACH_STEP)
    parameter = next(parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
    parameter.register_hook(lambda gradient: gradient * math.inf if trainer.state.global_step == 2 else gradient)
    failure = ends(case, trainer, monkeypatch)
    goes_on = "; --resume-changed then resumes from checkpoint-2, the last good checkpoint"
    assert (str(failure), failure.exit_code) == (f"step 3: the gradient is not finite on {rows}; {ADVICE}{goes_on}", 5)
    assert case.checkpoints() == ["checkpoint-1", "checkpoint-2"]
    assert all(bool(weight.isfinite().all()) for weight in adapter_weights(trainer.model).values())


def test_a_step_without_loss_and_gradient_ends_the_run_since_nothing_is_learned(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of_step(case, 2)
    trainer = case.trainer(*EACH_STEP)
    compute_loss = SFTTrainer.compute_loss

    def nothing(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        return compute_loss(self, *args, **kwargs) * (0 if self.state.global_step == 1 else 1)

    monkeypatch.setattr(SFTTrainer, "compute_loss", nothing)
    failure = ends(case, trainer, monkeypatch)
    found = f"step 2: loss and gradient are 0, so nothing is learned, on {rows}; {ADVICE}"
    assert str(failure) == f"{found}; --resume-changed then resumes from checkpoint-1, the last good checkpoint"


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
    assert all(line.startswith(f"{case.train_file}:") for line in lines)
    rows = ", ".join(lines)
    assert str(failure.value) == f"step 1: the loss is not a finite number on rows {rows}; {ADVICE}"
    assert failure.value.exit_code == 5
    assert trainer.state.global_step == 0


def test_rows_of_several_files_are_named_with_their_file(case: Case) -> None:
    more = case.folder / "more.jsonl"
    more.write_text(Path(case.train_file).read_text().replace("What", "And what"))
    settings = (f"dataset.train_file=[{case.train_file}, {more}]", "training.per_device_train_batch_size=20")
    trainer = case.trainer(*settings, first=False, change=infinite)
    wanted = [row for batch in trainer.get_train_dataloader() for row in batch["lines"]]
    data = case.data(case.config(*settings))
    assert sorted(wanted) == sorted(str(data.train.row(index)[0]) for index in range(len(data.train.lengths)))
    assert {row.rpartition(":")[0] for row in wanted} == {case.train_file, str(more)}


def test_an_evaluation_that_is_not_finite_says_so(case: Case) -> None:
    with pytest.raises(Diverged, match=r"the loss is not a finite number on the validation rows; "):
        case.trainer(change=infinite).evaluate()


def test_under_sdpa_packed_sequences_are_the_rows_of_a_batch(case: Case) -> None:
    trainer = case.trainer("training.packing=true", "training.per_device_train_batch_size=2")
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == batch["position_ids"].shape[0] == 2
    assert "attention_mask" not in batch
