"""The distance of two results, and that every trial computes on the device that is named."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from finetune.checks.numerics import linear
from finetune.checks.numerics.attention import packed_attention, sdpa
from finetune.checks.numerics.compare import distance
from finetune.checks.numerics.loss import chunked_loss
from finetune.checks.numerics.optimizer import optimizer_step
from support.stand_ins import by_document, install_flash_attn, install_varlen_attn


@pytest.mark.parametrize(
    ("found", "wanted", "far"),
    [
        ([1.0, -2.0], [1.0, -2.0], 0.0),
        ([1.0, -1.0], [1.0, -2.0], 0.5),
        ([3.0, -4.0], [1.0, -2.0], 1.0),
        ([float("nan"), 0.0], [1.0, -2.0], float("inf")),
        ([float("-inf"), 0.0], [1.0, -2.0], float("inf")),
    ],
)
def test_distance_is_the_largest_difference_over_the_largest_value(
    found: list[float], wanted: list[float], far: float
) -> None:
    assert distance(torch.tensor(found, dtype=torch.bfloat16), torch.tensor(wanted)) == far


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(
    "trial",
    [
        linear.nf4_loss,
        linear.bfloat16_product,
        partial(packed_attention, "flash_attention_2"),
        partial(packed_attention, "torch_varlen"),
        partial(sdpa, dtype=torch.float32),
        partial(chunked_loss, dtype=torch.float32),
        *(partial(optimizer_step, name) for name in ("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit")),
    ],
)
def test_a_trial_computes_on_the_device_that_is_named(
    trial: Callable[[str], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    install_flash_attn(monkeypatch, by_document)
    install_varlen_attn(monkeypatch)
    trial("cpu")
    with pytest.raises((NotImplementedError, RuntimeError), match=r"meta|cget_managed_ptr"):  # no numbers, no pages
        trial("meta")
