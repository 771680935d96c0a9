"""Which platform a machine is, and what it computes on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from finetune.machine.inspect import Machine
from finetune.machine.platforms import PLATFORMS, accelerator, choose, hardware, memory_available_gib
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
        ("h100", H100, 79.1), ("h100", GH200, None), ("h100", LINUX, None), ("m4", M4, 20.5), ("m4", INTEL_MAC, None),
        ("m4", H100, None), ("cpu", LINUX, 12.0), ("cpu", M4, 20.5), ("cpu", H100, 950.0),
    ],
)  # fmt: skip
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
        (A100_40, "NVIDIA A100-SXM4-40GB, an NVIDIA GPU but not an H100: hours and memory differ"),
        (GH200, "NVIDIA GH200 480GB, an NVIDIA GPU but not an H100: hours and memory differ"),
        (M4, "Apple M4"),
        (M2_32, "Apple M2 Max, Apple silicon but not an M4: hours and memory differ"),
        (replace(M4, chip=""), "unknown chip, Apple silicon but not an M4: hours and memory differ"),
        (INTEL_MAC, "none: CPU only"),
        (ROSETTA, "none: CPU only"),
        (LINUX, "none: CPU only"),
    ],
)
def test_what_a_machine_computes_on_is_said_in_words(machine: Machine, text: str) -> None:
    assert accelerator(machine) == text


def test_the_manifest_names_the_gpu_or_the_macs_chip() -> None:
    found = [
        hardware(PLATFORMS[name], machine)["device"] for name, machine in (("h100", H100), ("m4", M4), ("cpu", M4))
    ]
    assert found == ["NVIDIA H100 80GB HBM3", "Apple M4", "Apple M4"]
