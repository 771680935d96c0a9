"""Converts rows of any known format to chat JSONL, and counts what was changed, ignored and dropped."""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TextIO

from finetune.data.formats.shapes import Notes, Turns, messages_of, shape_of, unknown
from finetune.data.formats.sources import Source
from finetune.data.jsonl import BadRow, parse_row, says_something
from finetune.data.template import Messages
from finetune.errors import ConfigError, DataError
from finetune.wording import listed

FIRST = 5  # row numbers kept for each change and reason
MOST_REASONS = 1000  # different reasons that are counted
HELD_OUT = 0.1  # share of the values of --split-by, if none of them names a split
HELD_OUT_NAMES = {"validation", "valid", "val", "dev", "eval", "test"}
MERGED = "consecutive turns of one role joined by a blank line (--merge-turns)"
UNANSWERED = "last message dropped: it has no answer"
SYSTEM_ADDED = "system message added (--system)"


def _no_json(value: Any) -> NoReturn:
    raise BadRow(f"contains a value of type {type(value).__name__}, which JSON does not have")


as_json = json.JSONEncoder(ensure_ascii=False, default=_no_json).encode


@dataclass(frozen=True)
class Options:
    """The flags of a conversion. `columns` maps our keys to columns of the data; `split_by` is a key of the data."""

    merge_turns: bool = False
    system: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    split_by: str | None = None


@dataclass
class Tally:
    """A count of rows, and the numbers of the first FIRST."""

    count: int = 0
    first: list[int] = field(default_factory=list)

    def shown(self, unit: str) -> str:
        """The first row numbers: `line 3` or `lines 3, 5`."""
        return f"{unit}{'s' if len(self.first) > 1 else ''} {', '.join(map(str, self.first))}"

    def add(self, number: int) -> None:
        """Count a row."""
        self.count += 1
        if len(self.first) < FIRST:
            self.first.append(number)


@dataclass
class Account:
    """The result of a conversion: a Tally for each format, change, ignored key and reason to drop a row."""

    read: int = 0
    written: dict[str, int] = field(default_factory=dict)
    formats: dict[str, Tally] = field(default_factory=dict)
    changed: dict[str, Tally] = field(default_factory=dict)
    unread: dict[str, Tally] = field(default_factory=dict)
    dropped: dict[str, Tally] = field(default_factory=dict)

    def note(self, kind: str, what: Iterable[str], number: int) -> None:
        """Count the row `number` for each of `what`; `kind` is the name of a field with tallies."""
        tallies: dict[str, Tally] = getattr(self, kind)
        for name in what:
            if name in tallies or len(tallies) < MOST_REASONS:
                tallies.setdefault(name, Tally()).add(number)


def convert(source: Source, outputs: dict[str, Path], options: Options) -> Account:
    """Write the rows of `source` to `outputs`: "train", and "validation" if `options.split_by` is set.

    Writes complete files or none, and never overwrites one. Raises ConfigError, and DataError if no row is left.
    """
    for path in outputs.values():
        _refuse_existing(path)
    account = Account(written=dict.fromkeys(outputs, 0))
    with ExitStack() as files:
        streams = {name: _open_partial(path, files) for name, path in outputs.items()}
        _check_columns(source, options.columns)
        held_out = _held_out(source, options.split_by) if options.split_by else set()
        _write(source, streams, options, held_out, account)
        for name, path in outputs.items():
            if not account.written[name]:
                raise _nothing_for(path, account)
        for stream in streams.values():
            stream.close()  # before the first rename, since flushing may fill the disk
        for path in outputs.values():
            _refuse_existing(path)  # another program may have written it meanwhile
        for name, path in outputs.items():
            Path(streams[name].name).rename(path)
    return account


def _refuse_existing(path: Path) -> None:
    if path.is_dir():
        raise ConfigError(f"{path} is a folder, expected a file", fix=f"name one in it: {path / 'train.jsonl'}")
    if path.exists():
        raise ConfigError(f"{path} already exists, and nothing is overwritten", fix="name another file")


def _open_partial(path: Path, files: ExitStack) -> TextIO:
    """Open a new file next to `path`; `files` closes it at the end, and removes it unless it was renamed."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = partial.open("w", encoding="utf-8", newline="\n")
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise ConfigError(f"{path} cannot be written: {error.strerror}", fix="name another file") from None
    files.callback(partial.unlink, missing_ok=True)
    return files.enter_context(stream)


def _check_columns(source: Source, columns: Mapping[str, str]) -> None:
    there = list(source.first) if isinstance(source.first, dict) else []
    missing = [column for column in columns.values() if column not in there]
    if missing:
        found = listed([ascii(name) for name in there], 20) or "none"
        raise ConfigError(f"--columns: no column {missing[0]!a}, the first row has {found}")


def _write(source: Source, streams: dict[str, TextIO], options: Options, held_out: set[str], account: Account) -> None:
    for number, row in source.rows():
        account.read += 1
        notes = Notes()
        try:
            messages = convert_row(row, options, notes)
        except BadRow as bad:
            account.note("dropped", [_without_places(str(bad))], number)
            continue
        finally:
            account.note("formats", notes.shapes, number)
        account.note("changed", notes.changes, number)
        account.note("unread", notes.unread, number)
        name = "validation" if options.split_by and _value(row, options.split_by) in held_out else "train"
        streams[name].write(as_json({"messages": messages}) + "\n")
        account.written[name] += 1


def convert_row(row: Any, options: Options, notes: Notes) -> Messages:
    """Convert one row to messages that training accepts. Raises BadRow."""
    if isinstance(row, BadRow):
        raise row
    renamed = {key: row.get(column) for key, column in options.columns.items()} if isinstance(row, dict) else {}
    shape = shape_of(renamed or row)
    if shape is None:
        raise BadRow(unknown(row))
    notes.shapes.append(shape.described)
    if renamed:
        used = options.columns.values()
        row = renamed | {key if key not in renamed else f"{key} (column)": row[key] for key in row if key not in used}
    messages = messages_of(row, shape, notes)
    notes.unread.pop(str(options.split_by), None)
    if options.merge_turns:
        messages = _merged(messages, notes)
    if len(messages) > 2 and messages[-1]["role"] == "user":
        notes.changes[UNANSWERED] = 1
        messages = messages[:-1]
    if options.system is not None:
        messages = _led_by(options.system, messages, notes)
    _check_turns([turn["role"] for turn in messages if turn["role"] != "system"])
    return parse_row(as_json({"messages": messages}).encode("utf-8", "surrogatepass"))


def _check_turns(roles: list[Any]) -> None:
    """Refuse wrong turns with more advice than `parse_row` gives."""
    if roles[:1] == ["assistant"]:
        raise BadRow("begins with the assistant, expected user")
    if any(roles[place] == role and role in ("user", "assistant") for place, role in enumerate(roles[1:])):
        raise BadRow("two consecutive turns of one role; --merge-turns joins them")


def _led_by(system: str, messages: Turns, notes: Notes) -> Turns:
    """`messages` with `system` as the system message, unless they have one that is not empty."""
    own = messages[0] if messages and messages[0]["role"] == "system" else {}
    if says_something(own.get("content")):
        return messages
    notes.changes[SYSTEM_ADDED] = 1
    return [{"role": "system", "content": system}, *messages[1 if own else 0 :]]


def _merged(messages: Turns, notes: Notes) -> Turns:
    """Join consecutive turns of one role with a blank line, as mistral-common does."""
    merged: Turns = []
    for turn in messages:
        before = merged[-1] if merged else {}
        texts = [before.get("content"), turn["content"]]
        if before.get("role") == turn["role"] and all(isinstance(text, str) for text in texts):
            if turn["role"] == "assistant" and _weight(before) != _weight(turn):
                raise BadRow("two consecutive turns of one role with different weights")
            merged[-1] = {**before, **turn, "content": "\n\n".join(filter(None, texts))}
            notes.changes[MERGED] = 1
        else:
            merged.append(turn)
    return merged


def _weight(turn: dict[str, Any]) -> Any:
    weight = turn.get("weight")
    return weight if says_something(weight) else 1


def _value(row: Any, key: str) -> str:
    return str(row.get(key)) if isinstance(row, dict) else "None"


def _held_out(source: Source, key: str) -> set[str]:
    """The values of `key` whose rows are held out: those that name a validation split, else a tenth, by hash.

    Raises ConfigError if there are fewer than two values.
    """
    values = {_value(row, key) for _, row in source.rows()}
    if len(values) < 2:
        only = next(iter(values), "None")
        raise ConfigError(f"--split-by {key}: every row has the value {only[:40]!a}, expected at least two values")
    named = {value for value in values if value.lower() in HELD_OUT_NAMES}
    by_hash = sorted(values, key=lambda value: hashlib.sha256(value.encode("utf-8", "surrogatepass")).digest())
    return named or set(by_hash[: max(1, round(HELD_OUT * len(values)))])


def _nothing_for(path: Path, account: Account) -> DataError:
    """The error that no row is left, with the most frequent reason for dropping rows."""
    reasons = sorted(account.dropped.items(), key=lambda item: -item[1].count)
    why = "".join(f": {tally.count:,} of {account.read:,} rows dropped: {reason}" for reason, tally in reasons[:1])
    unknown = bool(reasons) and reasons[0][0].startswith("no known format (keys")
    fix = "name the columns: --columns prompt=Q,completion=A" if unknown else "docs/data.md has the formats"
    return DataError(f"no conversation for {path}{why}", fix)


def _without_places(reason: str) -> str:
    """A reason without message numbers and positions, so that rows with the same reason are counted together."""
    return re.sub(r" (at position|at column) \d+", "", re.sub(r"\bmessage \d+", "a message", reason))
