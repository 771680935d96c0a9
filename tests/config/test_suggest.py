"""Unknown keys: the nearest known one, what another trainer's word means here, and what is not offered."""

from __future__ import annotations

import pytest

from finetune.config.schema import keys
from finetune.config.suggest import NOT_OFFERED, SYNONYMS, unknown

LEAVES = {path.rsplit(".", 1)[-1] for path in keys()}


def test_every_synonym_means_a_key_and_is_none() -> None:
    assert set(SYNONYMS.values()) <= set(keys())
    assert LEAVES & SYNONYMS.keys() == set()


def test_what_is_not_offered_is_neither_a_key_nor_a_synonym() -> None:
    assert NOT_OFFERED.keys() & (LEAVES | SYNONYMS.keys()) == set()


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("lora.rnak", "lora.r"),
        ("lora.rank", "lora.r"),
        ("rank", "lora.r"),
        ("lora.alhpa", "lora.lora_alpha"),
        ("lora.drop_out", "lora.lora_dropout"),
        ("lora.target_module", "lora.target_modules"),
        ("lroa", "lora"),
        ("lroa.r", "lora.r"),
        ("training.micro_batchsize", "training.per_device_train_batch_size"),
        ("training.epoch", "training.num_train_epochs"),
        ("training.optimizer", "training.optim"),
        ("training.train_file", "dataset.train_file"),
        ("model.sequence_length", "model.max_seq_length"),
        ("sytem_prompt", "system_prompt"),
    ],
)
def test_a_typo_of_a_key_or_of_a_synonym_comes_with_the_key_that_was_meant(path: str, known: str) -> None:
    assert unknown(path, keys()) == f"unknown key; did you mean {known}?"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("lora.use_rslora", "not offered; the scale is lora_alpha / r; set lora.lora_alpha"),
        (
            "lora.use_dora",
            "not offered; the adapter is plain LoRA; for more capacity raise lora.r and lora.lora_alpha",
        ),
        (
            "lora.modules_to_save",
            "not offered; only LoRA weights are trained; lora.target_modules names the layers",
        ),
        (
            "training.neftune_noise_alpha",
            "not offered; to limit overfitting, set lora.lora_dropout or training.early_stopping_patience",
        ),
        ("training.max_grad_value", "not offered; gradients are clipped by their norm; set training.max_grad_norm"),
        ("deepspeed", "not offered; a run uses one GPU"),
        ("training.fsdp", "not offered; a run uses one GPU"),
    ],
)
def test_what_is_left_out_on_purpose_gets_words_and_no_guess(path: str, words: str) -> None:
    assert unknown(path, keys()) == words


@pytest.mark.parametrize("key", [word for why in NOT_OFFERED.values() for word in why.split() if "." in word])
def test_what_there_is_instead_is_there(key: str) -> None:
    assert key.strip(",;.") in keys()
