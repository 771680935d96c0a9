"""Chat with an adapter in the terminal: streamed replies, in its training template, compared with the base."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from peft import PeftModel

from finetune.config.base_model import is_local
from finetune.data.digests import as_json
from finetune.data.encode import with_system_prompt
from finetune.data.jsonl import GZIP, BadRow, parse_row
from finetune.data.template import Messages
from finetune.data.tokenizer import Chat, load_chat
from finetune.errors import ConfigError, UserError
from finetune.files import resolve
from finetune.machine.device import memory_errors_explained
from finetune.model.generate import Listener, Reply, stream_reply
from finetune.runs.adapter import FREE, Adapter
from finetune.terminal import Terminal
from finetune.wording import Report, clean, counted

HELP = (
    ("QUESTION", "ask the tuned model (greedy decoding: same question, same answer)"),
    ("/compare [QUESTION]", "ask base and tuned model; without QUESTION, repeat the last one"),
    ("/system [TEXT]", "start over with this system message, or with none"),
    ("/reset", "start over"),
    ("/save FILE.jsonl", "append the conversation to FILE as a training row"),
    ("Ctrl-C, Ctrl-D", "stop the answer; quit (as /quit does)"),
)


@dataclass
class Conversation:
    """Complete turns of user and tuned model. `limit` is the maximum length in tokens, including the next answer."""

    model: PeftModel
    chat: Chat
    limit: int
    system: str | None
    turns: Messages = field(default_factory=list)

    def with_question(self, question: str) -> Messages:
        """Return the prompt: system message, turns so far, `question`."""
        return with_system_prompt([*self.turns, {"role": "user", "content": question}], self.system)

    def encoded(self, messages: Messages) -> list[int]:
        """Return the token ids of a prompt. Raises ConfigError if they leave no room for an answer."""
        prompt = self.chat.encode_prompt(messages)
        if len(prompt) >= self.limit:
            found = f"the conversation has {len(prompt):,} tokens, and model.max_seq_length is {self.limit:,}"
            raise ConfigError(f"{found}: no answer fits", fix="ask something shorter, or start over with /reset")
        return prompt

    def reply(self, prompt: list[int], listener: Listener, tuned: bool = True) -> Reply | None:
        """Return the tuned model's or the base's reply to an encoded prompt; None if `listener` stopped it."""
        with memory_errors_explained(FREE), nullcontext() if tuned else self.model.disable_adapter():
            return stream_reply(self.model, self.chat, prompt, self.limit - len(prompt), listener)

    def add(self, question: str, answer: str) -> None:
        """Append a question and its answer."""
        self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def restart(self, system: str | None) -> None:
        """Clear all turns and set the system message."""
        self.system, self.turns = system, []

    def save(self, path: Path) -> None:
        """Append the conversation to `path` as a row. Raises ConfigError if it is no valid row or cannot be written."""
        try:
            if path.suffix != ".jsonl":
                raise BadRow("expected a name ending in .jsonl")
            if not self.turns:
                raise BadRow("there are no answers yet")
            line = as_json({"messages": with_system_prompt(self.turns, self.system)}).encode()
            parse_row(line)
            with path.open("ab+") as stream:
                stream.seek(0)
                if stream.read(len(GZIP)) == GZIP:
                    raise BadRow("it is a gzip file; rows cannot be appended to it")
                stream.seek(-min(1, stream.tell()), 2)
                stream.write((b"" if stream.read() in (b"", b"\n") else b"\n") + line + b"\n")
        except (BadRow, OSError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"not saved to {path}: {why}") from None


def begin(adapter: Adapter, system: str | None, report: Report) -> Conversation:
    """Load the model and start an empty conversation. `system` replaces the config's system prompt; "" means none."""
    config = adapter.config
    chat = load_chat(resolve(config.model.name) if is_local(config.model.name) else None)
    system = config.system_prompt if system is None else system or None
    return Conversation(adapter.load(report), chat, config.model.max_seq_length, system)


class Talk:
    """Reads questions and commands from a terminal or a pipe, and prints the answers."""

    def __init__(self, conversation: Conversation, terminal: Terminal) -> None:
        self.conversation, self.terminal = conversation, terminal
        self.last: Messages | None = None  # the last prompt asked

    def run(self) -> None:
        """Answer until the input ends or the user types /quit."""
        self.terminal.table("chat", HELP)
        self.terminal.say()
        prompt = ""
        if sys.stdin.isatty():
            import readline  # noqa: F401  # gives `input` line editing and history

            prompt = "> "
        while True:
            try:
                if not self.follow(input(prompt)):
                    return
            except EOFError:
                self.terminal.say()
                return
            except KeyboardInterrupt:
                self.terminal.say("\n(type /quit or press Ctrl-D to quit)")
            except UserError as error:
                self.terminal.warn("; ".join(filter(None, (error.found, error.fix))))

    def follow(self, line: str) -> bool:
        """Answer a question or execute a command; False means quit."""
        name, _, text = line.partition(" ")
        text = text.strip()
        if name == "/quit":
            return False
        if name == "/compare":
            self._compare(text)
        elif name in ("/reset", "/system"):
            self.conversation.restart(self.conversation.system if name == "/reset" else text or None)
            self.last = None
            system = self.conversation.system
            self.terminal.decision(
                "started over", f"system message: {clean(system)}" if system else "no system message"
            )
        elif name == "/save":
            path = Path(text).expanduser()
            self.conversation.save(path)
            self.terminal.decision("saved", f"{counted(len(self.conversation.turns) // 2, 'turn')} to {path}")
        elif name.startswith("/"):
            names = ", ".join(key.split()[0] for key, _ in HELP if key.startswith("/"))
            raise ConfigError(
                f"{name}: unknown command, expected one of {names}, /quit",
                fix="to ask it as a question, start with a space",
            )
        elif line.strip():
            self._ask(line.strip())
        return True

    def _ask(self, question: str) -> None:
        self.last = self.conversation.with_question(question)
        self._keep(question, self._answer(self.last))
        self.terminal.say()

    def _compare(self, question: str) -> None:
        """Print both models' answers. The tuned answer to a new question joins the conversation."""
        if question:
            self.last = self.conversation.with_question(question)
        if self.last is None:
            raise ConfigError("/compare: nothing has been asked yet", fix="type /compare QUESTION")
        self._answer(self.last, "base")
        reply = self._answer(self.last, "tuned")
        if question:
            self._keep(question, reply)
        self.terminal.say()

    def _keep(self, question: str, reply: Reply | None) -> None:
        if reply is None or not reply.ended:
            self.terminal.say("(incomplete answer: this question and answer are not kept)")
        else:
            self.conversation.add(question, reply.text)

    def _answer(self, messages: Messages, model: str = "") -> Reply | None:
        """Print an answer as it is generated. `model` is "base", "tuned", or "" for the tuned model without a label."""
        prompt, terminal = self.conversation.encoded(messages), self.terminal

        def heard(part: str) -> None:
            text = clean(part.replace("\t", "    "))
            terminal.part(terminal.paint(text, "green") if model == "tuned" else text)

        terminal.part(f"{model:<7}" if model else "")
        with until_ctrl_c() as stopped:
            reply = self.conversation.reply(prompt, Listener(heard, stopped), tuned=model != "base")
        if reply is None:
            terminal.say(" (stopped)")
        elif not reply.ended:
            terminal.say(f" (cut off after {reply.tokens:,} tokens)")
        else:
            terminal.say("" if reply.text else "(nothing)")
        return reply


@contextmanager
def until_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C was pressed; within the block, Ctrl-C does nothing else."""
    pressed = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
