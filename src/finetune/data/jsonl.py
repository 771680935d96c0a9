"""Reads chat JSONL line by line: opens and numbers lines, parses a row, and says what is wrong with a bad one."""

from __future__ import annotations

import gzip
import io
import json
import stat
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from finetune.cli import command
from finetune.data.template import Message, Messages
from finetune.errors import ConfigError, DataError
from finetune.files import quoted, resolve, shown

MAX_LINE_BYTES = 2**20  # a quarter of a million tokens; tokenizing 16 MiB took 24 s and 1.3 GiB
BOM = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"
SYSTEM_KEYS = ("system", "system_prompt")  # next to "messages", in exports of several tools
PROCESSED = Path("data/processed")  # where the shipped configs look for data
NO_TOOLS = "the chat template of Mistral-7B-Instruct-v0.2 has no tools"
ONLY_TEXT = "the model reads text only"
# Keys of a row or a message that would change what is learned; so does every key that begins with "rejected".
REFUSED_KEYS = {
    **dict.fromkeys(("tools", "available_tools", "functions", "tool_calls", "tool_call_id", "function_call"), NO_TOOLS),
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), ONLY_TEXT),
    "label": "it marks answers as good or bad, and bad ones would be learned",
}


class BadRow(Exception):
    """A line is bad; the text says what was found and what was expected."""


def open_lines(path: Path, advice: str = "") -> BinaryIO:
    """Open a data file, unpacking gzip. Raises ConfigError if it is unreadable, or missing, then ending in `advice`."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # opening a FIFO would wait for its writer
            raise _not_a_file(path, mode)
        with path.open("rb") as stream:
            is_gzip = stream.read(len(GZIP)) == GZIP
        return gzip.open(path) if is_gzip else path.open("rb")  # type: ignore[return-value]
    except PermissionError as error:
        fix = f"make it readable: chmod u+r {quoted(path)}, or if it is another user's: sudo chmod a+r {quoted(path)}"
        raise ConfigError(f"{shown(path)}: {error.strerror}", fix=fix) from None
    except OSError as error:
        raise ConfigError(f"{shown(path)}: {error.strerror}", fix=f"put your JSONL there{advice}") from None


def _not_a_file(path: Path, mode: int) -> ConfigError:
    copied = PROCESSED / "train.jsonl"
    if stat.S_ISDIR(mode):
        inside = sorted(entry for entry in path.iterdir() if ".jsonl" in entry.suffixes)
        fix = f"for example {shown(inside[0])}" if inside else f"or convert what is in it: {convert_command(path)}"
        return ConfigError(f"{shown(path)} is a folder, expected a file", fix=f"name a file in it, {fix}")
    if stat.S_ISFIFO(mode):
        found = f"{shown(path)} is a pipe, which can be read only once, and data is read more than once"
        return ConfigError(found, fix=f"write it to a file first: cat {quoted(path)} > {copied}")
    found = f"{shown(path)} is a device or a socket, expected a file"
    return ConfigError(found, fix=f"write it to a file first, for example {copied}")


def convert_command(path: Path, split: str = "train") -> str:
    """The command that converts a data file, or a folder of them, to a new file."""
    return f"{command('scripts/convert_data.py')} {quoted(path)} {quoted(converted(path, split))}"


def converted(path: Path, split: str) -> Path:
    """The file to convert `path` to: the one that the configs name for `split`, or another if that exists."""
    named = PROCESSED / {"train": "train.jsonl", "validation": "val.jsonl"}[split]
    return PROCESSED / f"{path.name.split('.')[0]}-chat.jsonl" if resolve(str(named)).exists() else named


def unpacked(source: io.RawIOBase) -> BinaryIO:
    """A stream of the file's bytes, without its gzip compression if it has one."""
    stream = io.BufferedReader(source, 2**20)
    is_gzip = stream.peek(len(GZIP)).startswith(GZIP)
    return gzip.GzipFile(fileobj=stream) if is_gzip else stream  # type: ignore[return-value]


def read_lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line without its end) for every line that is not blank.

    Removes a byte order mark and CRLF. Cuts a line over MAX_LINE_BYTES to one byte more than that, which `parse_row`
    refuses, so memory stays bounded. Raises DataError if a gzip is damaged.
    """
    number = 0
    try:
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                while (rest := stream.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                    pass
                yield number, line
                continue
            if number == 1:
                line = line.removeprefix(BOM)
            line = line.rstrip(b"\r\n")
            if line.strip():
                yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise damaged_gzip(Path(stream.name), f" after line {number}") from None


def damaged_gzip(path: Path, where: str = "") -> DataError:
    """The error for a gzip that cannot be unpacked."""
    fix = f"copy the file again; gzip -t {quoted(path)} tests it"
    return DataError(f"{path}: the gzip is damaged or cut short{where}", fix)


def parse_row(line: bytes, keys: Counter[str] | None = None) -> Messages:
    """Check one line, {"messages": [{"role", "content"}, ...]}, and return its messages. Raises BadRow.

    Roles are system (first only), then user and assistant in turn, ending with assistant. Content is text, or a list of
    text parts, joined as mistral-common does. An empty system message is removed. One of SYSTEM_KEYS next to "messages"
    becomes the system message. A weight is 0, 1 or null; only 0 on an assistant message has an effect, and is kept.
    Keys that would change what is learned are refused unless they are null or empty; other keys next to "messages" are
    ignored. `keys` counts the keys that were ignored or became the system message.
    """
    row = parse_json(line)
    if not isinstance(row, dict):
        raise BadRow(f'found {_kind(row)}, expected an object {{"messages": [...]}}')
    if "messages" not in row:
        found = ", ".join([_short(key) for key in islice(row, 5)] + ["..."] * (len(row) > 5)) or "no key"
        raise BadRow(f'no "messages" key (found {found})')
    given = row["messages"]
    if not isinstance(given, list) or not given:
        raise BadRow(f'"messages" is {_kind(given)}, expected a list of messages')
    others = [key for key, value in row.items() if key != "messages" and says_something(value)]
    for key in others:
        _check_key(key)
    messages = [_message(index, message) for index, message in enumerate(given, 1)]
    _check_order([message["role"] for message in messages])
    if messages[0] == {"role": "system", "content": ""}:
        del messages[0]
    if not others:
        return messages
    if keys is not None:
        keys.update(others)
    return _system_prompt(row, messages) + messages


def parse_json(line: bytes) -> Any:
    """Parse a line of JSON in UTF-8. Raises BadRow, also for more than MAX_LINE_BYTES or a key twice in an object."""
    if len(line) > MAX_LINE_BYTES:
        raise BadRow(f"longer than {MAX_LINE_BYTES // 2**20} MiB, expected one conversation a line")
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=unique_keys, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start}") from None
    except json.JSONDecodeError as error:
        raise BadRow(f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}") from None
    except RecursionError:
        raise BadRow("not a conversation: nested too deep") from None
    except ValueError as error:  # a number of thousands of digits
        raise BadRow(f"not JSON: {str(error).split(';')[0]}") from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for `object_pairs_hook`. Raises BadRow for a duplicate key."""
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        keys = [key for key, _ in pairs]
        raise BadRow(f"key {_short(Counter(keys).most_common(1)[0][0])} appears twice in one object")
    return mapping


def _no_constant(name: str) -> NoReturn:
    raise BadRow(f"not JSON: {name} is not a JSON value")


def says_something(value: Any) -> bool:
    """Whether a key's value has content; exports write null or an empty value for what a row lacks."""
    return value is not None and value not in ("", [], {})


def _check_key(key: str) -> None:
    """Refuse a key next to "messages" that would change what is learned or is not valid text."""
    _check_text(f"the key {_short(key)}", key)
    reason = "an answer that is not to be learned" if key.startswith("rejected") else REFUSED_KEYS.get(key)
    if reason:
        raise BadRow(f"has a key {_short(key)}: {reason}")


def _system_prompt(row: dict[str, Any], messages: Messages) -> Messages:
    """A list with the system message from one of SYSTEM_KEYS, or an empty list."""
    given = [key for key in SYSTEM_KEYS if says_something(row.get(key))]
    if not given:
        return []
    text = row[given[0]]
    if not isinstance(text, str):
        raise BadRow(f'"{given[0]}" is {_kind(text)}, expected text')
    own = messages[0]["role"] == "system"
    if own or len(given) > 1:
        raise BadRow(f'has a key "{given[0]}" and {"a system message" if own else given[1]} too, expected one of them')
    _check_text(f'"{given[0]}"', text)
    return [{"role": "system", "content": text}] if text.strip() else []


def _message(index: int, message: Any) -> Message:
    """One message with its content as text; "" for an empty system message. Other messages may not be empty."""
    where = f"message {index}"
    if not isinstance(message, dict):
        raise BadRow(f"{where} is {_kind(message)}, expected an object with role and content")
    if "role" not in message:
        raise BadRow(f'{where} has no "role"')
    role = message["role"]
    if role in ("tool", "function"):
        raise BadRow(f"{where} has role '{role}': {NO_TOOLS}")
    if len(message) > 2:
        for key, value in message.items():
            _check_message_key(where, key, value)
    if role not in ("system", "user", "assistant"):
        raise BadRow(f"{where} has role {_short(role)}, expected system, user or assistant")
    if "content" not in message:
        raise BadRow(f'{where} has no "content"')
    content = message["content"]
    text = "" if role == "system" and content is None else joined(where, content)
    if not text.strip():
        if role != "system":
            raise BadRow(f"{where} ({role}) is empty")
        text = ""
    _check_text(where, text)
    if role == "assistant" and message.get("weight") == 0:
        return {"role": role, "content": text, "weight": 0}
    return {"role": role, "content": text}


def _check_message_key(where: str, key: str, value: Any) -> None:
    if key in ("role", "content") or not says_something(value):
        return
    if key == "weight":
        if value not in (0, 1):  # as mistral-common's validator
            raise BadRow(f"{where} has weight {_short(value)}, expected 0, 1 or no weight")
    elif key in REFUSED_KEYS:
        raise BadRow(f"{where} has a key {_short(key)}: {REFUSED_KEYS[key]}")
    else:
        raise BadRow(f"{where} has a key {_short(key)}, expected only role and content")


def joined(where: str, content: Any) -> str:
    """Content as text; parts {"type": "text", "text"} are joined with a blank line, as mistral-common does."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRow(f"{where} has content that is {_kind(content)}, expected text")
    texts = []
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise BadRow(f'{where} has a part that is {_kind(part)}, expected {{"type": "text", "text": "..."}}')
        if part["type"] != "text":
            raise BadRow(f"{where} has a part of type {_short(part['type'])}: {ONLY_TEXT}")
        if not isinstance(part.get("text"), str):
            raise BadRow(f'{where} has a part whose "text" is {_kind(part.get("text"))}, expected text')
        texts.append(part["text"])
    return "\n\n".join(filter(None, texts))


def _check_text(where: str, text: str) -> None:
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise BadRow(f"{where} contains half of a surrogate pair (\\ud800-\\udfff), which is not text")


def _check_order(roles: list[str]) -> None:
    start = 1 if roles[0] == "system" else 0
    for turn, role in enumerate(roles[start:]):
        expected = "assistant" if turn % 2 else "user"
        if role != expected:
            raise BadRow(f"message {start + turn + 1} is from {role}, expected {expected}")
    if roles[-1] != "assistant":
        raise BadRow(f"ends with {roles[-1]}, expected an assistant message last")


def _kind(value: Any) -> str:
    names: dict[type, str] = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    if isinstance(value, list) and not value:
        return "an empty list"
    return names.get(type(value), "a number")


def _short(value: Any) -> str:
    """A value quoted, escaped and cut, so that data cannot write escape sequences to the terminal."""
    text = ascii(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
