"""Restores model, random state and caches after a rehearsal, so the run stays bit-identical."""

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
    """Return a function that restores the current random states."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state(), random_state(platform)

    def put_back() -> None:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        set_random_state(platform, states[3])

    return put_back


@contextmanager
def put_back(model: PeftModel, platform: Platform) -> Iterator[None]:
    """Let the block train `model`, then restore everything that training changes outside its own trainer.

    That is: the trainable weights, their gradients and whether they have any; attributes and hooks of every module
    (mode, autocast's and TRL's wrappers around `forward`) and the model's configs; all random states; accelerate's
    singletons; bitsandbytes' list of paged optimizer state; the device's cache and its peak. The paged state itself
    is not freed: bitsandbytes (0.50) allocates it by cudaMallocManaged and cannot free it before the process ends. It
    is not used again, so the driver can move it to host memory.
    """
    parameters = list(model.parameters())
    trainable = [parameter.requires_grad for parameter in parameters]
    weights = [parameter.detach().to("cpu", copy=True) if parameter.requires_grad else None for parameter in parameters]
    attributes = [_Attributes(found) for found in _shared(model)]
    put_random_states_back = keep_random_states(platform)
    pages = list(GlobalPageManager.get_instance().paged_tensors)
    gc.freeze()  # so the collections below, and accelerate's, scan only what the block created
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
        GlobalPageManager.get_instance().paged_tensors[:] = pages  # else it would be moved and counted with the run's
        gc.collect()  # trainer and callbacks are a cycle that keeps the optimizer's state
        gc.unfreeze()
        forget_memory(platform)


def _shared(model: PeftModel) -> list[dict[str, Any]]:
    """Return the attribute dictionaries of everything that one trainer leaves to the next."""
    base = model.get_base_model()
    found = [*model.modules(), base.config, base.generation_config]
    singletons = [state._shared_state for state in (PartialState, AcceleratorState, GradientState)]
    return [*map(vars, found), *singletons]


class _Attributes:
    """A snapshot of an attribute dictionary, including the contents of its containers."""

    def __init__(self, found: dict[str, Any]) -> None:
        self.found, self.before = found, dict(found)
        self.inside = [(value, value.copy()) for value in found.values() if isinstance(value, dict | set | list)]

    def put_back(self) -> None:
        """Restore in place, so that hook handles and other references stay valid."""
        self.found.clear()
        self.found.update(self.before)
        for container, content in self.inside:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
