"""A terminal as a stream, and what is left on its screen."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


class Tty(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def screen(written: str) -> list[str]:
    """The lines that a terminal shows after `written`, without colors: what follows a carriage return overwrites.

    Readline's switching of what a paste is shows nothing.
    """
    lines = []
    for line in re.sub(r"\x1b\[(\d+m|\?2004[hl])", "", written).split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


class Session:
    """A command whose streams are a terminal of its own, which a test types on."""

    def __init__(self, line: Sequence[str], environment: Mapping[str, str], columns: int = 200) -> None:
        self._ours, its = pty.openpty()
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        self._process = subprocess.Popen(
            line, env=environment, stdin=its, stdout=its, stderr=its,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(its, termios.TIOCSCTTY, 0),
        )  # fmt: skip  # its controlling terminal, so that Ctrl-C is a signal
        os.close(its)
        self._written, self._seen = b"", 0

    @property
    def written(self) -> str:
        """All that the command has written so far."""
        return self._written.decode(errors="replace")

    def until(self, text: str, seconds: float = 120) -> None:
        """Wait until the command has written `text` after what was waited for last."""
        end = time.monotonic() + seconds
        while text not in self.written[self._seen :]:
            assert self._read(end - time.monotonic()), self.written[-2000:]
        self._seen = self.written.index(text, self._seen) + len(text)

    def type(self, text: str) -> None:
        """Press these keys."""
        os.write(self._ours, text.encode())

    def until_it_waits(self, seconds: float = 30) -> None:
        """Wait until the command sleeps: while readline shows a key, Python notices Ctrl-C only at the next key."""
        end, asleep = time.monotonic() + seconds, 0
        stat = Path("/proc", str(self._process.pid), "stat")
        while asleep < 5:
            assert time.monotonic() < end, self.written[-2000:]
            asleep = asleep + 1 if stat.read_text().rpartition(") ")[2].startswith("S") else 0
            time.sleep(0.02)

    def end(self, seconds: float = 60) -> int:
        """Wait for the command's end; its exit status."""
        while self._read(seconds):
            pass
        os.close(self._ours)
        return self._process.wait(seconds)

    def _read(self, seconds: float) -> bool:
        if not select.select([self._ours], [], [], max(0.0, seconds))[0]:
            return False
        try:
            chunk = os.read(self._ours, 65536)
        except OSError:  # what Linux answers when the last program has let go of a terminal
            chunk = b""
        self._written += chunk
        return bool(chunk)
