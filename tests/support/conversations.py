"""Conversations that are awkward for a tokenizer, and a small ChatML tokenizer."""

from __future__ import annotations

from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from finetune.data.template import Messages
from finetune.data.tokenizer import Chat

BOS, EOS = 1, 2


def conversation(*turns: str, system: str | None = None) -> Messages:
    """`turns` are questions and answers in turn."""
    led = [{"role": "system", "content": system}] if system is not None else []
    roles = ("user", "assistant") * len(turns)
    return led + [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]


def weighted(messages: Messages, *weights: int) -> Messages:
    """`messages` with `weights` on the assistant's turns; 1 is written as no weight."""
    left = iter(weights)
    made = []
    for message in messages:
        masked = message["role"] == "assistant" and next(left) == 0
        made.append(message | {"weight": 0} if masked else message)
    return made


def encoded(chat: Chat, messages: Messages) -> tuple[list[int], list[int]]:
    row = chat.encode([messages])[0]
    return row.input_ids, row.labels


anything = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
# Runs and near-control texts are where tokenizers part; each element is drawn as often as a letter.
tricky = st.lists(
    st.sampled_from([" ", "  ", " " * 16, " " * 23, "\n", "\t", "▁", "<s>", "</s>", "[INST]", "[/INST]", "<0x0A>", "a"])
    | st.characters(exclude_categories=["Cs"]),
    min_size=1,
    max_size=12,
).map("".join)
texts = (anything | tricky).filter(str.strip)


@st.composite
def conversations(draw: st.DrawFn, contents: st.SearchStrategy[str] = texts) -> Messages:
    turns = draw(st.integers(1, 3))
    system = draw(st.none() | contents)
    return conversation(*(draw(contents) for _ in range(2 * turns)), system=system)


def chatml_tokenizer() -> Tokenizer:
    """A byte-level BPE as SmolLM2's, learned from a line of text."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(token, special=True) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["system\nuser\nassistant\nthe other one\n\n  is another one, 日本 😀"] * 9, trainer)
    return tokenizer
