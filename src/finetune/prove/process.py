"""Runs a function in its own process, so its memory is separate and a crash affects nothing else."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.cli import quiet_libraries
from finetune.errors import UserError


class Ended(Exception):
    """The process ended without a result: how, in one line, and everything that it printed."""

    def __init__(self, found: str, log: str) -> None:
        self.found, self.log = found, log
        super().__init__(found)


def run_alone(function: Callable[[Any], Any], argument: Any, fork: bool, seconds: float | None = None) -> Any:
    """Run `function(argument)` in a new process and return its result; its output goes to a log.

    With `fork`, forks this process, which may have imported libraries but computed nothing; else starts a fresh one,
    because a child cannot use a GPU that its parent has initialized. Raises Ended, and TimeoutError after `seconds`.
    """
    context: Any = multiprocessing.get_context("fork" if fork else "spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile(mode="r", suffix=".log") as log:
        process = context.Process(target=_child, args=(sender, log.name, function, argument))
        process.start()
        sender.close()
        try:
            if not receiver.poll(seconds):
                raise TimeoutError
            done, result = receiver.recv()
        except EOFError:
            done, result = False, ""
        except BaseException:  # too late, or this process is being stopped
            process.kill()
            raise
        finally:
            process.join()
        text = log.read().strip()
    if not done:
        last = text.splitlines()[-1] if text else "without a message"
        raise Ended(result or f"exit code {process.exitcode}: {last}", text)
    return result


def _child(sender: Any, log: str, function: Callable[[Any], Any], argument: Any) -> None:
    stream = Path(log).open("w", buffering=1)  # noqa: SIM115  # a traceback comes last
    sys.stdout = sys.stderr = stream
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    quiet_libraries()
    try:
        sender.send((True, function(argument)))
    except UserError as error:
        sender.send((False, str(error)))
