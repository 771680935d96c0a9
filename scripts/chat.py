"""Chat with an adapter in the terminal, with the base, template, tokenizer and platform of its training."""

from __future__ import annotations

import argparse
import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from finetune import cli
from finetune.errors import ConfigError
from finetune.terminal import Terminal

if TYPE_CHECKING:
    from finetune.results.chat import Conversation


def parse() -> argparse.Namespace:
    parser = cli.parser(__doc__ or "")
    text = "a run's folder, a checkpoint of one, or a PEFT adapter in a folder or on the Hub (owner/name)"
    parser.add_argument("run", metavar="RUN", help=text)
    parser.add_argument("--ask", metavar="TEXT", help="print only the answer to TEXT, and exit")
    text = "the system message, '' for none (default: the run's system_prompt)"
    parser.add_argument("--system", metavar="TEXT", help=text)
    return parser.parse_args()


def typed(text: str | None) -> str | None:
    """A stripped argument; bytes that are not UTF-8 become U+FFFD."""
    return text and os.fsencode(text).decode("utf-8", "replace").strip()


def main() -> None:
    cli.quiet_libraries()
    options = parse()
    question, system = typed(options.ask), typed(options.system)
    if question == "":
        raise ConfigError("--ask: empty", fix="type a question")
    if options.json and question is None:
        raise ConfigError("--json prints one answer, so it needs a question", fix="add --ask TEXT")
    terminal = Terminal(json=question is not None)  # stdout belongs to the answer
    from finetune.runs import adapter

    found = adapter.find(options.run, options.set, terminal)
    terminal.status(f"loading {found.config.model.name}")
    from finetune.results import chat  # imports torch, so a mistyped name is refused first

    conversation = chat.begin(found, system, terminal.report())
    terminal.clear()
    if question is None:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # as `typed` does
        chat.Talk(conversation, terminal).run()
    else:
        answer(conversation, question, options.json, terminal)


def answer(conversation: Conversation, question: str, as_json: bool, terminal: Terminal) -> None:
    """Print the answer to stdout while it is generated, or as one document."""
    from finetune.model.generate import Listener

    stdout = Terminal()
    prompt = conversation.encoded(conversation.with_question(question))
    reply = conversation.reply(prompt, Listener(lambda part: None if as_json else stdout.part(part)))
    assert reply is not None  # nothing stops it
    if as_json:
        said = {"question": question, "system": conversation.system, "answer": reply.text}
        cli.print_json(said | {"tokens": reply.tokens, "ended": reply.ended})
    else:
        stdout.say()
    if not reply.ended:
        terminal.warn(f"the answer has no end within {reply.tokens:,} tokens, up to model.max_seq_length")


if __name__ == "__main__":
    cli.run(main)
