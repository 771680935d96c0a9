"""How a family of models writes a conversation: its pieces, its control tokens, and the same as a Jinja template."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

IGNORED = -100  # the label that torch's cross entropy leaves out

Messages = list[dict[str, str]]


class Piece(NamedTuple):
    """Text to encode, or a control token's own text; `supervised` pieces carry loss."""

    text: str
    control: bool
    supervised: bool


class Encoded(NamedTuple):
    """`input_ids` and `labels`: [tokens]; `turn_ends`: the length up to the end of each assistant turn."""

    input_ids: list[int]
    labels: list[int]
    turn_ends: list[int]


@dataclass(frozen=True)
class ChatFormat:
    """How one family of models writes a conversation down.

    `template` is the same as Jinja, with generation marks, and is saved with the adapter; a test holds the two equal.
    """

    name: str
    bos: str | None
    end: str
    pad: str
    template: str
    pieces: Callable[[Messages], Iterator[Piece]]
    opening: tuple[Piece, ...]  # what stands before a reply that the model is to write


def _mistral_pieces(messages: Messages) -> Iterator[Piece]:
    yield Piece("<s>", True, False)
    system = ""
    for message in messages:
        if message["role"] == "system":
            system = message["content"] + "\n\n"  # Mistral has no system role: it goes before the first question
        elif message["role"] == "user":
            yield Piece(f"[INST] {system}{message['content']} [/INST]", False, False)
            system = ""
        else:
            yield Piece(message["content"], False, True)
            yield Piece("</s>", True, True)


def _chatml_pieces(messages: Messages) -> Iterator[Piece]:
    for message in messages:
        reply = message["role"] == "assistant"
        yield Piece("<|im_start|>", True, False)
        yield Piece(f"{message['role']}\n" + ("" if reply else message["content"]), False, False)
        if reply:
            yield Piece(message["content"], False, True)  # encoded apart, as the model will write it
        yield Piece("<|im_end|>", True, reply)
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
