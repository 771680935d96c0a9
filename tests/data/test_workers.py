"""Worker processes make the same rows as one process, and end with it."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from finetune import files
from finetune.data import encoded_file, workers
from finetune.data.template import Messages
from finetune.errors import OutOfResource
from support.conversations import conversation
from support.prepared import (
    NO_TURN_FITS,
    RECIPE,
    Case,
    numbered,
    same,
    write,
)


def test_one_process_and_two_workers_make_the_same_rows(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Messages | str] = [
        *numbered(600), *numbered(40), NO_TURN_FITS, conversation("Hi", "Hello " * 40, "a", "b"),
    ]  # fmt: skip
    rows[300] = "{}"
    rows[10] = "not JSON"
    write(case.train, *rows)
    prepared = []
    for processes, chunk_lines in ((0, 256), (2, 64)):
        monkeypatch.setattr(encoded_file, "CHUNK_LINES", chunk_lines)  # more chunks than may wait for two workers
        case.cache = case.folder / f"cache-{processes}"
        prepared.append(
            case.prepare(replace(RECIPE, max_seq_length=24, certificate=True), on_bad_row="drop", workers=processes)
        )
    assert prepared[0].statistics["train"].dropped_bad == 2
    assert prepared[0].tokens == prepared[1].tokens
    assert prepared[0].statistics == prepared[1].statistics
    assert same(*prepared)


def test_a_worker_that_is_killed_is_told_as_want_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, *arguments: Any) -> None: ...

        def __enter__(self) -> Broken:
            return self

        def __exit__(self, *exception: object) -> None: ...

        def submit(self, *arguments: Any) -> None:
            raise BrokenProcessPool

    monkeypatch.setattr(workers, "ProcessPoolExecutor", Broken)
    with pytest.raises(OutOfResource) as failure:
        list(workers.encode_batches(iter([[(1, b"{}")]]), RECIPE, 2))
    assert str(failure.value) == (
        "a process that encodes rows was killed, probably out of memory; free some memory and try again"
    )


SLOW = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
from finetune.data import encode
from support.prepared import RECIPE, Case
if __name__ == "__main__":
    Case(Path({folder!r})).prepare(RECIPE, workers=2)
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="it reads /proc")
def test_workers_end_when_the_first_process_is_killed(case: Case) -> None:
    write(case.train, *[conversation("word " * 3000, "b " * 3000)] * 2000)
    script = case.folder / "slow.py"
    script.write_text(SLOW.format(paths=[str(files.ROOT / "src"), str(files.ROOT / "tests")], folder=str(case.folder)))
    first = subprocess.Popen([sys.executable, str(script)])
    try:
        started = time.monotonic()
        workers: list[psutil.Process] = []
        while len(workers) < 2 and time.monotonic() - started < 60:
            time.sleep(0.1)
            children = psutil.Process(first.pid).children()
            workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        assert len(workers) == 2
    finally:
        first.kill()
        first.wait()
    assert psutil.wait_procs(workers, timeout=20)[1] == []


def test_workers_are_the_cores_this_process_may_use_and_not_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert workers.worker_count() == 3
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: set(range(100)), raising=False)
    assert workers.worker_count() == 8
