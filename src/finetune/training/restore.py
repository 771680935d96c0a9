"""A trial on the model: all that it changes is put back, so that what follows computes the same bits."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from bitsandbytes.functional import GlobalPageManager
from peft import PeftModel

from finetune.machine.device import forget_memory, random_state, set_random_state
from finetune.machine.platforms import Platform


def keep_random_states(platform: Platform) -> Callable[[], None]:
    """The returned function restores all random states as they are now."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state(), random_state(platform)

    def put_back() -> None:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        set_random_state(platform, states[3])

    return put_back


@contextmanager
def put_back(model: PeftModel, platform: Platform) -> Iterator[None]:
    """Let the block train `model`, then put back all that a training changes outside of its own trainer.

    That is: the trainable weights, their gradients and whether they have any; attributes and hooks of every module
    (mode, autocast's and TRL's wrappers around `forward`) and the model's configs; all random states; accelerate's
    singletons; bitsandbytes' list of paged optimizer state; the device's cache and its peak. The paged state itself is
    not given back: bitsandbytes (0.50) takes it by cudaMallocManaged and has no call that frees it before the process
    ends. Nobody touches it again, so the driver can move it to the machine's memory.
    """
    parameters = list(model.parameters())
    trainable = [parameter.requires_grad for parameter in parameters]
    weights = [parameter.detach().to("cpu", copy=True) if parameter.requires_grad else None for parameter in parameters]
    attributes = [_Attributes(found) for found in _shared(model)]
    put_random_states_back = keep_random_states(platform)
    pages = list(GlobalPageManager.get_instance().paged_tensors)
    gc.freeze()  # the collections below, and accelerate's own, then look at what the block made only
    try:
        yield
    finally:
        for parameter, needed, weight in zip(parameters, trainable, weights, strict=True):
            parameter.requires_grad_(needed)
            parameter.grad = None
            if weight is not None:
                parameter.data = weight.to(parameter.device)
        for attribute in attributes:
            attribute.put_back()
        put_random_states_back()
        GlobalPageManager.get_instance().paged_tensors[:] = pages  # else it would be moved, and counted, with the run's
        gc.collect()  # a trainer and its callbacks hold each other, and with them the optimizer's state
        gc.unfreeze()
        forget_memory(platform)


def _shared(model: PeftModel) -> list[dict[str, Any]]:
    """The attributes, as dictionaries, of all that a trainer finds and the next one would find again."""
    base = model.get_base_model()
    found = [*model.modules(), base.config, base.generation_config]
    singletons = [state._shared_state for state in (PartialState, AcceleratorState, GradientState)]
    return [*map(vars, found), *singletons]


class _Attributes:
    """A dictionary of attributes as it is now, with the contents of those that are containers themselves."""

    def __init__(self, found: dict[str, Any]) -> None:
        self.found, self.before = found, dict(found)
        self.inside = [(value, value.copy()) for value in found.values() if isinstance(value, dict | set | list)]

    def put_back(self) -> None:
        """In place: handles of hooks, and others who hold these dictionaries, go on to work."""
        self.found.clear()
        self.found.update(self.before)
        for container, content in self.inside:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
