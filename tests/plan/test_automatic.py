"""What a run has in the place of `auto`, and how the plan counts it before that is known."""

from __future__ import annotations

import pytest

from finetune.plan.automatic import FUSED, PLAIN, in_words, left_open, settled, used
from finetune.plan.memory import peak_gib
from finetune.plan.model_shape import MISTRAL_7B
from finetune.plan.throughput import conditions
from support.plans import load

SETTLED = ("training.fused_kernels=true", "training.fused_lora=false", "training.checkpointed_layers=7")
OPEN = tuple(f"training.{key}=auto" for key in ("fused_kernels", "fused_lora", "checkpointed_layers"))


def test_only_what_says_auto_is_settled() -> None:
    values = {"fused_kernels": True, "fused_lora": False, "checkpointed_layers": 7}
    assert settled(load(*OPEN), values) == load(*SETTLED)
    other = load("training.fused_kernels=false", "training.fused_lora=true", "training.checkpointed_layers=all")
    assert settled(other, values) == other
    assert (left_open(load(*OPEN)), left_open(other)) == (["fused_kernels", "fused_lora"], [])


def test_what_is_used_is_told_in_values_and_in_words() -> None:
    values = used(load(*SETTLED), MISTRAL_7B)
    assert values == {"fused_kernels": True, "fused_lora": False, "checkpointed_layers": 7}
    assert (in_words(values), in_words(values | PLAIN)) == ("fused kernels", "plain")
    assert in_words(values | {"fused_lora": True}) == "fused kernels and fused LoRA"


@pytest.mark.parametrize("more", [(), ("training.per_device_train_batch_size=1",), ("model.max_seq_length=512",)])
def test_auto_counts_as_the_plain_way_with_all_layers_checkpointed(more: tuple[str, ...]) -> None:
    plain = load("training.fused_kernels=false", "training.fused_lora=false", "training.checkpointed_layers=all", *more)
    assert peak_gib(load(*OPEN, *more), MISTRAL_7B) == peak_gib(plain, MISTRAL_7B)
    open_keys, all_keys = (conditions(config, MISTRAL_7B) for config in (load(*OPEN, *more), plain))
    assert open_keys == {key: value for key, value in all_keys.items() if key not in (*FUSED, "checkpointed_layers")}
    assert used(load(*OPEN, *more), MISTRAL_7B) == used(plain, MISTRAL_7B)


def test_auto_has_nothing_to_choose_where_checkpointing_is_off() -> None:
    assert used(load(*OPEN, "training.gradient_checkpointing=false"), MISTRAL_7B)["checkpointed_layers"] == 0
