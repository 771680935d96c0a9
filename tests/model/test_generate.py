"""Greedy replies: one argmax after another, of several prompts at once or as a stream, up to the end or a signal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.config.load import load_config
from finetune.data.tokenizer import Chat, load_chat
from finetune.model.generate import TOGETHER, Listener, Reply, reply_to, stream_reply
from finetune.model.load import load_base
from finetune.model.lora import add_lora

QUESTIONS = ("What is two plus one?", "Why?", "Name a color that is neither red nor blue, and say why you like it.")


@pytest.fixture(scope="module")
def chat() -> Chat:
    return load_chat(None)


@pytest.fixture(scope="module")
def prompts(chat: Chat) -> list[list[int]]:
    return [chat.encode_prompt([{"role": "user", "content": question}]) for question in QUESTIONS]


@pytest.fixture(scope="module")
def model(tiny_mistral: Path) -> Any:
    """LoRA on NF4, moved off its start; its </s> is a token like all others."""
    config = load_config("cpu", [f"model.name={tiny_mistral}"])[0]
    made = add_lora(load_base(config.model, config.quantization, "cpu"), config.lora, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        made.get_output_embeddings().weight[2, 0] = 0
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return made


def greedy(model: Any, chat: Chat, prompt: list[int], tokens: int) -> str:
    """One argmax after another, without a cache."""
    ids = list(prompt)
    model.eval()
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return chat.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()


def test_replies_are_greedy_and_in_order_whatever_the_random_state(
    model: Any, chat: Chat, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.generation_config, "do_sample", True)
    monkeypatch.setattr(model.generation_config, "temperature", 5.0)
    wanted = [Reply(greedy(model, chat, prompt, 12), 12, False) for prompt in prompts]
    for seed in (1, 2):
        torch.manual_seed(seed)
        assert reply_to(model, chat, prompts, 12) == wanted
    assert len({reply.text for reply in wanted}) == 3


def test_more_prompts_than_fit_one_batch_are_all_answered(model: Any, chat: Chat, prompts: list[list[int]]) -> None:
    one = reply_to(model, chat, prompts[:1], 3)
    assert one is not None
    assert reply_to(model, chat, prompts[:1] * (TOGETHER + 1), 3) == one * (TOGETHER + 1)


def test_a_reply_ends_at_the_end_token_and_says_so(
    model: Any, chat: Chat, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [[5000, 6000, 2, 0, 0], [7000, 2, 0, 0, 0], [8000, 9000, 10000, 11000, 12000]]
    monkeypatch.setattr(model, "generate", lambda **given: torch.cat([given["input_ids"], torch.tensor(made)], dim=1))
    assert reply_to(model, chat, prompts, 5) == [
        Reply(chat.tokenizer.decode([5000, 6000]), 2, True),
        Reply(chat.tokenizer.decode([7000]), 1, True),
        Reply(chat.tokenizer.decode([8000, 9000, 10000, 11000, 12000]), 5, False),
    ]


def test_a_stop_comes_after_the_token_at_hand(model: Any, chat: Chat, prompts: list[list[int]]) -> None:
    asked = []

    def stopped() -> bool:
        asked.append(None)
        return len(asked) >= 4

    assert reply_to(model, chat, prompts, 10_000, stopped) is None
    assert len(asked) <= 6  # after each of four tokens, and after the batch


def test_a_stream_is_the_reply_in_parts(model: Any, chat: Chat, prompts: list[list[int]]) -> None:
    for prompt in prompts:
        parts: list[str] = []
        reply = stream_reply(model, chat, prompt, 12, Listener(parts.append))
        assert [reply] == reply_to(model, chat, [prompt], 12)
        assert reply is not None and "".join(parts) == reply.text
        assert len(parts) > 6


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("lit é, 夜", ["lit", " é", ",", " 夜"]),  # the last is three tokens, each a byte
        ("a\ufffd\ufffdb", ["a", "\ufffd\ufffdb"]),
        ("é🏮é", ["é", "🏮", "é"]),
        ("so \ufffd", ["so", " \ufffd"]),
        (" a  b ", ["a", "  b"]),
        ("", []),
    ],
)
def test_a_part_has_whole_characters_and_no_space_at_an_end(
    model: Any, chat: Chat, text: str, parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    [row] = chat.encode([[{"role": "assistant", "content": text}]])

    def generate(input_ids: torch.Tensor, streamer: Any, **_: Any) -> torch.Tensor:
        streamer.put(input_ids)
        for token in row.input_ids[1:]:
            streamer.put(torch.tensor([token]))
        streamer.end()
        return torch.cat([input_ids, torch.tensor([row.input_ids[1:]])], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    heard: list[str] = []
    reply = stream_reply(model, chat, [1], 99, Listener(heard.append))
    assert reply == Reply(text.strip(), len(row.input_ids) - 2, True)
    assert heard == parts


def test_a_stream_that_is_stopped_is_no_reply(model: Any, chat: Chat, prompts: list[list[int]]) -> None:
    parts: list[str] = []
    listener = Listener(parts.append, lambda: len(parts) > 2)
    assert stream_reply(model, chat, prompts[0], 10_000, listener) is None
    assert len(parts) <= 4


@pytest.mark.parametrize("training", [True, False])
def test_a_reply_leaves_the_mode_and_the_random_numbers_as_they_were(
    model: Any, chat: Chat, prompts: list[list[int]], training: bool
) -> None:
    model.train(training)
    before = torch.get_rng_state()
    reply_to(model, chat, prompts, 3)
    assert {module.training for module in model.modules()} == {training}
    assert torch.equal(torch.get_rng_state(), before)
