"""What a person reads in the terminal is written here; the only module that knows colour."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterable
from typing import TextIO

from finetune.wording import Report

LOG_SECONDS = 10  # between two lines of progress where no line can be written again
COLOURS = {"red": "31", "green": "32", "yellow": "33", "bold": "1", "dim": "2"}


class Terminal:
    """Writes to stdout, or to stderr where stdout belongs to one JSON document."""

    def __init__(self, json: bool = False, stream: TextIO | None = None) -> None:
        self.stream = stream or (sys.stderr if json else sys.stdout)
        self.live = self.stream.isatty()
        self.colour = self.live and "NO_COLOR" not in os.environ
        self._status = 0  # characters of the status that is on the screen
        self._logged = time.monotonic()  # when the last line of progress was written, or the work began

    def paint(self, text: str, colour: str) -> str:
        """`text` in one of COLOURS where this is a terminal."""
        return f"\033[{COLOURS[colour]}m{text}\033[0m" if self.colour else text

    def say(self, text: str = "") -> None:
        """One line."""
        self.clear()
        print(text, file=self.stream, flush=True)

    def part(self, text: str) -> None:
        """A part of a line that is still being written."""
        self.clear()
        print(text, end="", file=self.stream, flush=True)

    def status(self, text: str, *more: str) -> None:
        """On a terminal a line that lives until the next one: `text`, and what of `more` fits beside it."""
        self._logged = time.monotonic()
        if not self.live:
            return
        columns = shutil.get_terminal_size().columns - 1  # 79 where the terminal does not say
        text = text[:columns]
        for part in more:
            if len(text) + len(part) + 2 > columns:
                break
            text += f", {part}"
        print(f"\r{text:<{self._status}}", end="", file=self.stream, flush=True)
        self._status = len(text)

    def progress(self, text: str) -> None:
        """How far the work that the last status named has come: that status, or in a log a line every LOG_SECONDS."""
        if self.live:
            self.status(text)
        elif time.monotonic() - self._logged >= LOG_SECONDS:
            self.say(text)
            self._logged = time.monotonic()

    def report(self) -> Report:
        """Long work below this floor says by it how far it has come and what it decided."""
        return Report(self.progress, self.decision, self.warn)

    def clear(self) -> None:
        """Take the status off the screen."""
        if self._status:
            print(f"\r{' ' * self._status}\r", end="", file=self.stream, flush=True)
            self._status = 0

    def decision(self, what: str, because: str) -> None:
        """An automatic decision with its reason, once."""
        self.say(f"{self.paint(what, 'bold')}: {because}")

    def warn(self, text: str) -> None:
        """Something to act on that does not stop the run."""
        self.say(f"{self.paint('warning', 'yellow')}: {text}")

    def header(self, title: str) -> None:
        """A title over lines that follow."""
        self.say(self.paint(title, "bold"))

    def table(self, title: str, rows: Iterable[tuple[str, str]], warnings: Iterable[str] = ()) -> None:
        """A title over rows of a name and a sentence, and warnings below."""
        self.header(title)
        lines = list(rows)
        width = max([12, *(len(name) + 1 for name, _ in lines)])
        for name, text in lines:
            self.say(f"  {name:<{width}}{text}")
        for warning in warnings:
            self.warn(warning)
