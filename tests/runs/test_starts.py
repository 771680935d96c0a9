"""What the manifest says of each start of a run: from which step, how and where it ended."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import Diverged, Stopped
from finetune.runs.starts import begin, end

AGO = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
OPEN = {"started": "2026-03-01T12:00:00+00:00", "from_step": 4, "ended": None, "step": None, "end": None}


def leave(folder: Path, starts: list[dict[str, Any]], *metrics: dict[str, Any]) -> None:
    (folder / "manifest.json").write_text(json.dumps({"starts": starts}), encoding="utf-8")
    lines = "".join(json.dumps(entry) + "\n" for entry in metrics)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")


def test_a_first_start_is_open_and_begins_now(tmp_path: Path) -> None:
    (start,) = begin(tmp_path, 0)
    assert abs(datetime.fromisoformat(start.pop("started")).timestamp() - time.time()) < 5
    nothing = {"changed": [], "set_aside": [], "rehearsal": None}
    assert start == {"from_step": 0, "ended": None, "step": None, "end": None, **nothing}


def test_a_start_says_what_it_accepted_what_it_set_aside_and_what_it_rehearsed(tmp_path: Path) -> None:
    (start,) = begin(tmp_path, 4, ("lora.r: 16 -> 8",), ("checkpoint-6 is not whole",), {"hours": 2.5})
    assert (start["changed"], start["set_aside"]) == (["lora.r: 16 -> 8"], ["checkpoint-6 is not whole"])
    assert start["rehearsal"] == {"hours": 2.5}


def test_a_start_that_never_wrote_its_end_was_killed_after_its_last_line(tmp_path: Path) -> None:
    seconds = AGO.timestamp()
    leave(tmp_path, [OPEN], {"step": 9, "time": seconds - 60}, {"step": 5, "time": seconds + 30})
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"step": 6, "ti')  # the line in which it was killed
    killed, now = begin(tmp_path, 4)
    assert killed == {**OPEN, "ended": "2026-03-01T12:00:30+00:00", "step": 5, "end": "killed"}
    assert (now["from_step"], now["end"]) == (4, None)


def test_a_start_that_was_killed_before_its_first_line_ended_nobody_knows_when(tmp_path: Path) -> None:
    leave(tmp_path, [OPEN], {"step": 9, "time": AGO.timestamp() - 60})  # another start's
    assert begin(tmp_path, 4)[0] == {**OPEN, "ended": None, "step": 4, "end": "killed"}


def test_a_start_that_ended_is_kept_as_it_is(tmp_path: Path) -> None:
    ended = {**OPEN, "ended": "2026-03-01T13:00:00+00:00", "step": 7, "end": "stopped"}
    leave(tmp_path, [ended])
    assert begin(tmp_path, 7)[0] == ended


@pytest.mark.parametrize(
    ("error", "how"),
    [
        (None, "complete"),
        (Stopped(143, "stopped by SIGTERM"), "stopped"),
        (Stopped(6, "time budget of 1 h used up"), "time budget"),
        (Diverged("the loss is not a finite number"), "failed"),
    ],
)
def test_a_start_ends_at_its_last_step_that_was_logged_or_saved(
    tmp_path: Path, error: Exception | None, how: str
) -> None:
    (start,) = begin(tmp_path, 2)
    leave(tmp_path, [start], {"step": 6, "time": time.time()})
    end(tmp_path, start, error)
    assert (start["step"], start["end"]) == (6, how)
    (tmp_path / "checkpoints" / "checkpoint-8").mkdir(parents=True)
    (tmp_path / "checkpoints" / "checkpoint-8.partial").mkdir()
    end(tmp_path, start, error)
    assert (start["step"], start["started"] <= start["ended"]) == (8, True)
