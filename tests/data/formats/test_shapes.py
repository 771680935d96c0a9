"""A row's format is known by its keys, whichever of its spellings it has."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.data.formats.shapes import Notes, messages_of, shape_of
from support.conversations import conversation

TALK = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
SHARED = [{"from": "human", "value": "A"}, {"from": "gpt", "value": "B"}]
SHAPES: dict[str, Any] = {
    "chat messages (messages/role/content)": {"messages": TALK},
    "chat messages (dialogue/role/content)": {"dialogue": TALK},
    "ShareGPT (messages/from/value)": {"messages": SHARED},
    "ShareGPT (conversation/from/value)": {"conversation": SHARED},
    "a list of messages (from/value)": SHARED,
    "Alpaca (instruction/output)": {"instruction": "A", "output": "B"},
    "Dolly (instruction/response)": {"instruction": "A", "response": "B"},
    "prompt and completion (query/answer)": {"query": "A", "answer": "B"},
    "prompt and completion (input/output)": {"input": "A", "output": "B"},
    "prompt and completion (user/assistant)": {"user": "A", "assistant": "B"},
    "prompt and completion as chat (prompt/response)": {"prompt": TALK[:1], "response": TALK[1:]},
    "KTO (prompt/completion/label)": {"prompt": "A", "completion": "B", "label": "True"},
    "preference pairs (chosen/rejected)": {"chosen": TALK, "rejected": TALK},
}


@pytest.mark.parametrize("described", SHAPES)
def test_each_spelling_is_known_and_read(described: str) -> None:
    row = SHAPES[described]
    shape = shape_of(row)
    assert shape is not None
    assert shape.described == described
    assert messages_of(row, shape, Notes()) == conversation("A", "B")


@pytest.mark.parametrize("role", ["human", "User", "prompter"])
@pytest.mark.parametrize("reply", ["gpt", "chatgpt", "Assistant", "model", "bot"])
def test_roles_have_many_names(role: str, reply: str) -> None:
    row = {"conversations": [{"from": role, "value": "A"}, {"from": reply, "value": "B"}]}
    shape = shape_of(row)
    assert shape is not None
    assert messages_of(row, shape, Notes()) == conversation("A", "B")


def test_a_list_in_a_cell_of_csv_is_json() -> None:
    row = {"messages": '[{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]'}
    shape = shape_of(row)
    assert shape is not None
    assert messages_of(row, shape, Notes()) == conversation("A", "B")


@pytest.mark.parametrize(
    "row",
    [None, 7, "A", [], ["A"], {}, {"messages": []}, {"messages": "A"}, {"messages": [7]}, {"conversations": [{"a": 1}]},
        {"instruction": "A"}, {"prompt": "A"}, {"chosen": "A"}, {"messages": '[{"role": '}],
)  # fmt: skip
def test_what_has_other_keys_has_no_shape(row: Any) -> None:
    assert shape_of(row) is None
