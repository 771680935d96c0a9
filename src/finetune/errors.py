"""Errors a user can fix; each class carries its exit code."""

from __future__ import annotations

from finetune.wording import counted


class UserError(Exception):
    """A problem that a user can fix: `found` says what is wrong and where, `fix` what to type. The text is both."""

    exit_code = 1

    def __init__(self, found: str, fix: str = "", between: str = "; ") -> None:
        self.found, self.fix = found, fix
        super().__init__(f"{found}{between}{fix}" if fix else found)


class ConfigError(UserError):
    """The command line or a config file is wrong. `problems` holds one line per problem, all of them at once.

    `fix` is in the last of them, or, where `between` is a line's end, under all of them.
    """

    exit_code = 2

    def __init__(self, *problems: str, fix: str = "", between: str = "; ") -> None:
        heading = f"config: {counted(len(problems), 'problem')}"
        super().__init__("\n  ".join([heading, *problems]), fix, between)
        self.found = "\n".join(problems)
        self.problems = (*problems[:-1], f"{problems[-1]}{between}{fix}") if fix and between == "; " else problems


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

    def __init__(self, exit_code: int, found: str, fix: str = "") -> None:
        self.exit_code = exit_code
        super().__init__(found, fix)


class SelfTestFailed(UserError):
    """The trained adapter is not what it should be, so it is not called final."""
