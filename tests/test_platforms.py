"""Which platform a machine is, from recorded machines and recorded answers of nvidia-smi."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from finetune import platforms
from finetune.errors import CheckFailed, OutOfResource
from finetune.platforms import PLATFORMS, Machine, choose, memory_available_gib, read_machine

H100 = Machine("Linux", "x86_64", ("NVIDIA H100 80GB HBM3",), 79.1, 1007.6, 950.0)
A100 = Machine("Linux", "x86_64", ("NVIDIA A100-SXM4-40GB",) * 8, 39.4, 1007.6, 950.0)
GRACE = Machine("Linux", "aarch64", ("NVIDIA GH200 480GB",), None, 573.0, 500.0)
MAC_M4 = Machine("Darwin", "arm64", (), None, 32.0, 20.5)
INTEL_MAC = Machine("Darwin", "x86_64", (), None, 16.0, 8.0)
LINUX = Machine("Linux", "x86_64", (), None, 15.6, 12.0)
LINUX_ARM = Machine("Linux", "aarch64", (), None, 7.7, 6.0)


@pytest.mark.parametrize(
    ("machine", "name", "reason"),
    [
        (H100, "h100", "found NVIDIA H100 80GB HBM3"),
        (A100, "h100", "found NVIDIA A100-SXM4-40GB"),
        (GRACE, "h100", "found NVIDIA GH200 480GB"),
        (MAC_M4, "m4", "found Apple silicon with 32 GiB of unified memory"),
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
        ("h100", GRACE, None),
        ("h100", LINUX, None),
        ("m4", MAC_M4, 20.5),
        ("m4", INTEL_MAC, None),
        ("m4", H100, None),
        ("cpu", LINUX, 12.0),
        ("cpu", MAC_M4, 20.5),
        ("cpu", H100, 950.0),
    ],
)
def test_free_memory_is_where_the_model_would_live_or_unknown(
    name: str, machine: Machine, free_gib: float | None
) -> None:
    assert memory_available_gib(PLATFORMS[name], machine) == free_gib


def test_every_platform_has_a_config_file_and_offers_what_works_everywhere() -> None:
    from finetune.config import ROOT

    assert list(PLATFORMS) == ["h100", "m4", "cpu"]
    for row in PLATFORMS.values():
        assert (ROOT / "configs" / f"training_config_{row.name}.yaml").is_file()
        assert "adamw_torch" in row.optimizers
        assert "sdpa" in row.attentions
    assert [name for name, row in PLATFORMS.items() if row.any_base] == ["cpu"]


@pytest.fixture
def nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Machine]:
    """Reads a Linux machine on which nvidia-smi prints the given text, or raises the given exception."""

    def reading(answer: Any) -> Machine:
        def answered(command: list[str], **options: Any) -> SimpleNamespace:
            assert command[0] == "nvidia-smi"
            assert options["check"] and 0 < options["timeout"] <= 30
            if isinstance(answer, BaseException):
                raise answer
            return SimpleNamespace(stdout=answer)

        monkeypatch.setattr(subprocess, "run", answered)
        return read_machine()

    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    return reading


@pytest.mark.parametrize(
    ("answer", "gpus", "free_gib"),
    [
        ("NVIDIA H100 80GB HBM3, 81079\n", ("NVIDIA H100 80GB HBM3",), 81079 / 1024),
        ("NVIDIA A100-SXM4-40GB, 40336\nTesla T4, 15102\n", ("NVIDIA A100-SXM4-40GB", "Tesla T4"), 40336 / 1024),
        ("NVIDIA GB10, [N/A]\n", ("NVIDIA GB10",), None),
        ("NVIDIA H100, NVL, 94000\n", ("NVIDIA H100, NVL",), 94000 / 1024),
        ("", (), None),
        ("No devices were found\n", (), None),
        ("Failed to initialize NVML: Driver/library version mismatch\n", (), None),
        ("GPU access blocked, see the log\n", (), None),
        ("\x00\ufffd,\n,,,\n", (), None),
    ],
)
def test_gpus_and_free_memory_are_read_from_what_nvidia_smi_prints(
    nvidia_smi: Callable[[Any], Machine], answer: str, gpus: tuple[str, ...], free_gib: float | None
) -> None:
    machine = nvidia_smi(answer)
    assert (machine.gpus, machine.gpu_free_gib) == (gpus, free_gib)
    assert choose(machine)[0].name == ("h100" if gpus else "cpu")


@pytest.mark.parametrize(
    "error",
    [
        subprocess.CalledProcessError(9, "nvidia-smi"),
        subprocess.TimeoutExpired("nvidia-smi", 20),
        PermissionError(13, "Permission denied"),
        FileNotFoundError(2, "No such file or directory"),
        OSError(8, "Exec format error"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_driver_that_does_not_answer_is_no_gpu(nvidia_smi: Callable[[Any], Machine], error: Exception) -> None:
    machine = nvidia_smi(error)
    assert (machine.gpus, machine.gpu_free_gib) == ((), None)
    assert choose(machine)[0].name == "cpu"


def test_without_nvidia_smi_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something was started"))
    assert read_machine().gpus == ()


def test_an_answer_that_is_not_utf8_is_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf '\\377\\376 broken\\n'\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_machine().gpus == ()


@pytest.mark.parametrize(
    ("limit", "free_gib"), [("max\n", 12.0), ("4294967296\n", 4.0), ("1099511627776\n", 12.0), (None, 12.0)]
)
def test_free_memory_is_at_most_what_the_container_allows(
    limit: str | None, free_gib: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "memory.max"
    if limit is not None:
        path.write_text(limit, encoding="utf-8")
    monkeypatch.setattr(platforms, "Path", lambda _: path)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    memory = SimpleNamespace(total=16 * 2**30, available=12 * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    machine = read_machine()
    assert (machine.memory_gib, machine.memory_free_gib) == (16.0, free_gib)


@pytest.mark.parametrize(("name", "label"), [("h100", "NVIDIA GPU"), ("m4", "Apple silicon")])
def test_a_device_that_is_not_here_is_told_before_anything_is_loaded(
    name: str, label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(CheckFailed) as failure:
        platforms.prepare_device(PLATFORMS[name])
    assert str(failure.value) == (
        f"device: this config is for {label} ({name}), and torch {torch.__version__} sees none; "
        "try --config cpu, or --dry-run, which needs no device"
    )
    platforms.prepare_device(PLATFORMS["cpu"])


@pytest.mark.parametrize(
    "found",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
        "MPS backend out of memory (MPS allocated: 18.0 GB)",
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to",
    ],
)
def test_too_little_memory_on_any_device_is_told_with_what_to_lower(found: str) -> None:
    with pytest.raises(OutOfResource) as failure, platforms.memory_errors_explained():
        raise RuntimeError(f"{found}\nand more")
    assert str(failure.value) == (
        f"out of memory: {found}\n"
        "lower training.per_device_train_batch_size and raise training.gradient_accumulation_steps as much"
    )


def test_any_other_error_of_the_device_is_passed_on() -> None:
    with pytest.raises(RuntimeError, match=r"^shape mismatch$"), platforms.memory_errors_explained():
        raise RuntimeError("shape mismatch")
