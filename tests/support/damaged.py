"""Lines of JSONL with damage."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

# --- fuzzing

ESC = "\x1b]0;owned\x07"
texts = st.one_of(st.text(max_size=8), st.just(ESC), st.sampled_from(["system", "user", "assistant", "messages"]))
values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)
roles = st.one_of(st.sampled_from(["system", "user", "assistant"]), values)
messages = st.one_of(
    st.fixed_dictionaries({"role": roles, "content": values}, optional={"name": values, ESC: values}), values
)
rows = st.one_of(st.fixed_dictionaries({"messages": st.lists(messages, max_size=4)}, optional={"x": values}), values)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Almost a row: JSON of about the right shape, with some bytes put in, perhaps escaped."""
    text = json.dumps(draw(rows), ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(text)))
        text = text[:place] + draw(st.binary(max_size=3)) + text[place + draw(st.integers(0, 2)) :]
    return text
