"""All output for people; the only module that knows about colors."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterable
from typing import TextIO

from finetune.wording import Report

LOG_SECONDS = 10  # between two progress lines in a log
COLORS = {"red": "31", "green": "32", "yellow": "33", "bold": "1", "dim": "2"}


class Terminal:
    """Writes to stdout, or to stderr if stdout is for a JSON document."""

    def __init__(self, json: bool = False, stream: TextIO | None = None) -> None:
        self.stream = stream or (sys.stderr if json else sys.stdout)
        self.live = self.stream.isatty()
        self.color = self.live and "NO_COLOR" not in os.environ
        self._status = 0  # length of the status line on the screen
        self._logged = time.monotonic()  # time of the last progress line, or of the start

    def paint(self, text: str, color: str) -> str:
        """`text` in one of COLORS, on a terminal only."""
        return f"\033[{COLORS[color]}m{text}\033[0m" if self.color else text

    def say(self, text: str = "") -> None:
        """Print one line."""
        self.clear()
        print(text, file=self.stream, flush=True)

    def part(self, text: str) -> None:
        """Print part of a line."""
        self.clear()
        print(text, end="", file=self.stream, flush=True)

    def status(self, text: str, *more: str) -> None:
        """On a terminal, show a line until the next one: `text`, then as much of `more` as fits."""
        self._logged = time.monotonic()
        if not self.live:
            return
        columns = shutil.get_terminal_size().columns - 1  # 79 if unknown
        text = text[:columns]
        for part in more:
            if len(text) + len(part) + 2 > columns:
                break
            text += f", {part}"
        print(f"\r{text:<{self._status}}", end="", file=self.stream, flush=True)
        self._status = len(text)

    def phase(self, text: str) -> None:
        """Begin long work: its name as the status on a terminal, as a line in a log."""
        if not self.live:
            self.say(text)
        self.status(text)

    def progress(self, text: str) -> None:
        """Show progress: as the status on a terminal, or as a line every LOG_SECONDS in a log."""
        if self.live:
            self.status(text)
        elif time.monotonic() - self._logged >= LOG_SECONDS:
            self.say(text)
            self._logged = time.monotonic()

    def report(self) -> Report:
        """For long work in lower rooms: this terminal's progress, decisions and warnings."""
        return Report(self.progress, self.decision, self.warn)

    def clear(self) -> None:
        """Remove the status from the screen."""
        if self._status:
            print(f"\r{' ' * self._status}\r", end="", file=self.stream, flush=True)
            self._status = 0

    def decision(self, what: str, because: str) -> None:
        """Print an automatic decision with its reason."""
        self.say(f"{self.paint(what, 'bold')}: {because}")

    def warn(self, text: str) -> None:
        """Print a warning: something to act on that does not stop the run."""
        self.say(f"{self.paint('warning', 'yellow')}: {text}")

    def header(self, title: str) -> None:
        """Print a title for the lines that follow."""
        self.say(self.paint(title, "bold"))

    def table(self, title: str, rows: Iterable[tuple[str, str]], warnings: Iterable[str] = ()) -> None:
        """Print a title, rows of a name and a sentence, then warnings."""
        self.header(title)
        lines = list(rows)
        width = max([12, *(len(name) + 1 for name, _ in lines)])
        for name, text in lines:
            self.say(f"  {name:<{width}}{text}")
        for warning in warnings:
            self.warn(warning)
