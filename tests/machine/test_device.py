"""What torch reaches of a device, and what is told when it is not there or its memory is too small."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finetune.errors import CheckFailed, OutOfResource
from finetune.files import GIB
from finetune.machine import device
from finetune.machine.device import Torch, read_torch
from finetune.machine.platforms import PLATFORMS
from support.recorded import M4


def torch_sees(monkeypatch: pytest.MonkeyPatch, nvidia: bool, mps: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: nvidia)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def test_torch_on_a_cpu_reaches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_sees(monkeypatch, nvidia=False, mps=False)
    built_for, mps_built = torch.version.cuda, torch.backends.mps.is_built()
    assert read_torch() == Torch(str(torch.__version__), built_for=built_for, mps_built=mps_built)


def test_torch_on_an_h100_tells_its_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_sees(monkeypatch, nvidia=True, mps=False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, index))
    found = read_torch()
    assert (found.built_for, found.sees_nvidia, found.capability, found.sees_mps) == ("12.8", True, (9, 0), False)


def test_torch_on_a_mac_tells_the_gpus_working_set(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_sees(monkeypatch, nvidia=False, mps=True)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 22 * 2**30)
    found = read_torch()
    assert (found.mps_built, found.sees_mps, found.working_set_gib, found.capability) == (True, True, 22.0, None)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ('ImportError("libcudart.so.12: cannot open\\nand more")', "libcudart.so.12: cannot open"),
        ('OSError("libtorch_cuda.so: undefined symbol")', "libtorch_cuda.so: undefined symbol"),
        ('RuntimeError("compiled with another numpy")', "compiled with another numpy"),
        ("ImportError", "ImportError"),
    ],
)
def test_a_torch_that_cannot_be_imported_is_told_with_its_reason(
    error: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text(f"raise {error}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch")
    with pytest.raises(CheckFailed) as failure:
        read_torch()
    assert str(failure.value) == f"torch cannot be imported: {reason}"


@pytest.mark.parametrize(("name", "label"), [("h100", "NVIDIA GPU"), ("m4", "Apple silicon")])
def test_a_device_that_is_not_here_is_told_before_anything_is_loaded(
    name: str, label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch_sees(monkeypatch, nvidia=False, mps=False)
    with pytest.raises(CheckFailed) as failure:
        device.prepare_device(PLATFORMS[name])
    assert str(failure.value) == (
        f"device: this config is for {label} ({name}), but torch {torch.__version__} sees none; "
        "try --config cpu, or --dry-run, which needs no device"
    )
    device.prepare_device(PLATFORMS["cpu"])


@pytest.mark.parametrize(("own", "in_effect"), [(None, "1"), ("0", "0")])
def test_an_h100_repeats_its_backwards_unless_the_user_set_it_otherwise(
    own: str | None, in_effect: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    torch_sees(monkeypatch, nvidia=True, mps=False)
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", own or "")  # so that afterwards it is what it was
    if own is None:
        monkeypatch.delenv("FLASH_ATTENTION_DETERMINISTIC")
    matmul = torch.backends.cuda.matmul
    request.addfinalizer(lambda: setattr(matmul, "allow_bf16_reduced_precision_reduction", True))
    assert matmul.allow_bf16_reduced_precision_reduction is True  # torch's own
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda _: None)
    device.prepare_device(PLATFORMS["h100"])
    assert os.environ["FLASH_ATTENTION_DETERMINISTIC"] == in_effect
    assert matmul.allow_bf16_reduced_precision_reduction is False


@pytest.mark.parametrize(
    "found",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
        "MPS backend out of memory (MPS allocated: 18.0 GB)",
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to",
    ],
)
def test_too_little_memory_on_any_device_is_told_with_what_to_lower(found: str) -> None:
    with pytest.raises(OutOfResource) as failure, device.memory_errors_explained("lower it"):
        raise RuntimeError(f"{found}\nand more")
    assert str(failure.value) == (f"out of memory: {found}\nlower it")


def test_any_other_error_of_the_device_is_passed_on() -> None:
    with pytest.raises(RuntimeError, match=r"^shape mismatch$"), device.memory_errors_explained("lower it"):
        raise RuntimeError("shape mismatch")


# A Mac's memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("free_gib", "capacity_gib"), [(20.5, 22.9), (6.0, 20.0), (0.0, 14.0)])
def test_on_a_mac_what_is_free_or_held_may_be_filled_up_to_the_working_set(
    monkeypatch: pytest.MonkeyPatch, free_gib: float, capacity_gib: float
) -> None:
    monkeypatch.setattr("torch.mps.driver_allocated_memory", lambda: 14 * GIB)
    monkeypatch.setattr("torch.mps.recommended_max_memory", lambda: 22.9 * GIB)
    monkeypatch.setattr(device, "read_machine", lambda: replace(M4, memory_free_gib=free_gib))
    assert device.capacity_gib(PLATFORMS["m4"]) == pytest.approx(capacity_gib)
