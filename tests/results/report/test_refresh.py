"""The report is written however a start ends, and again when it is older than its run."""

from __future__ import annotations

import os
from io import StringIO
from pathlib import Path

import pytest

from finetune.cli import PYTHON
from finetune.errors import Diverged, Stopped
from finetune.results.report import page as report_page
from finetune.results.report import refresh
from finetune.runs.folder import Run
from finetune.terminal import Terminal


class Told:
    """A terminal that keeps what is said."""

    def __init__(self) -> None:
        self.stream = StringIO()
        self.terminal = Terminal(stream=self.stream)

    @property
    def text(self) -> str:
        return self.stream.getvalue()


@pytest.mark.parametrize("error", [None, Stopped(143, "stopped"), Diverged("not finite"), ZeroDivisionError("a bug")])
def test_the_report_is_written_however_a_start_ends(complete: Path, error: Exception | None) -> None:
    told = Told()
    try:
        with refresh.reported(Run(complete, False, None), told.terminal):
            if error:
                raise error
    except Exception as raised:  # noqa: BLE001  # compared on the next line
        assert raised is error
    assert (complete / "report.html").is_file()
    assert told.text == ""


def test_a_second_signal_skips_the_report(complete: Path) -> None:
    with pytest.raises(SystemExit), refresh.reported(Run(complete, False, None), Told().terminal):
        raise SystemExit(143)
    assert not (complete / "report.html").exists()


def test_a_failing_report_is_a_warning_with_the_command_to_write_it(
    complete: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_page, "write", lambda _folder: 1 / 0)
    told = Told()
    with refresh.reported(Run(complete, False, None), told.terminal):
        pass
    again = f"{PYTHON} scripts/make_report.py {complete}"
    assert told.text == f"warning: the report could not be written (division by zero); to write it, run: {again}\n"


def test_an_up_to_date_report_is_kept_and_an_older_one_rewritten(complete: Path) -> None:
    run, told = Run(complete, True, None), Told()
    refresh.make(run, told.terminal)
    page, manifest_file = complete / "report.html", complete / "manifest.json"
    page.write_text("mine", encoding="utf-8")
    refresh.make(run, told.terminal)
    assert page.read_text(encoding="utf-8") == "mine"
    later = page.stat().st_mtime_ns + 10**9
    os.utime(manifest_file, ns=(later, later))
    refresh.make(run, told.terminal)
    assert page.read_text(encoding="utf-8") != "mine"
