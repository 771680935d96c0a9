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


ROW, LED = conversation("Question 2", "Answer 2"), conversation("Question 2", "Answer 2", system="Be kind.")
# (one, other, whether they are copies, whether their openings are alike)
PAIRS: dict[str, tuple[Messages, Messages, bool, bool]] = {
    "case": (ROW, conversation("QUESTION 2", "answer 2"), True, True),
    "whitespace inside": (ROW, conversation("Question\n\n \t2", "Answer\u00a02"), True, True),
    "a long run of spaces": (ROW, conversation("Question       2", "Answer 2"), True, True),
    "whitespace outside": (ROW, conversation("  Question 2\n", "\u3000Answer 2 "), True, True),
    "case in Unicode": (conversation("Stra\u00dfe", "\u00c7a"), conversation("STRASSE", "\u00e7a"), True, True),
    "whitespace in a system message": (LED, conversation("Question 2", "Answer 2", system=" be  KIND."), True, True),
    "forms of characters": (conversation("\ufb01ve \u2460", "Yes"), conversation("FIVE 1", "Yes"), False, True),
    "another answer": (ROW, conversation("Question 2", "No"), False, True),
    "more turns": (ROW, conversation("question 2", "Answer 2", "Question 2", "Answer 2"), False, True),
    "a system message": (ROW, LED, False, False),
    "joined words": (ROW, conversation("Question2", "Answer 2"), False, False),
    "another order": (ROW, conversation("Answer 2", "Question 2"), False, False),
    "other ends of messages": (ROW, conversation("Question", "2 Answer 2"), False, False),
    "punctuation": (ROW, conversation("Question 2.", "Answer 2"), False, False),
}


@pytest.mark.parametrize(("one", "other", "copies", "openings"), PAIRS.values(), ids=PAIRS.keys())
def test_copies_differ_only_in_whitespace_and_case_and_openings_up_to_the_first_answer(
    one: Messages, other: Messages, copies: bool, openings: bool
) -> None:
    (copy, opening), (of_other, opening_of_other) = digests.folded_digests(one), digests.folded_digests(other)
    assert (copy == of_other, opening == opening_of_other) == (copies, openings)
