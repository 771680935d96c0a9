"""Check this machine for one config before training; print what was found and what to type."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from finetune import checks, cli
from finetune.checks.issue_block import block
from finetune.checks.libraries import IMPORTED, installed
from finetune.checks.preflight import Preflight
from finetune.checks.runner import Check, Result, exit_code, run, summary
from finetune.checks.show import show_result, tally
from finetune.cli import command, quiet_libraries
from finetune.config.load import load_config
from finetune.machine.inspect import read_machine
from finetune.terminal import Terminal

# The checks that check_imports_remote, check_imports_m4 and check_gpu run.
REMOTE = ("libraries", "gpu.torch", "device.flash_attention")
M4 = ("libraries", "mac.torch", "device.qlora")
GPU = ("gpu", "mac", "device")


def print_header(title: str) -> None:
    """Print a title above the checks that follow."""
    Terminal().header(title)


def print_check(result: Result) -> None:
    """Print one check's result, with the fix if something is wrong."""
    show_result(Terminal(), result)


def check_imports_remote() -> bool:
    """Whether the H100's libraries are installed and work: versions, imports, CUDA 12.1 or newer, flash-attn."""
    return _shown("H100 libraries", "h100", REMOTE)


def check_imports_m4() -> bool:
    """Whether the Mac's libraries are installed and work: versions, imports, MPS in PyTorch, QLoRA on it."""
    return _shown("M4 libraries", "m4", M4)


def check_gpu(platform: str) -> bool:
    """Whether the accelerator of `platform` works: flash-attn on h100, MPS on m4."""
    return _shown("accelerator", platform, GPU)


def _shown(title: str, platform: str, only: Iterable[str]) -> bool:
    print_header(title)
    results = []
    for result in run(checks.select(platform, only), Preflight(load_config(platform)[0], read_machine())):
        print_check(result)
        results.append(result)
    return exit_code(results) == 0


def parse() -> argparse.Namespace:
    parser = cli.parser(__doc__ or "", "a config file or a platform (h100, m4, cpu); default: this machine's")
    cli.add_ids(parser, "--only", "only these checks, by id or group (gpu means each gpu.*)")
    cli.add_ids(parser, "--skip", "all checks except these")
    parser.add_argument("--list", action="store_true", help="list every check with its description and run none")
    deep = "also load the model, rehearse the largest batches, and print a block to paste into an issue"
    parser.add_argument("--deep", action="store_true", help=deep)
    parser.add_argument("--strict", action="store_true", help="a warning counts as a failure")
    parser.add_argument("--receipt", metavar="FILE", type=Path, help="compare with another run's receipt.json")
    return parser.parse_args()


def main() -> None:
    quiet_libraries()
    options = parse()
    terminal = Terminal(options.json)
    if options.list:
        list_checks(terminal, options.json)
        return
    checks.expand("--skip", options.skip)  # first, to report a typo at once
    config, source = load_config(options.config, options.set)
    if options.receipt:
        read_receipt(options.receipt)
    else:
        options.skip.append("receipt")
    preflight = Preflight(config, read_machine(), options.receipt, terminal.report())
    chosen = checks.select(config.platform, options.only, options.skip, options.deep)
    terminal.header(f"validate {source}")
    results = []
    for result in run(chosen, preflight):
        show_result(terminal, result)
        results.append(result)
        if len(results) < len(chosen):
            terminal.status(f"  {chosen[len(results)].id}")
    code = exit_code(results, options.strict)
    terminal.say(f"{tally(results)}; {what_follows(results, options)}")
    if options.json:
        cli.print_json(document(results, code, preflight))
    elif options.deep:
        terminal.say("\n".join(["", *block(results, preflight, source)]))
    if code:
        raise SystemExit(code)


def read_receipt(path: Path) -> None:
    """Raise ConfigError now, not after all other checks, if the file is not a receipt."""
    from finetune.runs.receipt import read

    read(path)


def list_checks(terminal: Terminal, as_json: bool) -> None:
    if as_json:
        cli.print_json([describe(check) for check in checks.CHECKS])
        return
    for check in checks.CHECKS:
        row = describe(check)
        marks = [",".join(row["platforms"]), row["level"], *(mark for mark in ("network", "deep") if row[mark])]
        terminal.say(f"{check.id:<24} {check.looks_at} ({'; '.join(marks)})")


def describe(check: Check) -> dict[str, Any]:
    """A check as `--list --json` prints it."""
    names = ("id", "looks_at", "platforms", "needs", "level", "network", "deep")
    return {name: getattr(check, name) for name in names}


def what_follows(results: list[Result], options: argparse.Namespace) -> str:
    """The end of the last line: what to type next."""
    given = "".join(f" {flag} {shlex.quote(text)}" for flag, text in arguments_given(options))
    bad = [result.id for result in results if result.status == "fail" or (options.strict and result.status == "warn")]
    if bad:
        given += f" --receipt {shlex.quote(str(options.receipt))}" if options.receipt else ""
        again = f"{command('scripts/validate_environment.py')}{given} --only {','.join(bad)}"
        return f"fix the failed checks, then run: {again}"
    return f"next: {command('src/train.py')}{given}"


def arguments_given(options: argparse.Namespace) -> list[tuple[str, str]]:
    """The arguments that select the config, as typed."""
    return [("--config", options.config)] * bool(options.config) + [("--set", setting) for setting in options.set]


def document(results: list[Result], code: int, preflight: Preflight) -> dict[str, Any]:
    """What `--json` prints."""
    found = {name: installed(name) for name in IMPORTED}
    versions = {name: None if version is None else str(version) for name, version in found.items()}
    environment = {"machine": dataclasses.asdict(preflight.machine), "versions": versions}
    return {**summary(results, code), "environment": environment}


if __name__ == "__main__":
    cli.run(main)
