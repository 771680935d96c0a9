"""What can go wrong by no fault of the program, each kind with the exit code that every command uses for it."""

from __future__ import annotations


class UserError(Exception):
    """A problem that a person can act on: its text says where, what was found and what to type."""

    exit_code = 1


class ConfigError(UserError):
    """The command line or a config file is wrong. `problems` holds one line a problem, all of them at once.

    `advice`, where there is some for all of them, is the last line.
    """

    exit_code = 2

    def __init__(self, *problems: str, advice: str = "") -> None:
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = [f"config: {count}", *(f"  {problem}" for problem in problems), *([advice] if advice else [])]
        super().__init__("\n".join(lines))


class CheckFailed(UserError):
    """Something on this machine is not what the run needs."""

    exit_code = 3


class DataError(UserError):
    """The training data is bad."""

    exit_code = 4


class Diverged(UserError):
    """The loss or a gradient stopped being a finite number."""

    exit_code = 5


class OutOfResource(UserError):
    """Memory, disk, the time budget or another run's lock stands in the way."""

    exit_code = 6


class DiskFull(OutOfResource):
    """A checkpoint cannot be written; those before it are whole."""


class Stopped(UserError):
    """The run ended before it was finished, and the same command goes on: after a signal, or at its budget's end."""

    def __init__(self, exit_code: int, message: str) -> None:
        self.exit_code = exit_code
        super().__init__(message)


class SelfTestFailed(UserError):
    """The trained adapter is not what it should be, so it is not called final."""
