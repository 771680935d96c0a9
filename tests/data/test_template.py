"""The Jinja templates give the same ids and labels as the tokenizer, also once saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from finetune.data.template import IGNORED, Messages
from finetune.data.tokenizer import Chat
from support.conversations import EOS, conversation, conversations, encoded, texts

CONTROL = ("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")


def fast_tokenizer(chat: Chat) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=chat.tokenizer, bos_token=chat.format.bos, eos_token=chat.format.end,
        pad_token=chat.format.pad, chat_template=chat.format.template,
    )  # fmt: skip


def reloaded(chat: Chat, folder: Path) -> Any:
    from transformers import AutoTokenizer

    fast_tokenizer(chat).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def templated(tokenizer: Any, messages: Messages) -> tuple[list[int], list[int]]:
    found = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = found["input_ids"], found["assistant_masks"]
    return ids, [token if carried else IGNORED for token, carried in zip(ids, mask, strict=True)]


@pytest.fixture(scope="module")
def mistral_templates(mistral: Chat, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return [fast_tokenizer(mistral), reloaded(mistral, tmp_path_factory.mktemp("mistral"))]


@pytest.fixture(scope="module")
def chatml_templates(chatml: Chat, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return [fast_tokenizer(chatml), reloaded(chatml, tmp_path_factory.mktemp("chatml-saved"))]


# A template is text, so a control token's own text in a message would become one: only Chat.encode keeps it apart.
plain = texts.filter(lambda text: not any(token in text for token in CONTROL))


@settings(max_examples=60, deadline=None)
@given(messages=conversations(plain))
def test_mistrals_template_gives_the_same_ids_and_labels_also_when_saved_and_loaded(
    mistral: Chat, mistral_templates: list[Any], messages: Messages
) -> None:
    for tokenizer in mistral_templates:
        assert templated(tokenizer, messages) == encoded(mistral, messages)


@settings(max_examples=60, deadline=None)
@given(messages=conversations(plain.filter(lambda text: not text[0].isspace())))
def test_the_chatml_template_gives_the_same_ids_and_labels_also_when_saved_and_loaded(
    chatml: Chat, chatml_templates: list[Any], messages: Messages
) -> None:
    for tokenizer in chatml_templates:
        assert templated(tokenizer, messages) == encoded(chatml, messages)


def test_the_template_and_a_prompt_open_the_reply_alike(
    mistral: Chat, chatml: Chat, mistral_templates: list[Any], chatml_templates: list[Any]
) -> None:
    asked = conversation("Why?", "Because.", "And?", system="Be short.")
    for chat, tokenizers in ((mistral, mistral_templates), (chatml, chatml_templates)):
        for tokenizer in tokenizers:
            found = tokenizer.apply_chat_template(asked, tokenize=True, return_dict=True, add_generation_prompt=True)
            assert found["input_ids"] == chat.encode_prompt(asked)


def test_mistrals_template_refuses_roles_out_of_turn(mistral_templates: list[Any]) -> None:
    from jinja2 import TemplateError

    for messages in (
        conversation("a")[:1] * 2,
        conversation("a", "b")[1:],
        conversation("a") + conversation(system="b"),
    ):
        with pytest.raises(
            TemplateError, match=r"^roles must be: system \(first only\), then user and assistant in turn$"
        ):
            mistral_templates[0].apply_chat_template(messages, tokenize=False)


def test_making_a_template_tokenizer_leaves_the_chats_own_one_as_it_was(mistral: Chat) -> None:
    fast_tokenizer(mistral).apply_chat_template(conversation("a", "b"), tokenize=True)
    assert EOS not in mistral.encode([conversation("</s>", "b")])[0].input_ids[:-1]
