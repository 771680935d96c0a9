"""Recognizes by its keys how a public data set writes a conversation, and reads a row as chat messages."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from finetune.data.jsonl import REFUSED_KEYS, SYSTEM_KEYS, BadRow, joined, says_something
from finetune.wording import listed

Row = dict[str, Any]
Turns = list[dict[str, Any]]

LISTS = ("messages", "conversations", "conversation", "dialogue", "dialog")  # keys of a list of messages
PAIRS = (  # keys of a question and of its answer
    *(("prompt", "completion"), ("prompt", "response"), ("prompt", "output"), ("question", "answer")),
    *(("query", "response"), ("query", "answer"), ("input", "output"), ("user", "assistant")),
)
INSTRUCTIONS = {  # keys of an instruction, of its input and of the answer
    "Alpaca": ("instruction", "input", "output"),
    "Dolly": ("instruction", "context", "response"),
}
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "ai"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "function", "function_call", "function_response", "observation", "ipython"), "tool"),
}
VERDICTS = {"true": True, "false": False, "1": True, "0": False}
JOINED = "input appended to the instruction after a blank line"
SYSTEM_MOVED = "system prompt became the system message"
LABELLED = "label removed: it marks the answer as good"
PLAIN_TEXT = "plain text"
UNSPOKEN = "it does not say who speaks"
REJECTED = "rejected answer removed"


@dataclass
class Notes:
    """What the conversion of one row reports: its shape (none or one), changes, and ignored keys."""

    shapes: list[str] = field(default_factory=list)
    changes: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)


class Shape(NamedTuple):
    """A way to write a conversation: its name, its keys, and `read`, which returns messages or raises BadRow."""

    name: str
    keys: tuple[str, ...]
    read: Callable[[Any, Notes], Turns]

    @property
    def described(self) -> str:
        """`ShareGPT (conversations/from/value)`."""
        return f"{self.name} ({'/'.join(self.keys)})"


def shape_of(row: Any) -> Shape | None:
    """The shape of a row, which is an object or a list of messages; None if it is unknown."""
    if isinstance(row, list):
        inner = message_keys(row)
        return Shape("a list of messages", inner, _turns) if inner else None
    if not isinstance(row, dict):
        return None
    if "chosen" in row and any(key.startswith("rejected") for key in row):
        return Shape("preference pairs", _present(row, ("prompt", "chosen", "rejected")), _preferred)
    for key in LISTS:
        inner = message_keys(row.get(key))
        if inner:
            name = "ShareGPT" if inner == ("from", "value") else "chat messages"
            return Shape(name, (key, *inner), partial(_turns_below, key))
    return _shape_of_texts(row)


def unknown(row: Any) -> str:
    """The reason to refuse a row without a shape: `no known format (keys 'Q', 'A')`."""
    found = f"keys {listed([ascii(key) for key in row], 5)}" if isinstance(row, dict) else "not an object"
    return f"no known format ({found})"


def messages_of(row: Any, shape: Shape, notes: Notes) -> Turns:
    """The messages of a row, with its system prompt; notes the other keys.

    Raises BadRow for content that cannot be kept: tools, images, an answer marked as bad.
    """
    turns = shape.read(row, notes)
    if not isinstance(row, dict):
        return turns
    systems = []
    for key, value in row.items():
        if (key in shape.keys and key != "label") or not says_something(value):
            continue
        if key in SYSTEM_KEYS:
            systems.append(value)
        elif key == "label" and _verdict(value) is not None:
            _check_label(value, notes)
        elif key in REFUSED_KEYS and key != "label":
            raise BadRow(f"has a key {key!a}: {REFUSED_KEYS[key]}")
        elif key.startswith("rejected"):
            notes.changes[REJECTED] = 1
        elif key != "history":
            notes.unread[key] += 1
    if not systems:
        return turns
    if len(systems) > 1 or (turns and turns[0]["role"] == "system" and says_something(turns[0]["content"])):
        raise BadRow("has two system prompts, expected one")
    notes.changes[SYSTEM_MOVED] += 1
    return [{"role": "system", "content": systems[0]}, *(turn for turn in turns if turn["role"] != "system")]


def _shape_of_texts(row: Row) -> Shape | None:
    for name, keys in INSTRUCTIONS.items():
        if keys[0] in row and keys[2] in row:
            return Shape(name, _present(row, keys), partial(_instructed, keys))
    for pair in PAIRS:
        if all(key in row for key in pair):
            if _verdict(row.get("label")) is not None:
                return Shape("KTO", (*pair, "label"), partial(_paired, pair))
            name = "prompt and completion" + (" as chat" if isinstance(_listed(row[pair[0]]), list) else "")
            return Shape(name, pair, partial(_paired, pair))
    return Shape(PLAIN_TEXT, ("text",), _plain_text) if "text" in row else None


def _present(row: Row, keys: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(key for key in keys if key in row)


def message_keys(value: Any) -> tuple[str, ...]:
    """("role", "content") or ("from", "value") if `value` is a list of such messages, or JSON text of one; else ()."""
    messages = _listed(value)
    first = messages[0] if isinstance(messages, list) and messages else None
    if not isinstance(first, dict):
        return ()
    if "from" in first and "value" in first:
        return ("from", "value")
    return ("role", "content") if "role" in first else ()


def _listed(value: Any) -> Any:
    """`value`; if it is JSON text of a list of objects, as in a CSV cell, the list."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _turns(messages: Turns, notes: Notes) -> Turns:
    """Messages of either spelling, with our roles; keeps the keys that `parse_row` checks."""
    turns = []
    for index, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise BadRow(f"message {index} is not an object with role and content")
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if isinstance(content, list):
            content = joined(f"message {index}", content)
        turn = {"role": ROLES.get(role.lower(), role) if isinstance(role, str) else role, "content": content}
        for key, value in message.items():
            if key == "weight" or key in REFUSED_KEYS:
                turn[key] = value
            elif key not in ("role", "content", "from", "value") and says_something(value):
                notes.unread[f"{key} of a message"] = 1
        turns.append(turn)
    return turns


def _turns_below(key: str, row: Row, notes: Notes) -> Turns:
    return _turns(_listed(row[key]), notes)


def _paired(keys: tuple[str, str], row: Row, notes: Notes) -> Turns:
    return _pair(row[keys[0]], row[keys[1]], notes)


def _pair(question: Any, answer: Any, notes: Notes) -> Turns:
    """Messages from a question and its answer, each of them text or a list of messages."""
    turns: Turns = []
    for role, side in (("user", _listed(question)), ("assistant", _listed(answer))):
        turns += _turns(side, notes) if isinstance(side, list) else [{"role": role, "content": side}]
    return turns


def _instructed(keys: tuple[str, str, str], row: Row, notes: Notes) -> Turns:
    """The pairs of the row's `history`, then the instruction with its input, and the answer."""
    instruction, context, answer = (row.get(key) for key in keys)
    if says_something(context):
        if not isinstance(instruction, str) or not isinstance(context, str):
            raise BadRow(f"{keys[0]} and {keys[1]} are not both text")
        notes.changes[JOINED] += 1
        instruction = f"{instruction}\n\n{context}" if instruction else context
    turns: Turns = []
    for pair in row.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow("history is not a list of pairs [question, answer]")
        turns += _pair(pair[0], pair[1], notes)
    return turns + _pair(instruction, answer, notes)


def _preferred(row: Row, notes: Notes) -> Turns:
    """The chosen conversation, after the prompt if `chosen` is only the answer."""
    notes.changes[REJECTED] = 1
    chosen = _listed(row["chosen"])
    if isinstance(chosen, list):
        turns = _turns(chosen, notes)
        if "user" in [turn["role"] for turn in turns]:
            return turns
    return _pair(row.get("prompt"), chosen, notes)


def _plain_text(_row: Row, _notes: Notes) -> Turns:
    raise BadRow(f"{PLAIN_TEXT}: {UNSPOKEN}")


def _verdict(label: Any) -> bool | None:
    """Whether a label marks the answer as good; None for another kind of label, such as a topic or a score."""
    return VERDICTS.get(str(label).lower()) if isinstance(label, bool | int | str) else None


def _check_label(label: Any, notes: Notes) -> None:
    if not _verdict(label):
        raise BadRow("label marks the answer as bad")
    notes.changes[LABELLED] += 1
