"""Errors a user can fix; each class carries its exit code."""

from __future__ import annotations

from finetune.wording import counted


class UserError(Exception):
    """A problem a user can fix: `found` says what is wrong and where, `fix` what to type; the error's text has both."""

    exit_code = 1

    def __init__(self, found: str, fix: str = "", between: str = "; ") -> None:
        self.found, self.fix = found, fix
        super().__init__(f"{found}{between}{fix}" if fix else found)


class ConfigError(UserError):
    """The command line or a config file is wrong. `problems` has one line for each problem.

    `fix` follows the last of them, or is on a line of its own if `between` is a newline.
    """

    exit_code = 2

    def __init__(self, *problems: str, fix: str = "", between: str = "; ") -> None:
        heading = f"config: {counted(len(problems), 'problem')}"
        super().__init__("\n  ".join([heading, *problems]), fix, between)
        self.found = "\n".join(problems)
        self.problems = (*problems[:-1], f"{problems[-1]}{between}{fix}") if fix and between == "; " else problems


class CheckFailed(UserError):
    """This machine lacks something that the run needs."""

    exit_code = 3


class DataError(UserError):
    """The training data is bad."""

    exit_code = 4


class Diverged(UserError):
    """The loss or a gradient stopped being a finite number."""

    exit_code = 5


class OutOfResource(UserError):
    """Memory, disk or the time budget is not enough, or another run holds the lock."""

    exit_code = 6


class DiskFull(OutOfResource):
    """A checkpoint cannot be written; earlier ones are intact."""


class Stopped(UserError):
    """The run stopped early, after a signal or at the end of its time budget; the same command resumes it."""

    def __init__(self, exit_code: int, found: str, fix: str = "") -> None:
        self.exit_code = exit_code
        super().__init__(found, fix)


class SelfTestFailed(UserError):
    """The trained adapter failed its self-test, so it is not exported as final."""
