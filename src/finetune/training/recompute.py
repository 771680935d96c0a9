"""Which decoder layers compute their activations again in the backward pass, and from which random numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from transformers import TrainerCallback

from finetune.machine.device import random_state, set_random_state
from finetune.machine.platforms import Platform


def checkpoint_first(layers: Sequence[Any], count: int, platform: Platform) -> None:
    """Let the first `count` of transformers' decoder `layers` compute their activations again, the others keep them.

    `gradient_checkpointing_enable` has marked them all. The last ones are kept whole: their backward comes first, and
    so they are gone before the first layer is computed again. Either way dropout has the masks of the forward pass.
    """
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index < count
        if layer.gradient_checkpointing and platform.random_state_apart:
            again = partial(layer._gradient_checkpointing_func, context_fn=partial(_contexts, platform))
            layer._gradient_checkpointing_func = again


def _contexts(platform: Platform) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Of a layer's forward, which torch makes next, and of its recomputation: both draw the same random numbers."""
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
    """`checkpoint_first` of the decoder's layers, after transformers has marked every layer for a new trainer.

    `count` of them are checkpointed.
    """

    def __init__(self, count: int, platform: Platform) -> None:
        self.count, self.platform = count, platform
        self.layers: Sequence[Any] = ()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.layers = kwargs["model"].get_base_model().model.layers
        checkpoint_first(self.layers, self.count, self.platform)

    def add_layers(self) -> bool:
        """Checkpoint half of the layers that are still whole, at least one more; False where that cannot be.

        Without training.gradient_checkpointing, transformers has given no layer the means.
        """
        whole = len(self.layers) - self.count
        if whole == 0 or not hasattr(self.layers[-1], "_gradient_checkpointing_func"):
            return False
        self.count += (whole + 1) // 2
        checkpoint_first(self.layers, self.count, self.platform)
        return True
