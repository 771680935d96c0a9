"""All that a rehearsal touches is put back."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from bitsandbytes.functional import GlobalPageManager

from finetune.files import GIB
from finetune.machine import device as devices
from finetune.machine.platforms import PLATFORMS
from finetune.training.restore import put_back
from support.rehearsals import CPU, DROPOUT, KINDS, attributes, loaded, rehearsed
from support.training import Case, adapter_weights, same


def draws() -> tuple[float, float, float]:
    """The next random numbers, which are then drawn again."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    drawn = random.random(), float(np.random.rand()), float(torch.rand(()))
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    return drawn


@pytest.mark.parametrize("kind", KINDS)
def test_weights_modes_hooks_wrappers_random_numbers_and_singletons_are_put_back(case: Case, kind: str) -> None:
    config = case.config(*DROPOUT, *KINDS[kind])
    case.data(config)
    AcceleratorState._reset_state(reset_partial_state=True)
    model = loaded(config)
    model.eval()
    frozen = next(parameter for parameter in model.parameters() if parameter.requires_grad).requires_grad_(False)
    random.seed(5)
    np.random.seed(6)
    torch.manual_seed(7)
    before = attributes(model), draws(), model.config.to_dict(), model.generation_config.to_dict()
    weights = adapter_weights(model)
    rehearsed(case, config, model)
    after = attributes(model), draws(), model.config.to_dict(), model.generation_config.to_dict()
    assert after == before
    assert "forward" not in vars(model) and "forward" not in vars(model.get_base_model())
    assert same(adapter_weights(model), weights)
    assert {parameter.grad for parameter in model.parameters()} == {None}
    assert not frozen.requires_grad


def test_whatever_the_block_does_to_parameters_is_undone_also_where_it_raises(case: Case) -> None:
    model = loaded(case.config())
    base, adapter = (
        model.get_input_embeddings().weight,
        next(filter(lambda value: value.requires_grad, model.parameters())),
    )
    before = adapter.detach().clone()
    with pytest.raises(ZeroDivisionError), put_back(model, CPU):
        adapter.data = torch.ones_like(adapter).bfloat16()
        adapter.requires_grad_(False)
        base.requires_grad_(True)
        base.grad = torch.ones_like(base)
        raise ZeroDivisionError
    assert (adapter.requires_grad, base.requires_grad, base.grad) == (True, False, None)
    assert adapter.dtype == torch.float32
    assert torch.equal(adapter, before)


def test_paged_optimizer_state_is_counted_and_does_not_stay_in_bitsandbytes_list(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its get_state_buffer (0.50) leaves it. Nothing is moved: it ends the process where its library cannot."""
    manager = GlobalPageManager.get_instance()
    monkeypatch.setattr(GlobalPageManager, "prefetch_all", lambda *_, **__: pytest.fail("moved"))
    earlier = torch.zeros(1)
    monkeypatch.setattr(manager, "paged_tensors", [earlier])
    with put_back(loaded(case.config()), CPU):
        manager.paged_tensors.append(torch.empty(2**28, device="meta"))  # float32: 1 GiB
        assert [round(devices.paged_gib(row), 6) for row in PLATFORMS.values()] == [1, 0, 0]
        monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda: 60 * GIB)
        monkeypatch.setattr(torch.accelerator, "max_memory_reserved", lambda: 70 * GIB)
        h100 = PLATFORMS["h100"]
        assert (round(devices.peak_memory_gib(h100), 6), round(devices.peak_held_gib(h100), 6)) == (61, 71)
    assert [id(tensor) for tensor in manager.paged_tensors] == [id(earlier)]


@pytest.mark.parametrize("name", ["h100", "m4"])
def test_a_device_is_waited_for_asked_for_its_random_numbers_and_relieved(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform, calls = PLATFORMS[name], []
    device = SimpleNamespace(
        synchronize=lambda: calls.append("synchronize"),
        get_rng_state=lambda: "a state",
        set_rng_state=lambda state: calls.append(f"set {state}"),
    )
    monkeypatch.setattr(torch, "get_device_module", {platform.device: device}.__getitem__)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", lambda: calls.append("reset"))
    devices.synchronize(platform)
    devices.set_random_state(platform, devices.random_state(platform))
    devices.forget_memory(platform)
    assert calls == ["synchronize", "set a state", "empty", "reset"]
