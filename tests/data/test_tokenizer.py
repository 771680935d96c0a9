"""A conversation's ids and labels are those of Mistral's own tokenizer, and of the chat template saved with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from finetune.data.template import CHATML_FORMAT, IGNORED, MISTRAL_FORMAT, Encoded, Messages
from finetune.data.tokenizer import Chat, Reference, load_chat
from finetune.errors import ConfigError
from support.conversations import BOS, EOS, conversation, conversations, encoded, weighted


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.fixture(scope="module")
def mistral_common() -> Any:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    return MistralTokenizer.v1()


AWKWARD = [
    "a  b   c    d",
    *(f"{' ' * count}a" for count in (1, 2, 14, 15, 16, 17, 18, 31, 32, 33, 64, 100)),
    *(f"if x:\n{' ' * count}y\n" for count in (4, 15, 16, 17, 18, 20, 24, 40)),
    "a" + " " * 40,
    "▁▁▁",
    " ▁ ▁▁ a",
    "tab\tand\t\ttabs",
    "\n\n\nlines\r\n\r",
    "😀👩‍👩‍👧‍👦🇩🇪",
    "日本語と中文と한국어",
    "e\u0301 a\u0308\u0323 \u0301",
    "א\u05b0ב עִבְרִית",
    "\U0001f9ff\U0010fffd\ufffe\uffff\ufffd",
    "𓀀𒀀",
    "\0",
    "a\0b",
    "\x1b[31m\x7f\x80",
    "\u200b\u2028\xa0\u3000.",
    "<s>",
    "</s>",
    "a</s>b</s>",
    "</s><s>[INST] x [/INST]",
    "<unk>",
    "<0x0A><0x00>",
    "[INST]",
    "[/INST]",
    " [/INST] ",
    "< s> </ s>",
    "<</s>s>",
    "a" * 300,
    "====----####" * 9,
]


@pytest.mark.parametrize("text", AWKWARD, ids=lambda text: ascii(text)[:30])
def test_awkward_text_in_any_message_gives_mistrals_own_ids_and_labels(
    mistral: Chat, reference: Reference, text: str
) -> None:
    for messages in (
        conversation(text, "x"),
        conversation("x", text),
        conversation("x", "x", system=text),
        conversation("x", text, text, "x", system="x"),
    ):
        assert encoded(mistral, messages) == reference.encode(messages)
        assert mistral.encode([messages]) == mistral.encode_as_saved([messages])


@settings(max_examples=300, deadline=None)
@given(messages=conversations())
def test_any_conversation_gives_mistrals_own_ids_and_labels(
    mistral: Chat, reference: Reference, messages: Messages
) -> None:
    assert encoded(mistral, messages) == reference.encode(messages)
    assert mistral.encode([messages, messages]) == mistral.encode_as_saved([messages, messages])


def test_every_piece_of_the_vocabulary_as_text_gives_mistrals_own_ids(mistral: Chat, reference: Reference) -> None:
    pieces = [piece.replace("▁", " ") for piece in mistral.tokenizer.get_vocab()]
    rows = [conversation("x", "".join(pieces[start : start + 40])) for start in range(0, len(pieces), 40)]
    for messages, row in zip(rows, mistral.encode(rows), strict=True):
        assert (row.input_ids, row.labels) == reference.encode(messages)
    assert mistral.encode(rows) == mistral.encode_as_saved(rows)


@settings(max_examples=60, deadline=None)
@given(messages=conversations())
def test_the_reference_says_what_mistral_common_says_of_the_whole_conversation(
    reference: Reference, mistral_common: Any, messages: Messages
) -> None:
    from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
    from mistral_common.protocol.instruct.request import InstructRequest

    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    kinds: dict[str, Any] = {"user": UserMessage, "assistant": AssistantMessage}
    request = InstructRequest(
        messages=[
            kinds[message["role"]](content=message["content"]) for message in messages if message["role"] in kinds
        ],
        system_prompt=system,
    )
    assert reference.encode(messages)[0] == mistral_common.instruct_tokenizer.encode_instruct(request).tokens


@settings(max_examples=60, deadline=None)
@given(messages=conversations())
def test_a_prompt_is_what_mistral_common_makes_of_a_request_and_where_the_row_begins(
    mistral: Chat, mistral_common: Any, messages: Messages
) -> None:
    from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    kinds: dict[str, Any] = {"user": UserMessage, "assistant": AssistantMessage, "system": SystemMessage}
    asked = messages[:-1]
    request = ChatCompletionRequest(messages=[kinds[message["role"]](content=message["content"]) for message in asked])
    prompt = mistral_common.encode_chat_completion(request).tokens
    assert mistral.encode_prompt(asked) == prompt
    assert encoded(mistral, messages)[0][: len(prompt)] == prompt


@settings(max_examples=100, deadline=None)
@given(messages=conversations())
def test_text_is_never_a_control_token(mistral: Chat, messages: Messages) -> None:
    input_ids, _ = encoded(mistral, messages)
    replies = sum(message["role"] == "assistant" for message in messages)
    assert [token for token in input_ids if token in (0, BOS, EOS)] == [BOS] + [EOS] * replies
    assert (input_ids[0], input_ids[-1]) == (BOS, EOS)


def test_loss_lies_on_the_assistants_text_and_its_end_token_only(mistral: Chat) -> None:
    input_ids, labels = encoded(mistral, conversation("Why?", "Because.", "And?", "So.\n", system="Be short."))
    spans: list[list[int]] = [[]]
    for token, label in zip(input_ids, labels, strict=True):
        assert label in (token, IGNORED)
        if label != IGNORED:
            spans[-1].append(token)
        elif spans[-1]:
            spans.append([])
    assert [mistral.tokenizer.decode(span, skip_special_tokens=False) for span in spans] == [
        "Because.</s>",
        "So.\n</s>",
    ]


@settings(max_examples=100, deadline=None)
@given(messages=conversations(), learned=st.lists(st.booleans(), min_size=3, max_size=3))
def test_an_answer_of_weight_0_has_the_same_ids_and_no_labels(
    mistral: Chat, reference: Reference, messages: Messages, learned: list[bool]
) -> None:
    answers = [message for message in messages if message["role"] == "assistant"]
    plain = mistral.encode([messages])[0]
    for message, it_is in zip(answers, learned, strict=False):
        message |= {} if it_is else {"weight": 0}
    row = mistral.encode([messages])[0]
    assert row == mistral.encode_as_saved([messages])[0]
    assert (row.input_ids, row.labels) == reference.encode(messages)
    assert row.input_ids == plain.input_ids
    turn = np.searchsorted(plain.turn_ends, np.arange(len(row.labels)), side="right")
    masked = [label if learned[place] else IGNORED for label, place in zip(plain.labels, turn, strict=True)]
    assert row.labels == masked
    assert row.turn_ends == [end for end, it_is in zip(plain.turn_ends, learned, strict=False) if it_is]


def test_the_ids_of_a_short_conversation_are_these(mistral: Chat) -> None:
    assert mistral.encode([conversation("Hi", "Hello", system="Be nice")])[0] == Encoded(
        input_ids=[BOS, 733, 16289, 28793, 1739, 5171, 13, 13, 23809, 733, 28748, 16289, 28793, 22557, EOS],
        labels=[*[IGNORED] * 13, 22557, EOS],
        turn_ends=[15],
    )


def test_rows_of_one_call_are_encoded_as_each_alone(mistral: Chat) -> None:
    rows = [conversation("a", "b"), conversation("c", "d", "e", "f", system="g"), conversation("h" * 50, "i")]
    assert mistral.encode(rows) == [mistral.encode([row])[0] for row in rows]
    assert mistral.encode([]) == []


def test_chatml_text_is_never_a_control_token(chatml: Chat) -> None:
    text = "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
    input_ids, labels = encoded(chatml, conversation(text, text, system=text))
    start, end = chatml.token_id("<|im_start|>"), chatml.token_id("<|im_end|>")
    assert [token for token in input_ids if token < 3] == [start, end] * 3
    assert [label for label in labels if 0 <= label < 3] == [end]


def test_chatml_loss_is_on_answers_and_their_end_token_unless_their_weight_is_0(chatml: Chat) -> None:
    messages = conversation("Why?", "Because.", "And?", "So.", system="Be short.")
    for first, answers in ((1, "Because.<|im_end|>So.<|im_end|>"), (0, "So.<|im_end|>")):
        input_ids, labels = encoded(chatml, weighted(messages, first, 1))
        supervised = [label for label in labels if label != IGNORED]
        assert chatml.tokenizer.decode(supervised, skip_special_tokens=False) == answers
        assert chatml.tokenizer.decode(input_ids, skip_special_tokens=False) == (
            "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
            "<|im_start|>assistant\nBecause.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n"
            "<|im_start|>assistant\nSo.<|im_end|>\n"
        )


# --- which tokenizer and format belong to a model


def test_without_a_folder_the_chat_is_mistrals_with_its_32000_tokens(mistral: Chat) -> None:
    assert mistral.format is MISTRAL_FORMAT
    assert mistral.certifiable
    assert mistral.tokenizer.get_vocab_size() == 32000


def test_a_folder_without_a_tokenizer_or_with_mistrals_vocabulary_is_mistrals(tmp_path: Path, mistral: Chat) -> None:
    assert load_chat(tmp_path).fingerprint == mistral.fingerprint
    (tmp_path / "tokenizer.json").write_text(mistral.tokenizer.to_str())
    assert load_chat(tmp_path).fingerprint == mistral.fingerprint


def test_a_tokenizer_that_knows_im_start_is_the_demo_models(chatml: Chat, mistral: Chat) -> None:
    assert chatml.format is CHATML_FORMAT
    assert not chatml.certifiable
    assert chatml.fingerprint != mistral.fingerprint


def config_error(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_chat(folder)
    return str(caught.value)


def test_a_foreign_vocabulary_is_refused_with_its_size(tmp_path: Path) -> None:
    own = tmp_path / "tokenizer.json"
    Tokenizer(WordLevel({"a": 0, "b": 1, "c": 2}, "a")).save(str(own))
    assert config_error(tmp_path) == (
        f"config: 1 problem\n  model.name: {own} is not Mistral-7B-Instruct-v0.2's tokenizer: 3 tokens, expected 32000"
    )


def test_a_vocabulary_of_the_same_size_is_refused_with_the_token_that_differs(tmp_path: Path, mistral: Chat) -> None:
    own = tmp_path / "tokenizer.json"
    saved = json.loads(mistral.tokenizer.to_str())
    last = list(saved["model"]["vocab"])[-1]
    saved["model"]["vocab"]["another"] = saved["model"]["vocab"].pop(last)
    own.write_text(json.dumps(saved))
    assert config_error(tmp_path) == (
        f"config: 1 problem\n  model.name: {own} is not Mistral-7B-Instruct-v0.2's tokenizer: "
        f"token {last!r} has id None, expected 31999"
    )


def test_a_vocabulary_with_two_ids_exchanged_is_refused(tmp_path: Path, mistral: Chat) -> None:
    own = tmp_path / "tokenizer.json"
    saved = json.loads(mistral.tokenizer.to_str())
    vocab = saved["model"]["vocab"]
    vocab["▁the"], vocab["▁of"] = vocab["▁of"], vocab["▁the"]
    own.write_text(json.dumps(saved))
    start = f"config: 1 problem\n  model.name: {own} is not Mistral-7B-Instruct-v0.2's tokenizer: token "
    the, of = vocab["▁of"], vocab["▁the"]
    assert config_error(tmp_path) in (
        f"{start}'▁the' has id {of}, expected {the}",
        f"{start}'▁of' has id {the}, expected {of}",
    )


@pytest.mark.parametrize("content", [b"{", b"", b"\xff", b"{}"])
def test_a_broken_tokenizer_file_is_a_config_error(tmp_path: Path, content: bytes) -> None:
    own = tmp_path / "tokenizer.json"
    own.write_bytes(content)
    with pytest.raises(Exception) as of_library:  # it raises no other kind
        Tokenizer.from_file(str(own))
    assert config_error(tmp_path) == (
        f"config: 1 problem\n  model.name: {own} cannot be read as a tokenizer: {of_library.value}"
    )


def test_a_chatml_tokenizer_without_the_end_token_is_a_config_error(tmp_path: Path) -> None:
    vocab = {"<|im_start|>": 0, "a": 1}
    tokenizer = Tokenizer(WordLevel(vocab, "a"))
    tokenizer.add_special_tokens(["<|im_start|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError) as caught:
        load_chat(tmp_path).encode([conversation("a", "a")])
    assert str(caught.value) == (
        "config: 1 problem\n  model.name: its tokenizer has no '<|im_end|>', which the chatml format needs"
    )
