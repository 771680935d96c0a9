"""A conversation with an adapter in the terminal: streamed, in the template of its training, compared with its base."""

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
from finetune.data.encode import as_json, with_system_prompt
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
    ("QUESTION", "the tuned model answers; greedily, so always the same"),
    ("/compare [QUESTION]", "the base answers, then the tuned model; without QUESTION the last one again"),
    ("/system [TEXT]", "start again with this system message, or without one"),
    ("/reset", "start again"),
    ("/save FILE.jsonl", "append the conversation to FILE as a row to train on"),
    ("Ctrl-C, Ctrl-D", "end the answer; leave, as /quit does"),
)


@dataclass
class Conversation:
    """Whole turns of a person and the tuned model. `limit` is what it may be long, in tokens, answer included."""

    model: PeftModel
    chat: Chat
    limit: int
    system: str | None
    turns: Messages = field(default_factory=list)

    def with_question(self, question: str) -> Messages:
        """What the model reads: system message, turns so far, `question`."""
        return with_system_prompt([*self.turns, {"role": "user", "content": question}], self.system)

    def encoded(self, messages: Messages) -> list[int]:
        """Their ids, up to where the answer begins. Raises ConfigError where they leave no room for one."""
        prompt = self.chat.encode_prompt(messages)
        if len(prompt) >= self.limit:
            found = f"the conversation has {len(prompt):,} tokens, and model.max_seq_length is {self.limit:,}"
            raise ConfigError(f"{found}: no answer fits", fix="ask something shorter, or start again with /reset")
        return prompt

    def reply(self, prompt: list[int], listener: Listener, tuned: bool = True) -> Reply | None:
        """The tuned model's or the base's reply to what `encoded` returned; None where `listener` stopped it."""
        with memory_errors_explained(FREE), nullcontext() if tuned else self.model.disable_adapter():
            return stream_reply(self.model, self.chat, prompt, self.limit - len(prompt), listener)

    def add(self, question: str, answer: str) -> None:
        """One more turn."""
        self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def restart(self, system: str | None) -> None:
        """Forget all turns."""
        self.system, self.turns = system, []

    def save(self, path: Path) -> None:
        """Append the conversation to `path` as a row. Raises ConfigError where it is none, or cannot be written."""
        try:
            if path.suffix != ".jsonl":
                raise BadRow("wanted a name that ends in .jsonl")
            if not self.turns:
                raise BadRow("nothing has been answered yet")
            line = as_json({"messages": with_system_prompt(self.turns, self.system)}).encode()
            parse_row(line)
            with path.open("ab+") as stream:
                stream.seek(0)
                if stream.read(len(GZIP)) == GZIP:
                    raise BadRow("it is a gzip, which no row can be appended to")
                stream.seek(-min(1, stream.tell()), 2)
                stream.write((b"" if stream.read() in (b"", b"\n") else b"\n") + line + b"\n")
        except (BadRow, OSError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"not saved to {path}: {why}") from None


def begin(adapter: Adapter, system: str | None, report: Report) -> Conversation:
    """Load the model; nothing is said yet. `system`, "" for none, replaces the config's system prompt."""
    config = adapter.config
    chat = load_chat(resolve(config.model.name) if is_local(config.model.name) else None)
    system = config.system_prompt if system is None else system or None
    return Conversation(adapter.load(report), chat, config.model.max_seq_length, system)


class Talk:
    """What a person types, and what is answered, on a terminal or from a pipe."""

    def __init__(self, conversation: Conversation, terminal: Terminal) -> None:
        self.conversation, self.terminal = conversation, terminal
        self.last: Messages | None = None  # the last question, with all that stood before it

    def run(self) -> None:
        """Until the end of the input, or /quit."""
        self.terminal.table("chat", HELP)
        self.terminal.say()
        prompt = ""
        if sys.stdin.isatty():
            import readline  # noqa: F401  # which lets `input` edit a line and bring back those before it

            prompt = "> "
        while True:
            try:
                if not self.follow(input(prompt)):
                    return
            except EOFError:
                self.terminal.say()
                return
            except KeyboardInterrupt:
                self.terminal.say("\n(/quit or Ctrl-D leaves)")
            except UserError as error:
                self.terminal.warn("; ".join(filter(None, (error.found, error.fix))))

    def follow(self, line: str) -> bool:
        """Answer a question, or do what a command says; False where that is to leave."""
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
                "started again", f"system message: {clean(system)}" if system else "no system message"
            )
        elif name == "/save":
            path = Path(text).expanduser()
            self.conversation.save(path)
            self.terminal.decision("saved", f"{counted(len(self.conversation.turns) // 2, 'turn')} to {path}")
        elif name.startswith("/"):
            names = ", ".join(key.split()[0] for key, _ in HELP if key.startswith("/"))
            raise ConfigError(f"{name}: no such command, wanted one of {names}, /quit", fix="a space before it asks it")
        elif line.strip():
            self._ask(line.strip())
        return True

    def _ask(self, question: str) -> None:
        self.last = self.conversation.with_question(question)
        self._keep(question, self._answer(self.last))
        self.terminal.say()

    def _compare(self, question: str) -> None:
        """Both models' answers to the same; the tuned model's to a new question goes on the conversation."""
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
            self.terminal.say("(an answer without an end is forgotten, and its question)")
        else:
            self.conversation.add(question, reply.text)

    def _answer(self, messages: Messages, model: str = "") -> Reply | None:
        """Show an answer while it is made; `model` is "base", "tuned", or "" for the tuned one without its name."""
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
            terminal.say(f" (no end within {reply.tokens:,} tokens)")
        else:
            terminal.say("" if reply.text else "(nothing)")
        return reply


@contextmanager
def until_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed in the block, which it does not end."""
    pressed = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
