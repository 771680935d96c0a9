"""What a training ended with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What a training came to, all starts together. Losses are mean nats a supervised token."""

    steps: int
    train_loss: float
    first_eval_loss: float | None
    eval_loss: float
    best_step: int
    tokens_per_second: float
    seconds: float
    stopped_early: bool
