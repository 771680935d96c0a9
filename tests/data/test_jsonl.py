"""Every way a line of chat JSONL can be good or bad has one decided answer."""

from __future__ import annotations

import gzip
import io
import json
import random
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.cli import command
from finetune.data import jsonl
from finetune.data.jsonl import (
    BOM,
    MAX_LINE_BYTES,
    NO_TOOLS,
    BadRow,
    convert_command,
    open_lines,
    parse_row,
    read_lines,
)
from finetune.data.tokenizer import Chat
from finetune.errors import ConfigError, DataError
from support.as_nobody import as_nobody
from support.damaged import damaged

USER = {"role": "user", "content": "Why?"}
ASSISTANT = {"role": "assistant", "content": "Because."}
SYSTEM = {"role": "system", "content": "Be short."}
ROLES = ("system", "user", "assistant")


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


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


ACCEPTED = {
    "keys beside messages are metadata": line(USER, ASSISTANT, id=7, tags=["a", {"b": None}]),
    "messages need not be the first key": b'{"id": 1, ' + line(USER, ASSISTANT)[1:],
    "null keys of a message": line(USER | {"name": None}, ASSISTANT | {"tool_calls": None, "weight": None}),
    "a weight of 1": line(USER, ASSISTANT | {"weight": 1}),
    "weights of those who carry no loss": line(USER | {"weight": 0}, ASSISTANT | {"weight": 1.0}),
    "no tools": line(USER, ASSISTANT | {"tool_calls": []}, tools=[], label=None, system="", images=[]),
    "an empty system message": line({"role": "system", "content": ""}, USER, ASSISTANT),
    "a system message of white space": line({"role": "system", "content": " \n"}, USER, ASSISTANT),
    "a system message that is null": line({"role": "system", "content": None}, USER, ASSISTANT),
    "content as a list of one part": line({"role": "user", "content": parts("Why?")}, ASSISTANT),
    "content as a list with an empty part": line(USER, {"role": "assistant", "content": parts("", "Because.")}),
    "keys of a message in another order": line(dict(reversed(USER.items())), ASSISTANT),
    "space around the object": b" \t" + line(USER, ASSISTANT) + b" ",
}


@pytest.mark.parametrize("row", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_what_does_not_change_the_conversation_is_accepted(row: bytes) -> None:
    assert parse_row(row) == [USER, ASSISTANT]


@pytest.mark.parametrize("weight", [0, 0.0, False])
def test_a_weight_of_0_stays_with_the_assistants_message(weight: Any) -> None:
    messages = [message | {"weight": weight} for message in (SYSTEM, USER, ASSISTANT)]
    assert parse_row(line(*messages, USER, ASSISTANT)) == [SYSTEM, USER, ASSISTANT | {"weight": 0}, USER, ASSISTANT]


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_prompt_besides_the_messages_becomes_the_system_message(key: str) -> None:
    for messages in ((USER, ASSISTANT), ({"role": "system", "content": ""}, USER, ASSISTANT)):
        keys: Counter[str] = Counter()
        assert parse_row(line(*messages, **{key: "Be short."}), keys) == [SYSTEM, USER, ASSISTANT]
        assert keys == {key: 1}


def test_keys_that_are_not_read_are_counted_and_those_that_say_nothing_are_not() -> None:
    keys: Counter[str] = Counter()
    parse_row(line(USER, ASSISTANT, id=7, source=None, tags=[], score=0), keys)
    parse_row(line(USER, ASSISTANT, id=8), keys)
    assert keys == {"id": 2, "score": 1}


def test_text_parts_are_joined_as_mistral_common_joins_them(mistral: Chat) -> None:
    from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    system, user, answer = parts("Be short.", "", "Be kind.\n"), parts("", " Why?", "Why not? "), parts("For", " that.")
    row = line(*({"role": role, "content": given} for role, given in zip(ROLES, (system, user, answer), strict=True)))
    last = UserMessage(content="x")  # a request ends with the user
    asked = [SystemMessage(content=system), UserMessage(content=user), AssistantMessage(content=answer), last]
    request: Any = ChatCompletionRequest(messages=asked)
    theirs = MistralTokenizer.v1().encode_chat_completion(request).tokens
    assert mistral.encode_prompt([*parse_row(row), {"role": "user", "content": "x"}]) == theirs


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
    "not JSON": (b"hello", "not JSON: Expecting value at column 1"),
    "single quotes": (b"{'messages': []}", "not JSON: Expecting property name enclosed in double quotes at column 2"),
    "cut short": (line(USER, ASSISTANT)[:-2], "not JSON: Expecting ',' delimiter at column 96"),
    "two objects": (b"{} {}", "not JSON: Extra data at column 4"),
    "a second byte order mark": (BOM + line(USER, ASSISTANT),
        "not JSON: Unexpected UTF-8 BOM (decode using utf-8-sig) at column 1"),
    "NaN": (line(USER, ASSISTANT, score=float("nan")), "not JSON: NaN is not a JSON value"),
    "duplicate key": (b'{"messages": [], "messages": []}', "key 'messages' appears twice in one object"),
    "duplicate key in metadata": (b'{"x": {"a": 1, "b": 2, "a": 1}}', "key 'a' appears twice in one object"),
    "a number of 5000 digits": (b'{"messages": ' + b"1" * 5000 + b"}",
        "not JSON: Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits"),
    "3,000 deep": (b"[" * 3000 + b"]" * 3000, "not a conversation: nested too deep"),
    "3,000 deep in metadata": (line(USER, ASSISTANT, x=0).replace(b"0}", b'{"a":' * 3000 + b"0" + b"}" * 3001),
        "not a conversation: nested too deep"),
    "a list": (b"[]", 'found an empty list, expected an object {"messages": [...]}'),
    "a list of messages": (json.dumps([USER]).encode(), 'found a list, expected an object {"messages": [...]}'),
    "a truth value": (b"true", 'found true or false, expected an object {"messages": [...]}'),
    "null": (b"null", 'found null, expected an object {"messages": [...]}'),
    "another format": (b'{"prompt": "a", "completion": "b"}', "no \"messages\" key (found 'prompt', 'completion')"),
    "an empty object": (b"{}", 'no "messages" key (found no key)'),
    "no list of messages": (b'{"messages": "hello"}', '"messages" is text, expected a list of messages'),
    "messages is null": (b'{"messages": null}', '"messages" is null, expected a list of messages'),
    "no messages": (line(), '"messages" is an empty list, expected a list of messages'),
    "a message is text": (line(USER, "Because."), "message 2 is text, expected an object with role and content"),
    "no role": (line({"content": "Why?"}), 'message 1 has no "role"'),
    "no content": (line(USER, {"role": "assistant"}), 'message 2 has no "content"'),
    "content is null": (line(USER, {"role": "assistant", "content": None}),
        "message 2 has content that is null, expected text"),
    "a part that is text": (line({"role": "user", "content": ["Why?"]}, ASSISTANT),
        'message 1 has a part that is text, expected {"type": "text", "text": "..."}'),
    "a part without a type": (line({"role": "user", "content": [{"text": "Why?"}]}, ASSISTANT),
        'message 1 has a part that is an object, expected {"type": "text", "text": "..."}'),
    "a part without text": (line({"role": "user", "content": [{"type": "text"}]}, ASSISTANT),
        'message 1 has a part whose "text" is null, expected text'),
    "an image among the parts": (
        line({"role": "user", "content": [parts("Why?")[0], {"type": "image_url", "image_url": {}}]}, ASSISTANT),
        "message 1 has a part of type 'image_url': the model reads text only"),
    "only empty parts": (line({"role": "user", "content": parts("", " ")}, ASSISTANT), "message 1 (user) is empty"),
    "no parts": (line({"role": "user", "content": []}, ASSISTANT), "message 1 (user) is empty"),
    "half a surrogate pair in a part": (line({"role": "user", "content": parts("a")}, ASSISTANT).replace(
        b'"a"', rb'"\ud83d"'), "message 1 contains half of a surrogate pair (\\ud800-\\udfff), which is not text"),
    "empty content": (line(USER, {"role": "assistant", "content": ""}), "message 2 (assistant) is empty"),
    "content of white space": (line({"role": "user", "content": " \n\t\u3000"}), "message 1 (user) is empty"),
    "another key of a message": (line(USER, ASSISTANT | {"prefix": True}),
        "message 2 has a key 'prefix', expected only role and content"),
    "a name": (line(USER | {"name": "Ann"}, ASSISTANT), "message 1 has a key 'name', expected only role and content"),
    "a weight between": (line(USER, ASSISTANT | {"weight": 0.5}),
        "message 2 has weight 0.5, expected 0, 1 or no weight"),
    "a weight as text": (line(USER, ASSISTANT | {"weight": "0"}),
        "message 2 has weight '0', expected 0, 1 or no weight"),
    "a user's weight": (line(USER | {"weight": [0]}, ASSISTANT),
        "message 1 has weight [0], expected 0, 1 or no weight"),
    "a tool call": (line(USER, {"role": "assistant", "name": None, "tool_calls": [1]}),
        f"message 2 has a key 'tool_calls': {NO_TOOLS}"),
    "a tool's answer": (line(USER, {"role": "tool", "tool_call_id": "a", "content": "4"}),
        f"message 2 has role 'tool': {NO_TOOLS}"),
    "an image of a message": (line(USER | {"images": ["a.png"]}, ASSISTANT),
        "message 1 has a key 'images': the model reads text only"),
    "tools": (line(USER, ASSISTANT, tools=[{"type": "function"}]), f"has a key 'tools': {NO_TOOLS}"),
    "tools as mistral-finetune names them": (line(USER, ASSISTANT, available_tools=[{"type": "function"}]),
        f"has a key 'available_tools': {NO_TOOLS}"),
    "functions": (line(USER, ASSISTANT, functions=[{"name": "f"}]), f"has a key 'functions': {NO_TOOLS}"),
    "images": (line(USER, ASSISTANT, images=["a.png"]), "has a key 'images': the model reads text only"),
    "an answer marked bad": (line(USER, ASSISTANT, label=False),
        "has a key 'label': it marks answers as good or bad, and bad ones would be learned"),
    "an answer that was rejected": (line(USER, ASSISTANT, rejected="No."),
        "has a key 'rejected': an answer that is not to be learned"),
    "messages that were rejected": (line(USER, ASSISTANT, rejected_messages=[USER]),
        "has a key 'rejected_messages': an answer that is not to be learned"),
    "a system prompt besides a system message": (line(SYSTEM, USER, ASSISTANT, system="Be long."),
        'has a key "system" and a system message too, expected one of them'),
    "two system prompts": (line(USER, ASSISTANT, system="Be long.", system_prompt="Be short."),
        'has a key "system" and system_prompt too, expected one of them'),
    "a system prompt that is no text": (line(USER, ASSISTANT, system=["Be long."]),
        '"system" is a list, expected text'),
    "half a surrogate pair in a key": (line(USER, ASSISTANT, odd="@").replace(b"odd", rb"\ud83d"),
        "the key '\\ud83d' contains half of a surrogate pair (\\ud800-\\udfff), which is not text"),
    "half a surrogate pair in a system prompt": (line(USER, ASSISTANT, system="@").replace(b"@", rb"\ud83d"),
        '"system" contains half of a surrogate pair (\\ud800-\\udfff), which is not text'),
    "unknown role": (line(USER, {"role": "critic", "content": "4"}),
        "message 2 has role 'critic', expected system, user or assistant"),
    "role is a list": (line({"role": [], "content": "Why?"}, ASSISTANT),
        "message 1 has role [], expected system, user or assistant"),
    "a role of a hundred letters": (line({"role": "x" * 100, "content": "Why?"}),
        f"message 1 has role '{'x' * 36}..., expected system, user or assistant"),
    "system in the middle": (line(USER, SYSTEM, ASSISTANT), "message 2 is from system, expected assistant"),
    "two users in a row": (line(USER, USER, ASSISTANT), "message 2 is from user, expected assistant"),
    "two assistants in a row": (line(USER, ASSISTANT, ASSISTANT), "message 3 is from assistant, expected user"),
    "assistant first": (line(ASSISTANT, USER, ASSISTANT), "message 1 is from assistant, expected user"),
    "user last": (line(USER, ASSISTANT, USER), "ends with user, expected an assistant message last"),
    "only a user": (line(USER), "ends with user, expected an assistant message last"),
    "only a system message": (line(SYSTEM), "ends with system, expected an assistant message last"),
    "half a surrogate pair": (escaped(r"a\ud83d"),
        "message 2 contains half of a surrogate pair (\\ud800-\\udfff), which is not text"),
    "the other half": (escaped(r"\ude00 b"),
        "message 2 contains half of a surrogate pair (\\ud800-\\udfff), which is not text"),
    "halves in the wrong order": (escaped(r"\ude00\ud83d"),
        "message 2 contains half of a surrogate pair (\\ud800-\\udfff), which is not text"),
    "half a pair in a role": (rb'{"messages": [{"role": "\ud800", "content": "a"}]}',
        r"message 1 has role '\ud800', expected system, user or assistant"),
    "an escape sequence in a role": (line({"role": "\x1b[31m", "content": "Why?"}),
        r"message 1 has role '\x1b[31m', expected system, user or assistant"),
    "an escape sequence in a key": (line(USER | {"\x1b[2J": 1}),
        r"message 1 has a key '\x1b[2J', expected only role and content"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_bad_row_is_refused_with_what_was_found_and_wanted(row: bytes, message: str) -> None:
    assert refusal(row) == message


LINES: dict[str, tuple[bytes, list[tuple[int, bytes]]]] = {
    "a mark and line ends": (BOM + b"a\nb\n", [(1, b"a"), (2, b"b")]),
    "CRLF": (b"a\r\nb\r\n", [(1, b"a"), (2, b"b")]),
    "no newline at the end": (BOM + b"a\r\nb", [(1, b"a"), (2, b"b")]),
    "blank lines": (b"\n \t\r\na\n\n\r\nb\n\n", [(3, b"a"), (6, b"b")]),
    "nothing": (b"", []),
    "only a mark": (BOM, []),
    "only a mark and blank lines": (BOM + b"\r\n \n\t\n", []),
    "a mark on a later line": (b"a\n" + BOM + b"b\n", [(1, b"a"), (2, BOM + b"b")]),
    "line separators in text": ("a\u2028b\x85c\x0bd\x0ce\n".encode(), [(1, "a\u2028b\x85c\x0bd\x0ce".encode())]),
}


@pytest.mark.parametrize(("data", "lines"), LINES.values(), ids=LINES.keys())
def test_lines_come_without_marks_ends_and_blank_ones_and_with_their_numbers(
    data: bytes, lines: list[tuple[int, bytes]]
) -> None:
    assert numbered(data) == lines


LONG_LINES = {
    "a little too long": b"x" * (2**20 + 1),
    "many times too long": b"x" * (3 * 2**20 + 17),
    "beginning with spaces": b" " * 2**21 + b"x",
    "with carriage returns at the cut": b"{}" + b"\r" * 2**21 + b"x",
}


@pytest.mark.parametrize("start", [b"", BOM], ids=["plain", "after a byte order mark"])
@pytest.mark.parametrize("long", LONG_LINES.values(), ids=LONG_LINES.keys())
def test_an_over_long_line_is_refused_and_the_next_has_its_right_number(long: bytes, start: bytes) -> None:
    (first, kept), second = numbered(start + long + b"\n" + line(USER, ASSISTANT) + b"\n")
    assert first == 1
    assert refusal(kept) == "longer than 1 MiB, expected one conversation a line"
    assert second == (2, line(USER, ASSISTANT))


def test_of_an_over_long_line_no_more_is_kept_than_the_limit() -> None:
    ((_, kept),) = numbered(b"x" * 5 * MAX_LINE_BYTES)
    assert len(kept) <= MAX_LINE_BYTES + 1


@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_line_of_just_the_limit_is_taken(end: bytes) -> None:
    row = line(USER, ASSISTANT, x="@").replace(b"@", b"x" * (MAX_LINE_BYTES - len(line(USER, ASSISTANT, x=""))))
    assert len(row) == MAX_LINE_BYTES
    ((number, kept),) = numbered(row + end)
    assert (number, parse_row(kept)) == (1, [USER, ASSISTANT])


def test_gzip_is_read_as_what_it_holds_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(gzip.compress(BOM + b"a\r\n\nb"))
    with open_lines(path) as stream:
        assert list(read_lines(stream)) == [(1, b"a"), (3, b"b")]


@pytest.mark.parametrize("damage", [lambda data: data[:900], lambda data: data[:30] + b"\xff" * 9 + data[39:]])
def test_a_damaged_gzip_is_a_data_error_that_says_how_far_it_was_read(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(damage(gzip.compress(random.Random(0).randbytes(3000).hex().encode() + b"\na")))
    with open_lines(path) as stream, pytest.raises(DataError) as caught:
        list(read_lines(stream))
    assert str(caught.value) == (
        f"{path}: the gzip is damaged or cut short after line 0; copy the file again; gzip -t {path} tests it"
    )


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        open_lines(path)
    return caught.value.problems[0].replace(str(path), "FILE")


def test_a_folder_is_a_config_error_that_names_a_file_in_it(tmp_path: Path) -> None:
    convert = convert_command(tmp_path).replace(str(tmp_path), "FILE")
    assert refused(tmp_path) == (
        f"FILE is a folder, expected a file; name a file in it, or convert what is in it: {convert}"
    )
    (tmp_path / "mine.jsonl.gz").touch()
    assert refused(tmp_path) == "FILE is a folder, expected a file; name a file in it, for example FILE/mine.jsonl.gz"


@pytest.mark.parametrize(
    ("split", "existing", "output"),
    [("train", "val.jsonl", "train.jsonl"), ("validation", "train.jsonl", "val.jsonl"),
        ("train", "train.jsonl", "'my rows-chat.jsonl'"), ("validation", "val.jsonl", "'my rows-chat.jsonl'")],
)  # fmt: skip
def test_the_command_that_converts_a_file_names_an_output_that_does_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str, existing: str, output: str
) -> None:
    monkeypatch.setattr(jsonl, "resolve", lambda path: tmp_path / Path(path).name)
    (tmp_path / existing).touch()
    typed = f"{command('scripts/convert_data.py')} '/my rows.json.gz' {output}"
    assert convert_command(Path("/my rows.json.gz"), split).replace("data/processed/", "") == typed


def test_a_device_is_a_config_error() -> None:
    assert refused(Path("/dev/null")) == (
        "FILE is a device or a socket, expected a file; "
        "write it to a file first, for example data/processed/train.jsonl"
    )


def test_a_file_without_permission_is_a_config_error_with_what_to_type(tmp_path: Path) -> None:
    path = tmp_path / "my rows.jsonl"
    path.touch(mode=0)
    with as_nobody():
        assert refused(path) == (
            f"FILE: Permission denied; make it readable: chmod u+r '{path}', "
            f"or if it is another user's: sudo chmod a+r '{path}'"
        ).replace(str(path), "FILE")


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
        assert message.keys() - {"weight"} == {"role", "content"}
        assert message["content"].encode("utf-8").strip()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([b"a", b"\r", b"\n", b"\r\n", b" ", b"\n\n", BOM, b"\xff"]), max_size=12).map(b"".join))
def test_lines_are_numbered_as_an_editor_numbers_them(data: bytes) -> None:
    naive = enumerate(data.removeprefix(BOM).split(b"\n"), 1)
    assert numbered(data) == [(number, text.rstrip(b"\r")) for number, text in naive if text.strip()]
