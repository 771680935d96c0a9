"""The page is made however a start ends, and made again when it is older than its run."""

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
def test_the_page_is_made_however_a_start_ends(complete: Path, error: Exception | None) -> None:
    told = Told()
    try:
        with refresh.reported(Run(complete, False, None), told.terminal):
            if error:
                raise error
    except Exception as raised:  # noqa: BLE001  # compared on the next line
        assert raised is error
    assert (complete / "report.html").is_file()
    assert told.text == ""


def test_a_signal_that_wants_it_to_end_at_once_is_not_kept_waiting(complete: Path) -> None:
    with pytest.raises(SystemExit), refresh.reported(Run(complete, False, None), Told().terminal):
        raise SystemExit(143)
    assert not (complete / "report.html").exists()


def test_a_page_that_cannot_be_made_is_a_warning_with_the_command_that_makes_it(
    complete: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_page, "write", lambda _folder: 1 / 0)
    told = Told()
    with refresh.reported(Run(complete, False, None), told.terminal):
        pass
    again = f"{PYTHON} scripts/make_report.py {complete}"
    assert told.text == f"warning: the report page was not made (division by zero); this makes it again: {again}\n"


def test_a_page_that_is_as_new_as_the_run_is_left_alone_and_an_older_one_made_again(complete: Path) -> None:
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
