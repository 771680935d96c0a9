"""Which decoder layers compute their activations again in the backward pass, and from which random numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from transformers import TrainerCallback

from finetune.machine.device import random_state, set_random_state
from finetune.machine.platforms import Platform


def checkpoint_first(layers: Iterable[Any], count: int, platform: Platform) -> None:
    """Let the first `count` of transformers' decoder `layers` compute their activations again, the others keep them.

    `activation_checkpointing_enable` has marked them all. The last ones are kept whole: their backward comes first, and
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
    """`checkpoint_first` of the decoder's `layers`, after transformers has marked every layer for a new trainer."""

    def __init__(self, layers: int, platform: Platform) -> None:
        self.layers, self.platform = layers, platform

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        checkpoint_first(kwargs["model"].get_base_model().model.layers, self.layers, self.platform)
