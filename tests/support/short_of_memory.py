"""Memory that runs out in a start of warm.py, which imports this first, in the micro-batches that RUNS_OUT counts."""

from __future__ import annotations

import os
from typing import Any

from finetune.training.trainer import Trainer

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which ..."
runs_out = {int(number) for number in os.environ["RUNS_OUT"].split(",")}  # attempts, counted from 1
compute_loss = Trainer.compute_loss
attempts = 0


def short(trainer: Trainer, model: Any, *args: Any, **kwargs: Any) -> Any:
    global attempts
    loss = compute_loss(trainer, model, *args, **kwargs)
    attempts += model.training
    if model.training and attempts in runs_out:
        raise RuntimeError(MESSAGE)
    return loss


Trainer.compute_loss = short  # type: ignore[method-assign]
