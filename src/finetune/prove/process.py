"""One piece of work in a process of its own, so that its memory is its own and its end is nobody else's."""

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
    """The process ended without a result: how, in a line, and all that it printed."""

    def __init__(self, found: str, log: str) -> None:
        self.found, self.log = found, log
        super().__init__(found)


def run_alone(function: Callable[[Any], Any], argument: Any, fork: bool, seconds: float | None = None) -> Any:
    """What `function(argument)` returns; what it prints goes into a log.

    `fork` from this process, which may have imported the libraries but computed nothing; else a fresh one, since no
    child can use a GPU that its parent's import has woken. Raises Ended, and TimeoutError after `seconds`.
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
        except BaseException:  # late, or this process is stopped
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
