"""Test within minutes whether this program works on this machine, and how fast; write a result file."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from finetune import cli
from finetune.errors import CheckFailed, ConfigError
from finetune.files import ROOT, make_folder, read_json, shown, write_json
from finetune.machine.inspect import read_machine
from finetune.machine.platforms import PLATFORMS, Platform, choose
from finetune.terminal import Terminal
from finetune.wording import duration, first_line

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")


def parse() -> argparse.Namespace:
    parser = cli.plain_parser(__doc__ or "")
    parser.add_argument(
        "--minutes", type=float, default=12, help="time limit; what does not fit is skipped (default 12)"
    )
    parser.add_argument("--random", action="store_true", help="use random weights as the base; needs no network")
    parser.add_argument("--tiny", action="store_true", help="use a tiny random model on the CPU; takes two minutes")
    parser.add_argument("--output", metavar="FILE", type=Path, help="the result file (default: one in adapters/)")
    text = "only print the rows of a result file for docs/measured.md"
    parser.add_argument("--table", metavar="FILE", type=Path, help=text)
    return parser.parse_args()


def main() -> None:
    cli.quiet_libraries()
    options = parse()
    from finetune.prove import result

    if options.table:
        print("\n".join(result.table(read(options.table), options.table.name)))
        return
    terminal = Terminal(options.json)
    machine = read_machine()
    platform = PLATFORMS["cpu"] if options.tiny else choose(machine)[0]
    document = result.describe(command_line(options), PACKAGES) | {"minutes": options.minutes, "parts": {}}
    if machine.gpus or machine.chip:
        document["machine"]["gpu"] = machine.gpus[0] if machine.gpus else machine.chip
    output = options.output or ROOT / "adapters" / f"{document['date']}-prove-{platform.name}.json"
    prove(options, platform, document, output, terminal)
    terminal.say("\n".join(["", *result.block(document)]))
    if options.json:
        cli.print_json(document)
    terminal.say(f"result: {shown(output)}; for the plan and docs/measured.md: cp {shown(output)} benchmarks/results/")
    failed = [name for name, part in document["parts"].items() if part["status"] == "failed"]
    if failed:
        raise CheckFailed(f"prove: {', '.join(failed)} failed")


def read(path: Path) -> Any:
    """Read a result file. Raises ConfigError if it is not one."""
    fix = "name a file that it wrote"
    try:
        document = read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--table {path}: {first_line(error)}", fix=fix) from None
    if not (isinstance(document, dict) and "parts" in document):
        raise ConfigError(f"--table {path}: not a result of this command", fix=fix)
    return document


def begin(output: Path, document: dict[str, Any]) -> None:
    """Write the result file before the first part. Raises ConfigError if that is impossible."""
    try:
        write_json(output, document)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise ConfigError(f"--output {output}: {error.strerror}", fix="name a file that can be written") from None


def command_line(options: argparse.Namespace) -> str:
    """The command that repeats this."""
    flags = [f"--{name}" for name in ("random", "tiny") if getattr(options, name)]
    return " ".join(["scripts/prove.py", f"--minutes {options.minutes:g}", *flags])


def prove(
    options: argparse.Namespace, platform: Platform, document: dict[str, Any], output: Path, terminal: Terminal
) -> None:
    """Run the parts in order, each within the time left; write `document` to `output` at the start and after each."""
    until = time.monotonic() + 60 * options.minutes
    make_folder(ROOT / "adapters")
    begin(output, document)
    if options.tiny:
        os.environ["OMP_NUM_THREADS"] = "1"  # threads slow down products this small
    if not platform.accelerated:  # once here, instead of in every forked process
        for library in (*PACKAGES, "trl.trainer.sft_trainer", "finetune.training.job"):
            importlib.import_module(library)
    from finetune.prove import parts
    from finetune.prove.result import part_line
    from finetune.prove.work import make_work

    with tempfile.TemporaryDirectory(dir=ROOT / "adapters", prefix=".prove-") as folder:
        work = make_work(platform, options.random, options.tiny, Path(folder), until)
        document["base"] = work.base
        for name in parts.PARTS:
            terminal.status(f"{name}: {duration(work.seconds_left)} left")
            part = parts.make(name, work)
            document["throughput"] = [*document.get("throughput", []), *part.pop("throughput", [])]
            document["parts"][name] = part
            write_json(output, document)
            terminal.say(part_line(name, part))


if __name__ == "__main__":
    cli.run(main)
