"""Digests identify conversations and near copies."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data import digests
from finetune.data.template import Messages
from support.conversations import conversation


@settings(max_examples=100, deadline=None)
@given(texts=st.tuples(st.text(st.characters(max_codepoint=127)), st.text(st.characters(max_codepoint=127))))
def test_the_fast_way_for_ascii_and_the_other_tell_the_same_copies(texts: tuple[str, str]) -> None:
    slow = conversation(*(f"\u00a0{text}\u00a0" for text in texts))
    assert digests.folded_digests(conversation(*texts)) == digests.folded_digests(slow)


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        (conversation("Hi", "Yes"), conversation("hi ", "No", "Why?", "Because."), True),
        (conversation("Hi", "Yes", system="Be kind."), conversation("Hi", "No", system=" be  KIND."), True),
        (conversation("\ufb01ve \u2460", "Yes"), conversation("FIVE 1", "No"), True),
        (conversation("Stra\u00dfe", "Yes"), conversation("STRASSE", "No"), True),
        (conversation("Hi", "Yes", system="Be kind."), conversation("Hi", "Yes"), False),
        (conversation("Hi", "Yes"), conversation("Hi!", "Yes"), False),
        (conversation("Hi", "Yes"), conversation("Hi Yes", "Yes"), False),
    ],
    ids=["later turns", "system message", "forms", "case", "no system message", "punctuation", "other ends"],
)
def test_openings_are_alike_up_to_the_first_answer(one: Messages, other: Messages, alike: bool) -> None:
    assert (digests.folded_digests(one)[1] == digests.folded_digests(other)[1]) == alike
