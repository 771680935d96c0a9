"""Selects the decoder layers that recompute their activations, and restores their random numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from transformers import TrainerCallback

from finetune.machine.device import random_state, set_random_state
from finetune.machine.platforms import Platform


def checkpoint_first(layers: Sequence[Any], count: int, platform: Platform) -> None:
    """Let the first `count` decoder `layers` recompute their activations, and the others keep them.

    `gradient_checkpointing_enable` has marked them all. The last ones keep theirs, because their backward pass comes
    first and frees them before the first layer is recomputed. Dropout has the masks of the forward pass either way.
    """
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index < count
        if layer.gradient_checkpointing and platform.random_state_apart:
            again = partial(layer._gradient_checkpointing_func, context_fn=partial(_contexts, platform))
            layer._gradient_checkpointing_func = again


def _contexts(platform: Platform) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return contexts for a layer's forward pass and recomputation, so both draw the same random numbers."""
    return nullcontext(), _drawing_from(random_state(platform), platform)


@contextmanager
def _drawing_from(state: Any, platform: Platform) -> Iterator[None]:
    now = random_state(platform)
    set_random_state(platform, state)
    try:
        yield
    finally:
        set_random_state(platform, now)


class Checkpointing(TrainerCallback):  # type: ignore[misc]
    """Checkpoints the first `count` decoder layers when training begins, after transformers has marked them all."""

    def __init__(self, count: int, platform: Platform) -> None:
        self.count, self.platform = count, platform
        self.layers: Sequence[Any] = ()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.layers = kwargs["model"].get_base_model().model.layers
        checkpoint_first(self.layers, self.count, self.platform)

    def add_layers(self) -> bool:
        """Checkpoint half of the remaining layers, at least one; return False if that is impossible.

        Without training.gradient_checkpointing it is, because transformers has not prepared the layers.
        """
        full = len(self.layers) - self.count
        if full == 0 or not hasattr(self.layers[-1], "_gradient_checkpointing_func"):
            return False
        self.count += (full + 1) // 2
        checkpoint_first(self.layers, self.count, self.platform)
        return True
