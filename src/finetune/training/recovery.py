"""Memory that runs out in a step: more layers are checkpointed, and the step is computed again, to the same bits."""

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
    """Computes a run's micro-batches, and those of a step again with more layers checkpointed where memory runs out.

    `record` takes the number of layers that are checkpointed then, and a sentence about it; `used` is what each seal
    says that the run computes with, and so has that number from then on.
    """

    def __init__(
        self, trainer: SFTTrainer, terminal: Terminal, record: Callable[[int, str], None], used: dict[str, Any]
    ) -> None:
        self.trainer, self.terminal, self.record, self.used = trainer, terminal, record, used
        self._step: int | None = None
        self._batches: list[Any] = []  # of this step, up to the one that is computed
        self._found = ""

    def compute(self, micro_batch: Callable[[Any], torch.Tensor], inputs: Any) -> torch.Tensor:
        """The loss of `inputs`, which come after the step's earlier ones; the gradients are added to theirs.

        The losses of the earlier ones are summed outside already, and have the same bits again. Raises what
        `micro_batch` does where that is something else, or where no more layers can be checkpointed.
        """
        if self._step != self.trainer.state.global_step:
            self._step, self._batches = self.trainer.state.global_step, []
            self._undo = keep_counted(self.trainer, COUNTED_WITHIN)
        self._batches.append(inputs)
        loss = self._attempt(micro_batch, self._batches[-1:])
        while loss is None:
            self._undo()
            self.trainer.model.zero_grad()
            gc.collect()  # what the error held is gone, but for what holds itself
            free_cache(self.trainer.platform)
            loss = self._attempt(micro_batch, self._batches)
        return loss

    def _attempt(self, micro_batch: Callable[[Any], torch.Tensor], batches: list[Any]) -> torch.Tensor | None:
        """The last one's loss; None where memory ran out and more layers are checkpointed now.

        The error holds the frames that hold the tensors, and does not leave this function.
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
