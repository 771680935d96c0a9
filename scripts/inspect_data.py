"""Show every token of a row with its label: tokens with loss are green, or marked with ^ without color."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from finetune import cli
from finetune.config.base_model import is_local
from finetune.config.load import load_config
from finetune.errors import ConfigError, DataError
from finetune.files import resolve
from finetune.terminal import Terminal

if TYPE_CHECKING:
    from finetune.config.schema import Config
    from finetune.data.template import Encoded


def parse() -> argparse.Namespace:
    parser = cli.parser(__doc__ or "", "the config with the tokenizer, length and system prompt")
    parser.add_argument("file", metavar="FILE", type=Path, help="a JSONL file")
    parser.add_argument("--rows", metavar="A-B", default="1-3", help="lines to show, from 1 (default 1-3)")
    return parser.parse_args()


def line_range(text: str) -> range:
    """Parse `3` or `3-7` (inclusive) to line numbers. Raises ConfigError."""
    first, _, last = text.partition("-")
    if not re.fullmatch(r"[0-9]{1,9}(-[0-9]{1,9})?", text) or not 1 <= int(first) <= int(last or first):
        raise ConfigError(f"--rows {text}: expected a line or a range of lines, for example 3 or 3-7")
    return range(int(first), int(last or first) + 1)


def encoded_rows(path: Path, rows: range, config: Config) -> Iterator[dict[str, object]]:
    """Yield each row as {"line", "input_ids", "labels", "text", "tokens", "note"}. Raises DataError for a bad one."""
    from finetune.data.encode import as_trained, truncate
    from finetune.data.formats import foreign
    from finetune.data.jsonl import BadRow, open_lines, parse_row, read_lines
    from finetune.data.preview import segments
    from finetune.data.tokenizer import load_chat

    open_lines(path).close()
    foreign.refuse(path, "train")
    chat = load_chat(resolve(config.model.name) if is_local(config.model.name) else None)
    with open_lines(path) as stream:
        for number, line in read_lines(stream):
            if number >= rows.stop:
                return
            if number not in rows:
                continue
            try:
                messages = as_trained(parse_row(line), config.system_prompt, config.dataset.train_on)
            except BadRow as bad:
                raise DataError(f"{path}:{number}: {bad}") from None
            encoded = chat.encode([messages])[0]
            cut = truncate(encoded, config.model.max_seq_length)
            input_ids, labels, _ = cut or encoded
            yield {
                "line": number,
                "input_ids": input_ids,
                "labels": labels,
                "text": "".join(text for text, _ in segments(chat, input_ids, labels)),
                "tokens": [chat.tokenizer.id_to_token(token) for token in input_ids],
                "note": _note(encoded, cut, config),
            }


def _note(encoded: Encoded, cut: Encoded | None, config: Config) -> str:
    full, limit = len(encoded.input_ids), config.model.max_seq_length
    if not encoded.turn_ends:
        return f"{full} tokens, DROPPED: no assistant turn carries loss"
    if full > limit and not config.dataset.truncation:
        return f"{full} tokens, BAD: over model.max_seq_length {limit}, and dataset.truncation is false"
    if cut is None:
        return f"{full} tokens, DROPPED: no assistant turn with loss ends within model.max_seq_length {limit}"
    kept = len(cut.input_ids)
    return f"{full} tokens" if kept == full else f"{full} tokens, CUT to {kept} at the end of an assistant turn"


def show(terminal: Terminal, row: dict[str, object]) -> None:
    """Print one row: its tokens in order, those with loss marked."""
    from finetune.data.template import IGNORED
    from finetune.wording import one_line

    heading = terminal.paint(f"line {row['line']}", "bold")
    terminal.say(f"{heading}: {row['note']}")
    parts = []
    for token, label in zip(row["tokens"], row["labels"], strict=True):  # type: ignore[call-overload]
        text = one_line(token)
        if label == IGNORED:
            parts.append(terminal.paint(text, "dim"))
        else:
            parts.append(terminal.paint(text, "green") if terminal.color else f"^{text}")
    terminal.say(" ".join(parts))
    terminal.say()


def main() -> None:
    options = parse()
    terminal = Terminal(options.json)
    rows = line_range(options.rows)
    config, source = load_config(options.config, options.set)
    terminal.decision("config", source)
    shown = 0
    for row in encoded_rows(options.file, rows, config):
        shown += 1
        if options.json:
            print(json.dumps({key: row[key] for key in ("line", "input_ids", "labels", "text")}))
        else:
            show(terminal, row)
    if not shown:
        raise DataError(f"{options.file} has no row in lines {options.rows}")


if __name__ == "__main__":
    cli.run(main)
