"""Every way a line of chat JSONL can be good or bad has one decided answer."""

from __future__ import annotations

import io
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data import jsonl
from finetune.data.jsonl import BOM, BadRow, open_lines, parse_row, read_lines
from finetune.errors import ConfigError
from support.damaged import damaged

USER = {"role": "user", "content": "Why?"}
ASSISTANT = {"role": "assistant", "content": "Because."}
SYSTEM = {"role": "system", "content": "Be short."}


def line(*messages: Any, **more: Any) -> bytes:
    return json.dumps({"messages": list(messages), **more}, ensure_ascii=False).encode("utf-8")


def numbered(data: bytes) -> list[tuple[int, bytes]]:
    return list(read_lines(io.BytesIO(data)))


def escaped(content: str) -> bytes:
    """A row whose answer is `content`, written exactly so between the quotes."""
    return line(USER, {"role": "assistant", "content": "@"}).replace(b"@", content.encode())


def refusal(row: bytes) -> str:
    with pytest.raises(BadRow) as caught:
        parse_row(row)
    return str(caught.value)


def test_a_conversation_comes_back_as_its_messages() -> None:
    assert parse_row(line(SYSTEM, USER, ASSISTANT, USER, ASSISTANT)) == [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]


ACCEPTED = {
    "keys beside messages are metadata": line(USER, ASSISTANT, id=7, tags=["a", {"b": None}]),
    "messages need not be the first key": b'{"id": 1, ' + line(USER, ASSISTANT)[1:],
    "null keys of a message": line(USER | {"name": None}, ASSISTANT | {"tool_calls": None, "weight": None}),
    "keys of a message in another order": line(dict(reversed(USER.items())), ASSISTANT),
    "space around the object": b" \t" + line(USER, ASSISTANT) + b" ",
}


@pytest.mark.parametrize("row", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_what_does_not_change_the_conversation_is_accepted(row: bytes) -> None:
    assert parse_row(row) == [USER, ASSISTANT]


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (r"\ud83d\ude00", "😀"),
        ("😀", "😀"),
        (r"\ud83d\ude00\ud83d\ude00", "😀😀"),
        (r"a\u0000b", "a\0b"),
        (r"\u00e9\n\t\"", 'é\n\t"'),
        (r"\ufffe", "\ufffe"),
        ("  kept as it is \\n", "  kept as it is \n"),
        ("e\u0301", "e\u0301"),
        ("\u200b", "\u200b"),
    ],
)
def test_text_is_kept_exactly(written: str, text: str) -> None:
    assert parse_row(escaped(written))[1]["content"] == text


REFUSED = {
    "not UTF-8": (b'{"messages": "\xff"}', "not UTF-8: byte 0xff at position 14"),
    "UTF-16": ("{}".encode("utf-16-le"), "not JSON: Expecting property name enclosed in double quotes at column 2"),
    "cut in the middle of a character": (b'"\xe4\xba', "not UTF-8: byte 0xe4 at position 1"),
    "not JSON": (b"hello", "not JSON: Expecting value at column 1"),
    "single quotes": (b"{'messages': []}", "not JSON: Expecting property name enclosed in double quotes at column 2"),
    "cut short": (line(USER, ASSISTANT)[:-2], "not JSON: Expecting ',' delimiter at column 96"),
    "two objects": (b"{} {}", "not JSON: Extra data at column 4"),
    "a second byte order mark": (BOM + line(USER, ASSISTANT),
        "not JSON: Unexpected UTF-8 BOM (decode using utf-8-sig) at column 1"),
    "NaN": (line(USER, ASSISTANT, score=float("nan")), "not JSON: NaN is no JSON value"),
    "Infinity": (line(USER, ASSISTANT, score=float("inf")), "not JSON: Infinity is no JSON value"),
    "-Infinity": (line(USER, ASSISTANT, score=float("-inf")), "not JSON: -Infinity is no JSON value"),
    "duplicate key": (b'{"messages": [], "messages": []}', "key 'messages' stands twice in one object"),
    "duplicate key of a message": (b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
        "key 'content' stands twice in one object"),
    "duplicate key in metadata": (b'{"x": {"a": 1, "b": 2, "a": 1}}', "key 'a' stands twice in one object"),
    "a number of 5000 digits": (b'{"messages": ' + b"1" * 5000 + b"}",
        "not JSON: Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits"),
    "3,000 deep": (b"[" * 3000 + b"]" * 3000, "not a conversation: nested too deep"),
    "3,000 deep in metadata": (line(USER, ASSISTANT, x=0).replace(b"0}", b'{"a":' * 3000 + b"0" + b"}" * 3001),
        "not a conversation: nested too deep"),
    "a list": (b"[]", 'found an empty list, wanted an object {"messages": [...]}'),
    "a list of messages": (json.dumps([USER]).encode(), 'found a list, wanted an object {"messages": [...]}'),
    "a text": (b'"hello"', 'found text, wanted an object {"messages": [...]}'),
    "a number": (b"1.5", 'found a number, wanted an object {"messages": [...]}'),
    "a truth value": (b"true", 'found true or false, wanted an object {"messages": [...]}'),
    "null": (b"null", 'found null, wanted an object {"messages": [...]}'),
    "another format": (b'{"prompt": "a", "completion": "b"}', "no \"messages\" key (found 'prompt', 'completion')"),
    "an empty object": (b"{}", 'no "messages" key (found no key)'),
    "no list of messages": (b'{"messages": "hello"}', '"messages" is text, wanted a list of messages'),
    "messages is one message": (b'{"messages": {}}', '"messages" is an object, wanted a list of messages'),
    "messages is null": (b'{"messages": null}', '"messages" is null, wanted a list of messages'),
    "no messages": (line(), '"messages" is an empty list, wanted a list of messages'),
    "a message is text": (line(USER, "Because."), "message 2 is text, wanted an object with role and content"),
    "a message is null": (line(None), "message 1 is null, wanted an object with role and content"),
    "no role": (line({"content": "Why?"}), 'message 1 has no "role"'),
    "no content": (line(USER, {"role": "assistant"}), 'message 2 has no "content"'),
    "content is null": (line(USER, {"role": "assistant", "content": None}),
        "message 2 has content that is null, wanted text"),
    "content is a list of parts": (line({"role": "user", "content": [{"type": "text", "text": "Why?"}]}, ASSISTANT),
        "message 1 has content that is a list, wanted text"),
    "content is a number": (line(USER, {"role": "assistant", "content": 4}),
        "message 2 has content that is a number, wanted text"),
    "empty content": (line(USER, {"role": "assistant", "content": ""}), "message 2 (assistant) is empty"),
    "content of white space": (line({"role": "user", "content": " \n\t\u3000"}), "message 1 (user) is empty"),
    "an empty system message": (line({"role": "system", "content": ""}, USER), "message 1 (system) is empty"),
    "another key of a message": (line(USER, ASSISTANT | {"weight": 0}),
        "message 2 has a key 'weight', wanted only role and content"),
    "a tool call": (line(USER, ASSISTANT | {"name": None, "tool_calls": [1]}),
        "message 2 has a key 'tool_calls', wanted only role and content"),
    "unknown role": (line(USER, {"role": "tool", "content": "4"}),
        "message 2 has role 'tool', wanted system, user or assistant"),
    "role in capitals": (line({"role": "User", "content": "Why?"}, ASSISTANT),
        "message 1 has role 'User', wanted system, user or assistant"),
    "role is a list": (line({"role": [], "content": "Why?"}, ASSISTANT),
        "message 1 has role [], wanted system, user or assistant"),
    "a role of a hundred letters": (line({"role": "x" * 100, "content": "Why?"}),
        f"message 1 has role '{'x' * 36}..., wanted system, user or assistant"),
    "system in the middle": (line(USER, SYSTEM, ASSISTANT), "message 2 is from system, wanted assistant"),
    "system in a later turn": (line(USER, ASSISTANT, SYSTEM), "message 3 is from system, wanted user"),
    "two system messages": (line(SYSTEM, SYSTEM, USER, ASSISTANT), "message 2 is from system, wanted user"),
    "two users in a row": (line(USER, USER, ASSISTANT), "message 2 is from user, wanted assistant"),
    "two users after a system message": (line(SYSTEM, USER, USER), "message 3 is from user, wanted assistant"),
    "two assistants in a row": (line(USER, ASSISTANT, ASSISTANT), "message 3 is from assistant, wanted user"),
    "assistant first": (line(ASSISTANT, USER, ASSISTANT), "message 1 is from assistant, wanted user"),
    "assistant right after system": (line(SYSTEM, ASSISTANT), "message 2 is from assistant, wanted user"),
    "user last": (line(USER, ASSISTANT, USER), "ends with user, wanted an assistant message last"),
    "only a user": (line(USER), "ends with user, wanted an assistant message last"),
    "only a system message": (line(SYSTEM), "ends with system, wanted an assistant message last"),
    "half a surrogate pair": (escaped(r"a\ud83d"),
        "message 2 holds half of a surrogate pair (\\ud800-\\udfff), which is no text"),
    "the other half": (escaped(r"\ude00 b"),
        "message 2 holds half of a surrogate pair (\\ud800-\\udfff), which is no text"),
    "halves in the wrong order": (escaped(r"\ude00\ud83d"),
        "message 2 holds half of a surrogate pair (\\ud800-\\udfff), which is no text"),
    "half a pair in a role": (rb'{"messages": [{"role": "\ud800", "content": "a"}]}',
        r"message 1 has role '\ud800', wanted system, user or assistant"),
    "an escape sequence in a role": (line({"role": "\x1b[31m", "content": "Why?"}),
        r"message 1 has role '\x1b[31m', wanted system, user or assistant"),
    "an escape sequence in a key": (line(USER | {"\x1b[2J": 1}),
        r"message 1 has a key '\x1b[2J', wanted only role and content"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_bad_row_is_refused_with_what_was_found_and_wanted(row: bytes, message: str) -> None:
    assert refusal(row) == message


@pytest.mark.parametrize("data", [BOM + b"a\nb\n", b"a\r\nb\r\n", BOM + b"a\r\nb", b"a\nb"])
def test_marks_line_ends_and_a_missing_last_newline_are_no_part_of_a_line(data: bytes) -> None:
    assert numbered(data) == [(1, b"a"), (2, b"b")]


def test_blank_lines_are_left_out_and_the_others_keep_their_numbers() -> None:
    assert numbered(b"\n \t\r\na\n\n\r\nb\n\n") == [(3, b"a"), (6, b"b")]


@pytest.mark.parametrize("data", [b"", b"\n", BOM, BOM + b"\r\n", b" \n\t\n"])
def test_a_file_without_text_has_no_lines(data: bytes) -> None:
    assert numbered(data) == []


def test_a_byte_order_mark_counts_at_the_start_of_the_file_only() -> None:
    assert numbered(b"a\n" + BOM + b"b\n") == [(1, b"a"), (2, BOM + b"b")]


def test_line_separators_inside_text_end_no_line() -> None:
    text = "a\u2028b\x85c\x0bd\x0ce"
    assert numbered(f"{text}\n".encode()) == [(1, text.encode())]


@pytest.fixture
def mebibyte_limit(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 2**20)
    return 2**20


LONG_LINES = {
    "a little too long": b"x" * (2**20 + 1),
    "many times too long": b"x" * (3 * 2**20 + 17),
    "beginning with spaces": b" " * 2**21 + b"x",
    "with carriage returns at the cut": b"{}" + b"\r" * 2**21 + b"x",
}


@pytest.mark.parametrize("start", [b"", BOM], ids=["plain", "after a byte order mark"])
@pytest.mark.parametrize("long", LONG_LINES.values(), ids=LONG_LINES.keys())
@pytest.mark.usefixtures("mebibyte_limit")
def test_an_over_long_line_is_refused_and_the_next_has_its_right_number(long: bytes, start: bytes) -> None:
    (first, kept), second = numbered(start + long + b"\n" + line(USER, ASSISTANT) + b"\n")
    assert first == 1
    assert refusal(kept) == "longer than 1 MiB, wanted one conversation a line"
    assert second == (2, line(USER, ASSISTANT))


def test_of_an_over_long_line_no_more_is_kept_than_the_limit(mebibyte_limit: int) -> None:
    ((_, kept),) = numbered(b"x" * 5 * mebibyte_limit)
    assert len(kept) <= mebibyte_limit + 1


@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_line_of_just_the_limit_is_taken(mebibyte_limit: int, end: bytes) -> None:
    row = line(USER, ASSISTANT, x="@").replace(b"@", b"x" * (mebibyte_limit - len(line(USER, ASSISTANT, x=""))))
    assert len(row) == mebibyte_limit
    ((number, kept),) = numbered(row + end)
    assert (number, parse_row(kept)) == (1, [USER, ASSISTANT])


def test_a_file_that_is_not_there_is_a_config_error(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    with pytest.raises(ConfigError) as caught:
        open_lines(path, ", or elsewhere")
    assert str(caught.value) == (
        f"config: 1 problem\n  {path}: No such file or directory; put your JSONL there, or elsewhere"
    )


@settings(max_examples=400, deadline=None)
@given(st.one_of(damaged(), st.binary(max_size=60), st.text(max_size=60).map(lambda text: text.encode())))
def test_any_bytes_either_parse_or_are_a_bad_row_told_in_printable_text(row: bytes) -> None:
    try:
        parsed = parse_row(row)
    except BadRow as bad:
        assert not [character for character in str(bad) if unicodedata.category(character) in ("Cc", "Cf", "Cs")]
        assert str(bad).isascii()
        return
    assert parsed
    for message in parsed:
        assert message.keys() == {"role", "content"}
        assert message["content"].encode("utf-8").strip()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([b"a", b"\r", b"\n", b"\r\n", b" ", b"\n\n", BOM, b"\xff"]), max_size=12).map(b"".join))
def test_lines_are_numbered_as_an_editor_numbers_them(data: bytes) -> None:
    naive = enumerate(data.removeprefix(BOM).split(b"\n"), 1)
    assert numbered(data) == [(number, text.rstrip(b"\r")) for number, text in naive if text.strip()]
