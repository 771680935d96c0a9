"""Chat JSONL, line by line: a stream of numbered lines, and the one decided answer to each way a line can be bad."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from finetune.errors import ConfigError
from finetune.files import shown

MAX_LINE_BYTES = 16 * 2**20
BOM = b"\xef\xbb\xbf"


class BadRow(Exception):
    """What is wrong with one line: what was found, and what was wanted."""


def open_lines(path: Path, advice: str = "") -> BinaryIO:
    """Open a data file; ConfigError, ending in `advice`, where it is not there."""
    try:
        return path.open("rb")
    except OSError as error:
        raise ConfigError(f"{shown(path)}: {error.strerror}", fix=f"put your JSONL there{advice}") from None


def read_lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line without its end) for every line that is not blank.

    A byte order mark at the start and CRLF ends are taken off. Of a line over MAX_LINE_BYTES only that many bytes and
    one are kept, which `parse_row` refuses; so memory stays bounded whatever the file is.
    """
    number = 0
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


def parse_row(line: bytes) -> list[dict[str, str]]:
    """The messages of one line, checked: {"messages": [{"role", "content"}, ...]}.

    Roles are system (first only), then user and assistant in turn, assistant last. Other top-level keys are metadata
    and ignored; other keys of a message would change its meaning and are refused unless null. Raises BadRow.
    """
    if len(line) > MAX_LINE_BYTES:
        raise BadRow(f"longer than {MAX_LINE_BYTES // 2**20} MiB, wanted one conversation a line")
    row = _parse_json(line)
    if not isinstance(row, dict):
        raise BadRow(f'found {_kind(row)}, wanted an object {{"messages": [...]}}')
    if "messages" not in row:
        found = ", ".join([_short(key) for key in islice(row, 5)] + ["..."] * (len(row) > 5)) or "no key"
        raise BadRow(f'no "messages" key (found {found})')
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise BadRow(f'"messages" is {_kind(messages)}, wanted a list of messages')
    for index, message in enumerate(messages, 1):
        _check_message(index, message)
    _check_order([message["role"] for message in messages])
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _parse_json(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start}") from None
    except json.JSONDecodeError as error:
        raise BadRow(f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}") from None
    except RecursionError:
        raise BadRow("not a conversation: nested too deep") from None
    except ValueError as error:  # a number of thousands of digits
        raise BadRow(f"not JSON: {str(error).split(';')[0]}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        keys = [key for key, _ in pairs]
        raise BadRow(f"key {_short(Counter(keys).most_common(1)[0][0])} stands twice in one object")
    return mapping


def _no_constant(name: str) -> NoReturn:
    raise BadRow(f"not JSON: {name} is no JSON value")


def _check_message(index: int, message: Any) -> None:
    where = f"message {index}"
    if not isinstance(message, dict):
        raise BadRow(f"{where} is {_kind(message)}, wanted an object with role and content")
    for key in ("role", "content"):
        if key not in message:
            raise BadRow(f'{where} has no "{key}"')
    extra = [key for key, value in message.items() if key not in ("role", "content") and value is not None]
    if extra:
        raise BadRow(f"{where} has a key {_short(extra[0])}, wanted only role and content")
    if message["role"] not in ("system", "user", "assistant"):
        raise BadRow(f"{where} has role {_short(message['role'])}, wanted system, user or assistant")
    content = message["content"]
    if not isinstance(content, str):
        raise BadRow(f"{where} has content that is {_kind(content)}, wanted text")
    if not content.strip():
        raise BadRow(f"{where} ({message['role']}) is empty")
    if not content.isascii() and any("\ud800" <= character <= "\udfff" for character in content):
        raise BadRow(f"{where} holds half of a surrogate pair (\\ud800-\\udfff), which is no text")


def _check_order(roles: list[str]) -> None:
    start = 1 if roles[0] == "system" else 0
    for turn, role in enumerate(roles[start:]):
        wanted = "assistant" if turn % 2 else "user"
        if role != wanted:
            raise BadRow(f"message {start + turn + 1} is from {role}, wanted {wanted}")
    if roles[-1] != "assistant":
        raise BadRow(f"ends with {roles[-1]}, wanted an assistant message last")


def _kind(value: Any) -> str:
    names: dict[type, str] = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    if isinstance(value, list) and not value:
        return "an empty list"
    return names.get(type(value), "a number")


def _short(value: Any) -> str:
    """Quoted, escaped and cut, so that a row cannot write to the terminal through a message."""
    text = ascii(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
