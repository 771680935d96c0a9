"""Writes a run's report at the end of each start, however it ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from finetune.cli import command
from finetune.files import quoted
from finetune.results.report.run_summary import PAGE, SCRIPT
from finetune.runs.folder import MANIFEST, Run
from finetune.terminal import Terminal


@contextmanager
def reported(run: Run, terminal: Terminal) -> Iterator[None]:
    """Write the report when the block ends or raises; a second signal (SystemExit) skips it."""
    try:
        yield
    except Exception:
        make(run, terminal)
        raise
    make(run, terminal)


def make(run: Run, terminal: Terminal) -> None:
    """Write the report if it is older than the manifest; a failure is only a warning."""
    try:
        page, manifest = run.folder / PAGE, run.folder / MANIFEST
        if page.is_file() and page.stat().st_mtime_ns >= manifest.stat().st_mtime_ns:
            return
        from finetune.results.report import (
            page as report_page,  # imported here: it takes a second, and matplotlib may be broken
        )

        report_page.write(run.folder)
    except Exception as error:  # noqa: BLE001  # a broken report must not fail the run
        why = (str(error) or type(error).__name__).splitlines()[-1].strip()
        again = f"{command(SCRIPT)} {quoted(run.folder)}"
        terminal.warn(f"the report could not be written ({why}); to write it, run: {again}")
