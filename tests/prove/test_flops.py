"""Floating point operations of a step, and the share of a device's peak."""

from __future__ import annotations

import pytest

from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.plan.model_shape import MISTRAL_7B
from finetune.prove.flops import (
    attention_flops,
    linear_parameters,
    peak_flops,
    recomputed_flops,
    step_flops,
    utilization,
)


@pytest.fixture
def h100() -> Config:
    return load_config("h100")[0]


def test_the_flops_of_mistral_7b_are_those_of_its_parameters(h100: Config) -> None:
    assert linear_parameters(MISTRAL_7B) == 6_979_321_856
    a_token = 4 * (6_979_321_856 + 131_072_000) + 6 * 41_943_040
    attention = 3 * 32 * 2 * 4096**2 * 4096
    assert step_flops(h100, MISTRAL_7B, [4096]) == 4096 * a_token + attention


def test_attention_costs_a_packed_row_what_it_costs_alone() -> None:
    assert attention_flops(MISTRAL_7B, [100, 300]) == attention_flops(MISTRAL_7B, [100]) + attention_flops(
        MISTRAL_7B, [300]
    )


def test_checkpointing_half_the_layers_computes_half_the_forward_pass_again(h100: Config) -> None:
    whole = recomputed_flops(h100, MISTRAL_7B, [4096], 32)
    assert recomputed_flops(h100, MISTRAL_7B, [4096], 16) == whole / 2
    assert whole == 2 * (6_979_321_856 + 41_943_040) * 4096 + attention_flops(MISTRAL_7B, [4096])


def test_utilization_is_told_only_of_a_device_whose_peak_is_known(h100: Config) -> None:
    seconds = step_flops(h100, MISTRAL_7B, [4096] * 16) / (0.4 * 989.4e12)
    known = utilization(h100, MISTRAL_7B, [4096] * 16, 32, seconds, "NVIDIA H100 80GB HBM3")
    assert known["mfu"] == pytest.approx(0.4)
    assert known["hfu"] == pytest.approx(0.4 * 1.48, rel=0.01)
    assert utilization(h100, MISTRAL_7B, [4096], 32, 1.0, "CPU only") == {"mfu": None, "hfu": None}


@pytest.mark.parametrize(
    ("device", "peak"),
    [("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H200", 989.4e12), ("NVIDIA H100 PCIe", None), ("CPU only", None)],
)
def test_a_peak_is_that_of_the_device_by_name(device: str, peak: float | None) -> None:
    assert peak_flops(device) == peak
