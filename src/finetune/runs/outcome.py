"""The result of a training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """The result of a training over all its starts. Losses are mean nats per supervised token."""

    steps: int
    train_loss: float
    first_eval_loss: float | None
    eval_loss: float
    best_step: int
    tokens_per_second: float
    seconds: float
    stopped_early: bool
