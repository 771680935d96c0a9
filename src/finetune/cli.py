"""What all commands share: arguments, exit codes, and the command to type again."""

from __future__ import annotations

import argparse
import difflib
import errno
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from finetune.errors import UserError
from finetune.files import ROOT
from finetune.wording import clean


class _Parser(argparse.ArgumentParser):
    """Answers a mistyped flag with the one that is spelled most like it."""

    def error(self, message: str) -> NoReturn:
        typed = message.removeprefix("unrecognized arguments: ").split()[0].partition("=")[0]
        near = difflib.get_close_matches(typed, self._option_string_actions, 1)
        unknown = typed.startswith("-") and near
        super().error(f"{message}; did you mean {near[0]}?" if unknown else message)


def plain_parser(description: str) -> argparse.ArgumentParser:
    """A parser with `--json`, for a command that reads no config."""
    made = _Parser(description=description, allow_abbrev=False)
    made.add_argument("--json", action="store_true", help="one JSON document on stdout, text on stderr")
    return made


def parser(description: str, config_help: str | None = None) -> argparse.ArgumentParser:
    """A parser with `--set` and `--json`, and `--config` where `config_help` is given."""
    made = plain_parser(description)
    if config_help:
        made.add_argument("--config", metavar="FILE", help=config_help)
    text = "override one config key; may repeat"
    made.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help=text)
    return made


def add_ids(parser: argparse.ArgumentParser, flag: str, text: str) -> None:
    """Add a flag that takes comma-separated ids of checks."""
    parser.add_argument(flag, metavar="ID,...", type=lambda ids: ids.split(","), default=[], help=text)


def print_json(document: Any) -> None:
    """Print the JSON document of `--json`."""
    print(json.dumps(document, indent=2, ensure_ascii=False))


def run(main: Callable[[], None]) -> NoReturn:
    """Call `main` and exit with the documented code: a UserError's own, 130 or 143 after a signal, 1 for a bug."""
    signal.signal(signal.SIGTERM, _leave)
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # here, so that a closed pipe or a full disk is handled below
    except UserError as error:
        _end(clean(str(error)), error.exit_code)
    except KeyboardInterrupt:
        _end("stopped by Ctrl-C", 130)
    except BrokenPipeError:  # the reader closed the pipe, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except MemoryError:
        _end("out of memory; lower training.per_device_train_batch_size or model.max_seq_length", 6)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _end(f"no space left: {error.filename or error}; free some, then type the same command again", 6)
    sys.exit(0)


def _end(message: str, exit_code: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(exit_code)


def _leave(signal_number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(128 + signal_number)


_interpreter = Path(sys.executable)
# This interpreter, relative to the project's root where possible, for messages that say what to type.
PYTHON = str(_interpreter.relative_to(ROOT) if _interpreter.is_relative_to(ROOT) else _interpreter)
# The lock that this container image was built from, set by docker/Dockerfile; None outside a container.
IMAGE_LOCK = os.environ.get("IMAGE_LOCK")
SERVICES = {  # services of compose.yaml, by the script that each runs
    "src/train.py": "train-h100",
    "scripts/validate_environment.py": "validate",
    "scripts/make_demo_model.py": "demo",
    "scripts/chat.py": "chat",
}


def advice(native: str, image: str) -> str:
    """What to type: `native`, or `image` in a container, since the user types outside of it."""
    return native if IMAGE_LOCK is None else image


def command(script: str, gpu: bool = True) -> str:
    """The command that runs `script` again, without its arguments; if not `gpu`, by a service that needs no GPU."""
    service = (SERVICES.get(script) if gpu else None) or f'--entrypoint "as-owner python" plan {script}'
    return advice(f"{PYTHON} {script}", f"docker compose run --rm {service}")


def quiet_libraries() -> None:
    """Silence what no user can act on: small progress bars, deprecations, advice; and turn off TRL's telemetry.

    Call this before the libraries are imported.
    """
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it recommends a CPU kernel that only inference uses
    for library in ("transformers", "trl", "peft", "torch"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=library)
