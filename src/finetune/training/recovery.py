"""Recovers from running out of memory: checkpoints more layers and repeats the step, with the same bits."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from trl import SFTTrainer

from finetune.machine.device import free_cache, is_memory_error
from finetune.terminal import Terminal
from finetune.training.totals import COUNTED_WITHIN, keep_counted
from finetune.wording import first_line


class Recovery:
    """Computes micro-batches; if memory runs out, repeats those of the step with more layers checkpointed.

    `record` gets the new number of checkpointed layers and a sentence about it. `used` is written into each seal and
    gets the new number too.
    """

    def __init__(
        self, trainer: SFTTrainer, terminal: Terminal, record: Callable[[int, str], None], used: dict[str, Any]
    ) -> None:
        self.trainer, self.terminal, self.record, self.used = trainer, terminal, record, used
        self._step: int | None = None
        self._batches: list[Any] = []  # of this step, up to the current one
        self._found = ""

    def compute(self, micro_batch: Callable[[Any], torch.Tensor], inputs: Any) -> torch.Tensor:
        """Return the loss of `inputs`, the next micro-batch of the step, and add its gradients to the earlier ones'.

        The caller has already summed the earlier losses, which a repetition does not change. Raises any other error of
        `micro_batch`, and the memory error if no more layers can be checkpointed.
        """
        if self._step != self.trainer.state.global_step:
            self._step, self._batches = self.trainer.state.global_step, []
            self._undo = keep_counted(self.trainer, COUNTED_WITHIN)
        self._batches.append(inputs)
        loss = self._attempt(micro_batch, self._batches[-1:])
        while loss is None:
            self._undo()
            self.trainer.model.zero_grad()
            gc.collect()  # frees the reference cycles that the error kept alive
            free_cache(self.trainer.platform)
            loss = self._attempt(micro_batch, self._batches)
        return loss

    def _attempt(self, micro_batch: Callable[[Any], torch.Tensor], batches: list[Any]) -> torch.Tensor | None:
        """Return the loss of the last batch; None if memory ran out and more layers are now checkpointed.

        The error must not leave this function, because its frames keep the tensors alive.
        """
        before = self.trainer.checkpointing.count
        try:
            return [micro_batch(inputs) for inputs in batches][-1]
        except RuntimeError as error:
            if not is_memory_error(error) or not self.trainer.checkpointing.add_layers():
                raise
            self._say(before, first_line(error))
        return None

    def _say(self, before: int, found: str) -> None:
        checkpointing, step = self.trainer.checkpointing, self.trainer.state.global_step + 1
        cause = ". ".join(found.split(". ")[:2]).removesuffix(".")  # CUDA adds a paragraph of figures
        now = f"{checkpointing.count} of {len(checkpointing.layers)} from step {step} on"
        text = f"{now}, which is computed again; with {before} memory ran out ({cause})"
        self.terminal.decision("checkpointed layers", text)
        self.used["checkpointed_layers"] = checkpointing.count
        self.record(checkpointing.count, f"checkpointed layers: {text}")
