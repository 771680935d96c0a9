"""TRL's trainer with exact evaluation, fp32 adapters, the best adapter kept, and clean stops."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
    TrainerState,
)
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer

from finetune.config.schema import TrainingConfig
from finetune.data.packing import Collator
from finetune.data.template import IGNORED
from finetune.errors import Diverged
from finetune.machine.device import peak_memory_gib, random_state, set_random_state
from finetune.machine.platforms import PLATFORMS, Platform, lays_flat
from finetune.runs.checkpoints import BEST, room_for, saved
from finetune.runs.outcome import Outcome
from finetune.training.keeper import Copier, Keeper, adapter_bytes
from finetune.training.progress import Progress
from finetune.training.recompute import Checkpointing
from finetune.training.recovery import Recovery
from finetune.training.samples import Sampler, Samples
from finetune.training.stopper import EvaluationStopped, Stopper
from finetune.training.totals import Sums, keep_counted
from finetune.wording import listed

DEVICE_RANDOM_STATE = "device_rng.safetensors"


class Trainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer for prepared rows; the methods say what differs."""

    progress: Progress | None = None
    checkpointing: Checkpointing
    recovery: Recovery | None = None  # None in a rehearsal, which looks for memory errors
    undo_step: Callable[[], None]  # set at the first step; undoes the micro-batches since the last step
    _tr_loss: Any = 0.0  # transformers sets these two when training begins
    _globalstep_last_logged = 0
    _flos_a_token = 0
    _total_train_tokens: int
    step_lines: tuple[str, ...] = ()  # file:line of the rows, and losses of the current step
    step_losses: tuple[float, ...] = ()

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """As TRL's, but if memory runs out, `recovery` repeats the step with more layers checkpointed."""
        compute = partial(super().training_step, model, num_items_in_batch=num_items_in_batch)
        loss: torch.Tensor = compute(inputs) if self.recovery is None else self.recovery.compute(compute, inputs)
        return loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As TRL's, but a loss that is not finite ends the run and names the rows of its batch.

        Tokens are counted without padding; without an attention mask, TRL would count only one row of the batch.
        """
        lines, tokens = tuple(inputs.pop("lines")), self._total_train_tokens + inputs.pop("tokens")
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.model.training:
            self._total_train_tokens, self._metrics["train"]["num_tokens"] = tokens, [tokens]
        number = float((loss if isinstance(loss, torch.Tensor) else loss[0]).detach())
        if not math.isfinite(number):
            raise self._diverged("the loss is not a finite number", lines)
        if self.model.training:
            self.step_lines, self.step_losses = (*self.step_lines, *lines), (*self.step_losses, number)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        """As transformers', but a gradient that is not finite, or a step with loss and gradient 0, ends the run.

        That is before the optimizer step; the error names the rows.
        """
        norm = float(super()._get_grad_norm(model, grad_norm))
        lines, losses = self.step_lines, self.step_losses
        self.step_lines, self.step_losses = (), ()
        if not math.isfinite(norm):
            raise self._diverged("the gradient is not finite", lines)
        if norm == 0 and not any(losses):
            raise self._diverged("loss and gradient are 0, so nothing is learned,", lines)
        return norm

    def _diverged(self, what: str, lines: tuple[str, ...]) -> Diverged:
        """Return the error with the step, the rows of `lines` and the newest checkpoint, which is still good."""
        rows = f"rows {listed(lines, 8)}" if self.model.training else "the validation rows"
        found = f"step {self.state.global_step + self.model.training}: {what} on {rows}"
        advice = "look at them with scripts/inspect_data.py, lower training.learning_rate"
        good = saved(Path(self.args.output_dir))
        goes_on = f"; --resume-changed then resumes from {good[-1].name}, the last good checkpoint" if good else ""
        return Diverged(found, f"{advice}{goes_on}")

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As transformers', which counts all parameters again for each micro-batch."""
        tokens = int(inputs["input_ids"].numel())
        self._flos_a_token = self._flos_a_token or super().floating_point_ops(inputs) // tokens
        return self._flos_a_token * tokens

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Compute the mean loss per supervised token over all rows, independent of the batch size."""
        self.model.eval()
        loss_sum, token_count, rows = 0.0, 0, 0
        for inputs in dataloader:
            tokens = int((inputs["labels"][:, 1:] != IGNORED).sum())
            loss, _, _ = self.prediction_step(self.model, inputs, True, ignore_keys)
            loss_sum += float(loss) * tokens
            token_count += tokens
            rows += len(inputs["labels"])
            self.control: Any = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        metrics = {f"{metric_key_prefix}_loss": loss_sum / token_count}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=rows)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False) -> Any:
        # An evaluation changes nothing that is saved with its step, random numbers included. If a signal interrupts it,
        # the step is saved with the evaluation still due (control.should_evaluate), and a resume starts with it.
        due = self.control.should_evaluate
        try:
            metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        except EvaluationStopped:
            if due:
                self._save_checkpoint(self.model, trial)
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            raise
        if not due and self.state.global_step > 0:
            self._determine_best_metric(metrics, trial)  # as after any evaluation except the one before the first step
        return metrics

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.undo_step = keep_counted(self)  # here, where checkpoints are saved: a new epoch draws random numbers first

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers would take one more step if the evaluation still due was the run's last.
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL's, with speed and memory added to each training loss."""
        if self.progress is not None and "loss" in logs:
            speed = self.progress.lap(int(self._total_train_tokens))
            logs |= {"tokens_per_second": round(speed, 1), "memory_gib": round(peak_memory_gib(self.platform), 3)}
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: results/export.py writes the card, and TRL would write one into every checkpoint."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with room_for(Path(self.args.output_dir), 3 * adapter_bytes(self.model)):  # weights and AdamW's two moments
            super()._save_checkpoint(model, trial)

    @property
    def platform(self) -> Platform:
        """The platform of this trainer's device."""
        return next(row for row in PLATFORMS.values() if row.device == self.args.device.type)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.platform.random_state_apart:
            save_file({"state": random_state(self.platform)}, Path(output_dir) / DEVICE_RANDOM_STATE)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None or not self.platform.random_state_apart:
            return
        path = Path(checkpoint) / DEVICE_RANDOM_STATE
        if path.is_file():  # --resume-changed may resume another platform's checkpoint, without one
            set_random_state(self.platform, load_file(path)["state"])

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # transformers would add training_args.bin (a pickle), and PEFT would ask the Hub about embeddings.
        self.model.save_pretrained(output_dir, state_dict=state_dict, save_embedding_layers=False)


@dataclass(frozen=True)
class Examples:
    """Datasets of encoded rows."""

    train: Any
    validation: Any


def make_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    examples: Examples,
    sft: SFTConfig,
    checkpointed: int,
) -> Trainer:
    """Return a Trainer with the adapter weights of `model` still in fp32.

    The first `checkpointed` decoder layers recompute their activations in the backward pass.
    """
    weights = {
        name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    trainer = Trainer(
        model=model,
        args=sft,
        data_collator=Collator(tokenizer, lays_flat(model.get_base_model().config._attn_implementation)),
        train_dataset=examples.train,
        eval_dataset=examples.validation,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.checkpointing = Checkpointing(checkpointed, trainer.platform)
    trainer.add_callback(trainer.checkpointing)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = weights[name]  # TRL casts to bf16, a resume loads fp32: losses would differ
    return trainer


@dataclass(frozen=True)
class Watchers:
    """The callbacks of a run: checkpoints, stopping, progress, sample answers."""

    keeper: Keeper
    stopper: Stopper
    progress: Progress
    sampler: Sampler | None = None
    copier: Copier | None = None

    def in_order(self) -> list[TrainerCallback]:
        """Return the callbacks; the sampler comes after the best adapter is kept, and its time counts as evaluation."""
        callbacks = (self.keeper, self.copier, self.sampler, self.stopper.budget, self.stopper, self.progress)
        return [callback for callback in callbacks if callback is not None]

    def final_samples(self, model: PeftModel, outcome: Outcome) -> Samples:
        """Return the sample answers of the final model."""
        return [] if self.sampler is None else self.sampler.finish(model, outcome.best_step, outcome.eval_loss)


def train(
    trainer: Trainer, training: TrainingConfig, watchers: Watchers, steps: int, checkpoint: Path | None
) -> Outcome:
    """Train to the end, from `checkpoint` if there is one, and leave the best adapter in the model if so configured.

    `steps` is the total from the plan. Raises Stopped after a signal or at the end of the time budget, and Diverged.
    """
    keeper, stopper, progress = watchers.keeper, watchers.stopper, watchers.progress
    sums = Sums(trainer, progress)
    trainer.progress = progress
    stopping = EarlyStoppingCallback(training.early_stopping_patience or sys.maxsize)
    for callback in (stopping, *watchers.in_order(), sums):
        trainer.add_callback(callback)
    if checkpoint is not None:
        _recall(trainer, stopping, keeper, sums, checkpoint)
    if checkpoint is not None and is_over(training, steps, checkpoint):
        _load_adapter(trainer.model, checkpoint)
    else:
        with stopper, suppress(EvaluationStopped):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        stopper.leave(trainer.state.global_step)
    return _outcome(trainer, training, keeper, sums)


def _outcome(trainer: Trainer, training: TrainingConfig, keeper: Keeper, sums: Sums) -> Outcome:
    """Return the figures of a run that has reached its end; load the best adapter first if so configured."""
    assert keeper.best is not None  # the last step is always evaluated
    steps = best_step = trainer.state.global_step
    eval_loss = keeper.eval_losses[steps]
    if training.load_best_model_at_end:
        _load_adapter(trainer.model, keeper.run.checkpoints / BEST)
        best_step, eval_loss = keeper.best["step"], keeper.best["eval_loss"]
    return Outcome(
        steps=steps,
        train_loss=_mean_loss(trainer.state.log_history),
        first_eval_loss=keeper.eval_losses.get(0),
        eval_loss=eval_loss,
        best_step=best_step,
        tokens_per_second=sums.progress.tokens_per_second,
        seconds=sums.seconds,
        stopped_early=steps < trainer.state.max_steps,
    )


def is_over(training: TrainingConfig, steps: int, checkpoint: Path) -> bool:
    """Whether training is over at `checkpoint`: the last step is evaluated, or early stopping applies."""
    state = _state(checkpoint)
    if _evaluation_due(state):
        return False
    return state.global_step >= steps or _patience_used(state) >= (training.early_stopping_patience or sys.maxsize)


def evaluates_first(checkpoint: Path | None) -> bool:
    """Whether to evaluate before any step: at a run's start, and if a signal interrupted the last evaluation."""
    return checkpoint is None or _evaluation_due(_state(checkpoint))


def _evaluation_due(state: TrainerState) -> bool:
    return bool(state.stateful_callbacks["TrainerControl"]["args"]["should_evaluate"])


def _state(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def _patience_used(state: TrainerState) -> int:
    return int(state.stateful_callbacks["EarlyStoppingCallback"]["attributes"]["early_stopping_patience_counter"])


def _recall(trainer: Trainer, stopping: EarlyStoppingCallback, keeper: Keeper, sums: Sums, checkpoint: Path) -> None:
    """Restore the callbacks' state at `checkpoint`."""
    state = _state(checkpoint)
    keeper.eval_losses = {entry["step"]: entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry}
    stopping.early_stopping_patience_counter = _patience_used(state)
    sums.recall(state)
    trainer.state = state


def _load_adapter(model: PeftModel, folder: Path) -> None:
    set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))


def _mean_loss(log_history: list[dict[str, float]]) -> float:
    """Return the mean over all steps; each entry is the mean since the previous one."""
    total, last = 0.0, 0.0
    for entry in log_history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - last)
            last = entry["step"]
    return total / last if last else math.nan
