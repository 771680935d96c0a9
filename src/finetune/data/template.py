"""Chat formats: a conversation as text pieces and control tokens, and the same format as a Jinja template."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, NotRequired, TypedDict

IGNORED = -100  # the label that torch's cross entropy ignores


class Message(TypedDict):
    """A message of one role; an assistant message of `weight` 0 carries no loss."""

    role: str
    content: str
    weight: NotRequired[int]


Messages = list[Message]


class Piece(NamedTuple):
    """Text to encode, or the text of a control token; `supervised` pieces carry loss."""

    text: str
    control: bool
    supervised: bool


class Encoded(NamedTuple):
    """`input_ids` and `labels`: [tokens]; `turn_ends`: the length up to the end of each turn that carries loss."""

    input_ids: list[int]
    labels: list[int]
    turn_ends: list[int]


@dataclass(frozen=True)
class ChatFormat:
    """How one family of models formats a conversation.

    `template` is the same format in Jinja, with generation marks, saved with the adapter; a test keeps both equal.
    """

    name: str
    bos: str | None
    end: str
    pad: str
    template: str
    pieces: Callable[[Messages], Iterator[Piece]]
    opening: tuple[Piece, ...]  # precedes the reply the model generates

    def control_tokens(self) -> tuple[str, ...]:
        """The format's markup around messages: control tokens, and Mistral's [INST], which its tokenizer has as text.

        It is found by formatting a conversation without text: role names are words, and everything else is markup.
        """
        turns: Messages = [{"role": role, "content": ""} for role in ("user", "assistant")]
        markup = {word for piece in self.pieces(turns) for word in piece.text.split() if not word.isalpha()}
        return tuple(sorted(markup | {token for token in (self.bos, self.end, self.pad) if token}))


def carries_loss(message: Message) -> bool:
    """Whether to train on a message: the assistant's, and not of weight 0, as in mistral-finetune."""
    return message["role"] == "assistant" and message.get("weight") != 0


def _mistral_pieces(messages: Messages) -> Iterator[Piece]:
    yield Piece("<s>", True, False)
    system = ""
    for message in messages:
        if message["role"] == "system":
            system = message["content"] + "\n\n"  # Mistral has no system role: it precedes the first question
        elif message["role"] == "user":
            yield Piece(f"[INST] {system}{message['content']} [/INST]", False, False)
            system = ""
        else:
            yield Piece(message["content"], False, carries_loss(message))
            yield Piece("</s>", True, carries_loss(message))


def _chatml_pieces(messages: Messages) -> Iterator[Piece]:
    for message in messages:
        reply, loss = message["role"] == "assistant", carries_loss(message)
        yield Piece("<|im_start|>", True, False)
        yield Piece(f"{message['role']}\n" + ("" if reply else message["content"]), False, False)
        if reply:
            yield Piece(message["content"], False, loss)  # encoded separately, as the model will generate it
        yield Piece("<|im_end|>", True, loss)
        yield Piece("\n", False, False)


# Whitespace control keeps the template readable and the text exact.
MISTRAL_TEMPLATE = """\
{{- bos_token -}}
{%- set ns = namespace(system='', turn=0) -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' and loop.first -%}
        {%- set ns.system = message['content'] + '\\n\\n' -%}
    {%- elif message['role'] == 'user' and ns.turn % 2 == 0 -%}
        {{- '[INST] ' + ns.system + message['content'] + ' [/INST]' -}}
        {%- set ns.system = '' -%}
        {%- set ns.turn = ns.turn + 1 -%}
    {%- elif message['role'] == 'assistant' and ns.turn % 2 == 1 -%}
        {%- generation -%}{{- ' ' + message['content'] + eos_token -}}{%- endgeneration -%}
        {%- set ns.turn = ns.turn + 1 -%}
    {%- else -%}
        {{- raise_exception('roles must be: system (first only), then user and assistant in turn') -}}
    {%- endif -%}
{%- endfor -%}
"""

CHATML_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

MISTRAL_FORMAT = ChatFormat("mistral-v1", "<s>", "</s>", "<unk>", MISTRAL_TEMPLATE, _mistral_pieces, ())
CHATML_FORMAT = ChatFormat(
    "chatml",
    None,
    "<|im_end|>",
    "<|endoftext|>",
    CHATML_TEMPLATE,
    _chatml_pieces,
    (Piece("<|im_start|>", True, False), Piece("assistant\n", False, False)),
)
