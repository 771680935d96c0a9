"""A terminal as a stream, and what is left on its screen."""

from __future__ import annotations

import io
import re


class Tty(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def screen(written: str) -> list[str]:
    """The lines that a terminal shows after `written`, without colours: what follows a carriage return overwrites."""
    lines = []
    for line in re.sub(r"\x1b\[\d+m", "", written).split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines
