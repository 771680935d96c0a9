"""Which decoder layers compute their activations again in the backward pass."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class Checkpointing(TrainerCallback):  # type: ignore[misc]
    """Only the first `layers` decoder layers are computed again in the backward pass; the others keep everything.

    Here, since transformers marks every layer each time that a training begins. The last ones are kept whole: their
    backward comes first, and so they are gone before the first layer is computed again.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for index, layer in enumerate(kwargs["model"].get_base_model().model.layers):
            layer.gradient_checkpointing = index < self.layers
