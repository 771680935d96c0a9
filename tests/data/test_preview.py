"""A row as a person reads it, with what carries loss marked."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.encode import Recipe
from finetune.data.preview import marked, preview, segments
from finetune.data.template import Messages
from finetune.wording import clean
from support.conversations import conversation
from support.prepared import RECIPE, TWO_TURNS, Case, the_chat, write


def first_row(case: Case, row: Messages, width: int, recipe: Recipe = RECIPE) -> list[tuple[str, bool]]:
    write(case.train, row)
    write(case.validation, conversation("Something", "else"))
    return preview(case.prepare(replace(recipe, max_seq_length=4096)), width)


def test_a_preview_tells_what_carries_loss_by_marks(case: Case) -> None:
    parts = first_row(case, TWO_TURNS, 200)
    assert parts == [
        ("<s> [INST] Hi [/INST]", False), (" Hello</s>", True), (" [INST] Hi [/INST]", False), (" Yes</s>", True),
    ]  # fmt: skip
    assert marked(parts) == "<s> [INST] Hi [/INST]>> Hello</s><< [INST] Hi [/INST]>> Yes</s><<"


def test_a_preview_is_of_the_stored_ids_with_the_configs_prompt_and_cut(case: Case) -> None:
    write(case.train, TWO_TURNS)
    write(case.validation, conversation("Hi", "No"))
    prepared = case.prepare(replace(RECIPE, max_seq_length=20, system_prompt="Be kind."))
    assert marked(preview(prepared, 200)) == "<s> [INST] Be kind.\\n\\nHi [/INST]>> Hello</s><<"


def test_a_preview_of_a_long_row_keeps_both_ends_of_each_turn(case: Case) -> None:
    parts = first_row(case, conversation("Hi " * 100, "Hello " * 100 + "you"), 65)
    assert marked(parts) == "<s> [INST] H ...  Hi  [/INST]>> Hello Hello ... ello you</s><<"


def test_a_preview_of_many_turns_says_that_some_are_left_out(case: Case) -> None:
    parts = first_row(case, conversation(*["Hi", "Hello"] * 30), 60)
    assert marked(parts) == "<s> [INST] Hi [/INST]>> Hello</s><< ... "


odd_texts = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip) | st.sampled_from(
    ["</s>", "<s>", "[INST]", "<unk>", "\x1b[31m", "\ufffd", "\U0001f642", "a\u0301", "\u202e", "\r\n.", "  . "]
)


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.tuples(odd_texts, odd_texts), min_size=1, max_size=5), width=st.integers(50, 120))
def test_a_preview_of_any_row_fits_its_width_on_one_safe_line(
    tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[str, str]], width: int
) -> None:
    parts = first_row(Case(tmp_path_factory.mktemp("preview")), conversation(*sum(texts, ())), width)
    assert sum(len(text) for text, _ in parts) <= width
    assert {supervised for _, supervised in parts} == {False, True}
    assert all(character == clean(character) and character != "\n" for text, _ in parts for character in text)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.tuples(odd_texts, odd_texts), min_size=1, max_size=4))
def test_segments_joined_are_the_decoded_row(texts: list[tuple[str, str]]) -> None:
    chat = the_chat(None)
    input_ids, labels, _ = chat.encode([conversation(*sum(texts, ()))])[0]
    found = segments(chat, input_ids, labels)
    assert "".join(text for text, _ in found) == chat.tokenizer.decode(input_ids, skip_special_tokens=False)
    assert [supervised for _, supervised in found] == [False, True] * len(texts)
