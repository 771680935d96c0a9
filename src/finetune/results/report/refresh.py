"""When a run's page is made: at the end of each start, whatever becomes of it."""

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
    """Make the run's page when the block ends, well or not; a signal that wants it to end at once is obeyed."""
    try:
        yield
    except Exception:
        make(run, terminal)
        raise
    make(run, terminal)


def make(run: Run, terminal: Terminal) -> None:
    """Make the run's page where it is older than the run; what fails in that is told and ends nothing."""
    try:
        page, manifest = run.folder / PAGE, run.folder / MANIFEST
        if page.is_file() and page.stat().st_mtime_ns >= manifest.stat().st_mtime_ns:
            return
        from finetune.results.report import (
            page as report_page,  # here: it takes a second, and matplotlib may be what is broken
        )

        report_page.write(run.folder)
    except Exception as error:  # noqa: BLE001  # whatever breaks in a page, the run is worth more
        why = (str(error) or type(error).__name__).splitlines()[-1].strip()
        again = f"{command(SCRIPT)} {quoted(run.folder)}"
        terminal.warn(f"the report page was not made ({why}); this makes it again: {again}")
