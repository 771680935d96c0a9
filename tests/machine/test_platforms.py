"""Which platform a machine is, what it and its torch compute on, and what is told when that is not there."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finetune.errors import CheckFailed, OutOfResource
from finetune.files import GIB
from finetune.machine import device
from finetune.machine.device import Torch, read_torch
from finetune.machine.inspect import Machine
from finetune.machine.platforms import PLATFORMS, accelerator, choose, memory_available_gib
from support.recorded import A100_40, EIGHT, GH200, H100, INTEL_MAC, LINUX, LINUX_ARM, M2_32, M4, ROSETTA


@pytest.mark.parametrize(
    ("machine", "name", "reason"),
    [
        (H100, "h100", "found NVIDIA H100 80GB HBM3"),
        (A100_40, "h100", "found NVIDIA A100-SXM4-40GB"),
        (GH200, "h100", "found NVIDIA GH200 480GB"),
        (M4, "m4", "found Apple silicon with 32 GiB of unified memory"),
        (INTEL_MAC, "cpu", "found no NVIDIA driver and no Apple silicon (Darwin x86_64)"),
        (LINUX, "cpu", "found no NVIDIA driver and no Apple silicon (Linux x86_64)"),
        (LINUX_ARM, "cpu", "found no NVIDIA driver and no Apple silicon (Linux aarch64)"),
    ],
)
def test_a_platform_is_chosen_with_its_reason(machine: Machine, name: str, reason: str) -> None:
    assert choose(machine) == (PLATFORMS[name], reason)


@pytest.mark.parametrize(
    ("name", "machine", "free_gib"),
    [
        ("h100", H100, 79.1),
        ("h100", GH200, None),
        ("h100", LINUX, None),
        ("m4", M4, 20.5),
        ("m4", INTEL_MAC, None),
        ("m4", H100, None),
        ("cpu", LINUX, 12.0),
        ("cpu", M4, 20.5),
        ("cpu", H100, 950.0),
    ],
)
def test_free_memory_is_where_the_model_would_live_or_unknown(
    name: str, machine: Machine, free_gib: float | None
) -> None:
    assert memory_available_gib(PLATFORMS[name], machine) == free_gib


def test_every_platform_has_a_config_file_and_offers_what_works_everywhere() -> None:
    from finetune.config.load import ROOT

    assert list(PLATFORMS) == ["h100", "m4", "cpu"]
    for row in PLATFORMS.values():
        assert (ROOT / "configs" / f"training_config_{row.name}.yaml").is_file()
        assert "adamw_torch" in row.optimizers
        assert "sdpa" in row.attentions
    assert [name for name, row in PLATFORMS.items() if row.any_base] == ["cpu"]


def test_an_intel_python_on_apple_silicon_is_told_why_it_gets_the_cpu() -> None:
    reason = "found Apple silicon, but this Python is an Intel build under Rosetta"
    assert choose(ROSETTA) == (PLATFORMS["cpu"], reason)


@pytest.mark.parametrize(
    ("machine", "text"),
    [
        (H100, "NVIDIA H100 80GB HBM3"),
        (EIGHT, "NVIDIA H100 80GB HBM3 (the first of 8)"),
        (A100_40, "NVIDIA A100-SXM4-40GB, an NVIDIA GPU, but no H100: hours and memory differ"),
        (GH200, "NVIDIA GH200 480GB, an NVIDIA GPU, but no H100: hours and memory differ"),
        (M4, "Apple M4"),
        (M2_32, "Apple M2 Max, Apple silicon, but no M4: hours and memory differ"),
        (replace(M4, chip=""), "unknown chip, Apple silicon, but no M4: hours and memory differ"),
        (INTEL_MAC, "none: CPU only"),
        (ROSETTA, "none: CPU only"),
        (LINUX, "none: CPU only"),
    ],
)
def test_what_a_machine_computes_on_is_said_in_words(machine: Machine, text: str) -> None:
    assert accelerator(machine) == text


# What torch reaches ---------------------------------------------------------------------------------------------------


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


# The device -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "label"), [("h100", "NVIDIA GPU"), ("m4", "Apple silicon")])
def test_a_device_that_is_not_here_is_told_before_anything_is_loaded(
    name: str, label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch_sees(monkeypatch, nvidia=False, mps=False)
    with pytest.raises(CheckFailed) as failure:
        device.prepare_device(PLATFORMS[name])
    assert str(failure.value) == (
        f"device: this config is for {label} ({name}), and torch {torch.__version__} sees none; "
        "try --config cpu, or --dry-run, which needs no device"
    )
    device.prepare_device(PLATFORMS["cpu"])


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
def test_on_a_mac_memory_is_what_its_driver_gave_and_may_fill_the_working_set(
    monkeypatch: pytest.MonkeyPatch, free_gib: float, capacity_gib: float
) -> None:
    monkeypatch.setattr("torch.mps.driver_allocated_memory", lambda: 14 * GIB)
    monkeypatch.setattr("torch.mps.recommended_max_memory", lambda: 22.9 * GIB)
    monkeypatch.setattr(device, "read_machine", lambda: replace(M4, memory_free_gib=free_gib))
    assert device.capacity_gib(PLATFORMS["m4"]) == pytest.approx(capacity_gib)
    assert device.peak_memory_gib(PLATFORMS["m4"]) == 14.0
