"""A signal ends a training in order, also in an evaluation, and the same command goes on to the same bits."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState
from transformers.trainer_utils import EvalLoopOutput

from finetune.errors import Stopped
from finetune.files import read_seal
from finetune.runs.folder import Run
from finetune.training.stopper import EvaluationStopped, Stopper
from finetune.training.trainer import Trainer, evaluates_first
from support.training import Case
from support.whole_trainings import EVERY_STEP, UNEVEN, WEIGHTS, ended, scripted


@pytest.fixture
def stopper(tmp_path: Path) -> Iterator[Stopper]:
    stopper = Stopper(Run(tmp_path, False, None))
    with stopper:
        yield stopper


@pytest.mark.usefixtures("stopper")
@pytest.mark.parametrize(
    ("number", "again"), [(signal.SIGINT, "press Ctrl-C again"), (signal.SIGTERM, "send it again")]
)
def test_a_signal_is_answered_with_when_the_run_stops_and_how_to_quit_now(
    capfd: pytest.CaptureFixture[str], number: signal.Signals, again: str
) -> None:
    os.kill(os.getpid(), number)
    assert capfd.readouterr() == ("", f"{number.name}: stopping after this micro-batch; {again} to quit now\n")


def test_a_signal_in_the_last_micro_batch_saves_that_step(stopper: Stopper) -> None:
    control = TrainerControl()
    stopper.on_step_end(None, TrainerState(global_step=3), control)
    assert (control.should_save, control.should_training_stop) == (False, False)
    os.kill(os.getpid(), signal.SIGTERM)
    stopper.on_step_end(None, TrainerState(global_step=4), control)
    assert (control.should_save, control.should_training_stop) == (True, True)
    with pytest.raises(EvaluationStopped):
        stopper.on_prediction_step(None, TrainerState(global_step=4), control)
    (stopper.run.checkpoints / "checkpoint-4").mkdir(parents=True)
    with pytest.raises(Stopped) as stopped:
        stopper.leave(4)
    assert (stopped.value.exit_code, str(stopped.value)) == (
        143,
        "stopped by SIGTERM at step 4; the same command resumes from checkpoint-4",
    )


def test_a_run_started_by_fresh_is_resumed_by_the_command_without_it(tmp_path: Path) -> None:
    stopper = Stopper(Run(tmp_path, False, None, fresh=True))
    stopper.signal_number = signal.SIGINT
    (stopper.run.checkpoints / "checkpoint-4").mkdir(parents=True)
    with pytest.raises(Stopped, match=r"at step 4; the same command without --fresh resumes from checkpoint-4$"):
        stopper.leave(4)


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
    "training.max_steps=6", "training.eval_steps=2", "training.save_steps=6", "training.logging_steps=4",
    "training.early_stopping_patience=3", "lora.lora_dropout=0.2",
)  # fmt: skip


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


@pytest.mark.slow
def test_after_a_signal_in_an_evaluation_the_same_command_evaluates_first_to_the_same_bits(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ended(case, *case.train(*STEPPED)[:2])
    for step in (2, 6):
        later = Case(case.base, Path(case.train_file), tmp_path / f"stopped at {step}", case.tokenizer)
        signalled(monkeypatch, step)
        with pytest.raises(Stopped) as stopped:
            later.train(*STEPPED)
        goes_on = f"the same command resumes from checkpoint-{step}"
        assert str(stopped.value) == f"stopped by SIGTERM at step {step}; {goes_on}"
        checkpoint = later.run.checkpoints / f"checkpoint-{step}"
        assert read_seal(checkpoint)["eval_loss"] is None
        assert [entry["step"] for entry in later.metrics() if "eval_loss" in entry] == [*range(0, step, 2)]
        outcome, model, _ = later.train(*STEPPED, checkpoint=checkpoint)
        assert ended(later, outcome, model) == whole
        again, model, _ = later.train(*STEPPED, checkpoint=later.run.checkpoints / "checkpoint-6")
        assert ended(later, again, model) == whole  # where the export was killed


ACCUMULATED = (
    "training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=4", "training.max_steps=5",
    "training.eval_steps=2", "training.save_steps=6", "training.save_minutes=null", "training.logging_steps=4",
    "lora.lora_dropout=0.2", "model.max_seq_length=128",
)  # fmt: skip


def signalled_in_micro_batch(monkeypatch: pytest.MonkeyPatch, number: int, step: int) -> list[int]:
    """SIGTERM in micro-batch `number` of the step after `step`, once; the list is of the micro-batches computed."""
    compute, computed = Trainer.training_step, []

    def training_step(self: Trainer, *arguments: Any, **named: Any) -> Any:
        loss = compute(self, *arguments, **named)
        if self.state.global_step == step and len(computed) < number:
            computed.append(len(computed) + 1)
            if computed[-1] == number:
                os.kill(os.getpid(), signal.SIGTERM)
        return loss

    monkeypatch.setattr(Trainer, "training_step", training_step)
    return computed


def counted(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint carries of counts, sums and random states; not seconds."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    sums = state["stateful_callbacks"]["Sums"]["attributes"]
    randoms = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.suffix in WEIGHTS}
    return {
        **{name: state[name] for name in ("global_step", "epoch", "total_flos")},
        **{name: value for name, value in sums.items() if "seconds" not in name},
        **randoms,
    }


@pytest.mark.slow
def test_a_signal_in_a_micro_batch_discards_its_step_and_a_resume_has_the_same_bits(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ended(case, *case.train(*ACCUMULATED, "training.save_minutes=0.00001", "training.save_total_limit=9")[:2])
    for step, number in ((1, 1), (3, 2), (4, 3)):  # an epoch has three steps
        later = Case(case.base, Path(case.train_file), tmp_path / f"stopped after {step}", case.tokenizer)
        computed = signalled_in_micro_batch(monkeypatch, number, step)
        with pytest.raises(Stopped) as stopped:
            later.train(*ACCUMULATED)
        goes_on = f"the same command resumes from checkpoint-{step}"
        assert str(stopped.value) == f"stopped by SIGTERM at step {step}; {goes_on}"
        assert (computed, later.checkpoints()) == ([*range(1, number + 1)], [f"checkpoint-{step}"])
        checkpoint = later.run.checkpoints / f"checkpoint-{step}"
        assert counted(checkpoint) == counted(case.run.checkpoints / checkpoint.name)
        assert ended(later, *later.train(*ACCUMULATED, checkpoint=checkpoint)[:2]) == whole


@pytest.mark.slow
def test_a_signal_in_the_step_after_a_save_writes_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = (*ACCUMULATED, "training.save_steps=4")
    signalled_in_micro_batch(monkeypatch, 2, 4)
    with pytest.raises(Stopped, match=r"at step 4; the same command resumes from checkpoint-4$"):
        case.train(*settings)
    checkpoint = case.run.checkpoints / "checkpoint-4"
    written = {path: path.stat().st_mtime_ns for path in checkpoint.iterdir()}
    signalled_in_micro_batch(monkeypatch, 2, 4)
    with pytest.raises(Stopped, match=r"at step 4; the same command resumes from checkpoint-4$"):
        case.train(*settings, checkpoint=checkpoint)
    assert {path: path.stat().st_mtime_ns for path in checkpoint.iterdir()} == written


def test_a_signal_in_the_first_step_saves_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    signalled_in_micro_batch(monkeypatch, 3, 0)
    with pytest.raises(Stopped, match=r"at step 0; the same command starts again \(no checkpoint yet\)$"):
        case.train(*ACCUMULATED)
    assert case.checkpoints() == []


def test_a_signal_in_an_evaluation_that_was_due_leaves_it_due(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for checkpoint in (None, case.run.checkpoints / "checkpoint-4"):
        signalled(monkeypatch, 4)
        with pytest.raises(Stopped, match=r"at step 4; the same command resumes from checkpoint-4$"):
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
