"""torch's variable-length attention in a tiny Mistral: packed rows as each alone, padded rows and replies by SDPA."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finetune.config.schema import Config
from finetune.data.tokenizer import load_chat
from finetune.model import attention
from finetune.model.generate import reply_to
from finetune.model.load import load_base
from support.stand_ins import VARLEN_SIGNATURES, install_varlen_attn

LENGTHS = (5, 9, 1)
TOLERANCE = 1e-5  # relative; sums in another order
Pair = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture
def model(config: Config) -> Any:
    return load_base(config.changed("model", attn_implementation="torch_varlen").model, config.quantization, "cpu")


def packed() -> dict[str, Any]:
    """Three rows in one sequence, as TRL's collator gives them."""
    ids = torch.randint(3, 32000, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(3))
    bounds = torch.tensor([0, 5, 14, 15], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    return {
        "input_ids": ids,
        "position_ids": positions,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": 9,
        "max_length_k": 9,
    }


def outcome(model: Any, **batch: Any) -> Pair:
    """Logits, and the gradient of the embeddings of what their squares add up to."""
    embedded = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False, **batch).logits
    logits.square().sum().backward()
    assert embedded.grad is not None
    return logits.detach(), embedded.grad


def distance(found: Pair, wanted: Pair) -> float:
    """The larger difference of the two, relative to its norm."""
    return max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in zip(found, wanted, strict=True))


@pytest.mark.parametrize("torch_version", VARLEN_SIGNATURES)
def test_packed_rows_have_the_logits_and_gradients_of_sdpa_with_a_block_mask(
    torch_version: str, model: Any, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = install_varlen_attn(monkeypatch, torch_version)
    found = outcome(model, **packed())
    assert len(calls) == model.config.num_hidden_layers
    assert distance(found, outcome(load_base(config.model, config.quantization, "cpu"), **packed())) < TOLERANCE


def test_what_does_not_scale_by_the_square_root_of_the_head_dimension_is_scaled_before(
    model: Any, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_varlen_attn(monkeypatch, "2.10")
    base = load_base(config.model, config.quantization, "cpu")
    for each in (model, base):
        for layer in each.model.layers:
            layer.self_attn.scaling *= 3
    assert distance(outcome(model, **packed()), outcome(base, **packed())) < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_sdpas(side: str, model: Any, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install_varlen_attn(monkeypatch)
    ids = torch.randint(3, 32000, (2, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, slice(0, 5) if side == "left" else slice(7, 12)] = 0
    found = outcome(model, input_ids=ids, attention_mask=mask)
    wanted = outcome(load_base(config.model, config.quantization, "cpu"), input_ids=ids, attention_mask=mask)
    assert all(map(torch.equal, found, wanted))
    assert not calls


def test_replies_are_sdpas(model: Any, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install_varlen_attn(monkeypatch)
    chat = load_chat(None)
    prompts = [chat.encode_prompt([{"role": "user", "content": text}]) for text in ("Why?", "Why is the sky so blue?")]
    replies = []
    for each in (model, load_base(config.model, config.quantization, "cpu")):
        with torch.no_grad():
            each.get_output_embeddings().weight[2, 0] = 0  # its </s> is a token like all others
        replies.append(reply_to(each, chat, prompts, 8))
    assert replies[0] == replies[1]
    assert not calls


def test_the_installed_torch_refuses_no_argument_of_the_call() -> None:
    """The real function: only its kernel is missing here."""
    query, key = torch.randn(6, 4, 8), torch.randn(6, 2, 8)
    with pytest.raises(NotImplementedError, match=r"_flash_attention_forward.*'CPU' backend"):
        attention.attend(query, key, key, torch.tensor([0, 2, 6], dtype=torch.int32), 4)
