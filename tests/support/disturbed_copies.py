"""Copies of a run that are disturbed in a start of warm.py, which imports this first.

BEFORE_COPY is a JSON list of shell lines, each run before one copy, in order. KILLED_WITH names a checkpoint: the
program is killed before the first copy that includes it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

from finetune.runs.copies import Folder

lines = json.loads(os.environ.get("BEFORE_COPY", "[]"))
put = Folder.put


def disturbed(target: Folder, snapshot: Path, name: str) -> None:
    if (snapshot / "checkpoints" / os.environ.get("KILLED_WITH", "none")).is_dir():
        os.kill(os.getpid(), signal.SIGKILL)
    if lines:
        subprocess.run(lines.pop(0), shell=True, check=True)
    put(target, snapshot, name)


Folder.put = disturbed  # type: ignore[method-assign]
