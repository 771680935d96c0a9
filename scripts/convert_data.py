"""Convert a data set of any common format to chat JSONL, and print what was changed, ignored and dropped."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from finetune import cli
from finetune.errors import ConfigError
from finetune.files import shown
from finetune.terminal import Terminal
from finetune.wording import counted, one_line

if TYPE_CHECKING:
    from finetune.data.formats.convert import Account, Tally

LISTED = 20
HELD_OUT = "val.jsonl"
TITLES = {"changed": "changed", "unread": "ignored keys", "dropped": "dropped"}


def parse() -> argparse.Namespace:
    parser = cli.plain_parser(__doc__ or "")
    parser.add_argument("source", metavar="IN", help="a file, a folder, or a data set on the Hub (owner/name)")
    parser.add_argument(
        "output", metavar="OUT", type=Path, help="the chat JSONL to write; an existing file is never overwritten"
    )
    parser.add_argument(
        "--merge-turns", action="store_true", help="join consecutive turns of one role with a blank line"
    )
    parser.add_argument("--system", metavar="TEXT", help="the system message for rows that have none")
    text = "the data's columns by our keys, such as prompt=Q,completion=A"
    parser.add_argument("--columns", metavar="A=B,...", default="", help=text)
    text = f"write the rows whose KEY is validation or test, else a tenth of its values, to {HELD_OUT} next to OUT"
    parser.add_argument("--split-by", metavar="KEY", help=text)
    return parser.parse_args()


def columns(text: str) -> dict[str, str]:
    """Parse `prompt=Q,completion=A` to {"prompt": "Q", "completion": "A"}. Raises ConfigError."""
    pairs = [pair.partition("=") for pair in text.split(",") if text]
    if not all(ours and theirs for ours, _, theirs in pairs):
        raise ConfigError(f"--columns {text}: expected pairs, for example prompt=Q,completion=A")
    return {ours: theirs for ours, _, theirs in pairs}


def show(terminal: Terminal, account: Account, unit: str) -> None:
    """Print the formats of the rows, and what was changed, ignored and dropped."""
    for name, tally in account.formats.items():
        terminal.say(f"  {tally.count:>9,}  {name}")
    for kind, title in TITLES.items():
        tallies: dict[str, Tally] = getattr(account, kind)
        if not tallies:
            continue
        terminal.header(title)
        ranked = sorted(tallies.items(), key=lambda item: -item[1].count)
        for name, tally in ranked[:LISTED]:
            first = "first " if tally.count > len(tally.first) else ""
            terminal.say(f"  {tally.count:>9,}  {one_line(name)}: {first}{tally.shown(unit)}")
        if len(ranked) > LISTED:
            terminal.say(f"  {'':>9}  and {len(ranked) - LISTED} more")


def next_command(outputs: dict[str, Path]) -> str:
    """The command that shows the plan of a training on the new files."""
    keys = {"train": "train_file", "validation": "validation_file"}
    values = (f"dataset.{keys[name]}={shown(path.resolve())}" for name, path in outputs.items())
    settings = (f"--set {shlex.quote(value)}" for value in values)
    return " ".join([cli.command("src/train.py"), "--config h100", *settings, "--dry-run"])


def document(account: Account, source: str, outputs: dict[str, Path]) -> dict[str, Any]:
    """The document of `--json`."""
    written = {name: {"path": str(path), "rows": account.written[name]} for name, path in outputs.items()}
    return {"recognized": source, **asdict(account), "written": written, "next": next_command(outputs)}


def main() -> None:
    from finetune.data.formats.convert import Options, convert
    from finetune.data.formats.sources import open_source

    cli.quiet_libraries()
    options = parse()
    terminal = Terminal(options.json)
    chosen = Options(options.merge_turns, options.system, columns(options.columns), options.split_by)
    outputs = {"train": options.output}
    if options.split_by:
        outputs["validation"] = options.output.with_name(HELD_OUT)
        if options.output.name == HELD_OUT:
            raise ConfigError(f"OUT is {options.output}, which --split-by writes too", fix="name it train.jsonl")
    source = open_source(options.source)
    terminal.decision("recognized", f"{options.source} is {source.what}")
    account = convert(source, outputs, chosen)
    show(terminal, account, source.unit)
    for name, path in outputs.items():
        terminal.decision("written", f"{counted(account.written[name], 'conversation')} to {shown(path)}")
    terminal.say(f"next: {next_command(outputs)}")
    if options.json:
        cli.print_json(document(account, source.what, outputs))


if __name__ == "__main__":
    cli.run(main)
