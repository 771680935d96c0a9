"""A program that has imported all that training imports, and forks a child for each start of `src/train.py`.

It reads one request a line on stdin and writes one answer a line on stdout. A child can be told to die, without a last
word, at a moment in time, or at a point: each time it creates, writes, renames or removes something below a folder.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import runpy
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DIR_FD = {"os.rename": 2, "os.remove": 1, "os.mkdir": 2, "os.rmdir": 1}  # where an event has its dir_fd, or -1
BYTES_WRITTEN = 10  # of a file that is cut short


class Points:
    """Counts the points below `folder`, notes them, and ends the process at one of them.

    `how` is "before" what happens there, "within" the file that is written there, or else a shell's line that is run
    before it, and the process lives on. Python tells of what it opens,
    renames and removes; `watch_libraries` adds the files that are written in Rust and C++.
    """

    def __init__(self, folder: str, noted_in: str | None, number: int | None, how: str) -> None:
        self.folder, self.number, self.how = folder, number, how
        self.count = 0
        self.notes = os.open(noted_in, os.O_WRONLY | os.O_CREAT) if noted_in else None

    def heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        """What Python tells an audit hook, before it does it."""
        if event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[2] & (os.O_ACCMODE | os.O_CREAT):
            path = Path(os.fsdecode(arguments[0]))
            appends = arguments[2] & os.O_APPEND and path.is_file()
            self.point("write", path, begins_at=path.stat().st_size if appends else 0)
        elif event in DIR_FD:
            path, descriptor = Path(os.fsdecode(arguments[0])), arguments[DIR_FD[event]]
            if descriptor >= 0:
                path = Path(f"/proc/self/fd/{descriptor}").readlink() / path
            if event == "os.rename":
                self.point("rename", path, Path(os.fsdecode(arguments[1])))
            elif event != "os.mkdir" or not path.exists():
                self.point(event.removeprefix("os."), path)

    def point(self, what: str, path: Path, target: Path | None = None, begins_at: int = 0) -> None:
        if not path.is_relative_to(self.folder):
            return
        self.count += 1
        if self.notes is not None:
            places = [str(place.relative_to(self.folder)) for place in (path, target) if place]
            os.write(self.notes, (json.dumps([what, *places]) + "\n").encode())
        if self.count == self.number:
            if self.how == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.how == "within":
                self._cut_short(begins_at)
            else:
                subprocess.run(self.how, shell=True, check=True)

    def _cut_short(self, begins_at: int) -> None:
        # The kernel ends a process that writes beyond this limit, whatever language it writes in.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (begins_at + BYTES_WRITTEN, resource.RLIM_INFINITY))

    def watch_libraries(self) -> None:
        """The functions through which libraries write files that Python does not hear of."""
        import safetensors.torch
        import torch
        from transformers import PreTrainedTokenizerFast

        self._watch(torch, "save", lambda _, path, *__, **___: path)
        self._watch(safetensors.torch, "serialize_file", lambda _, path, *__, **___: path)
        self._watch(
            PreTrainedTokenizerFast,
            "_save_pretrained",
            lambda _, save_directory, **__: f"{save_directory}/tokenizer.json",
        )

    def _watch(self, owner: Any, name: str, path_of: Callable[..., Any]) -> None:
        function = getattr(owner, name)

        def told(*arguments: Any, **named: Any) -> Any:
            self.point("write", Path(path_of(*arguments, **named)))
            return function(*arguments, **named)

        setattr(owner, name, told)


def become(request: dict[str, Any], output: int) -> None:
    """In the child: be `python src/train.py` with the request's arguments; leaves by SystemExit, as that does."""
    os.setsid()
    for number in (1, 2):
        os.dup2(output, number)
    os.environ.update(request["environment"])
    sys.argv = [str(ROOT / "src" / "train.py"), *request["arguments"]]
    if request["module"]:
        importlib.import_module(request["module"])
    if request["folder"]:
        points = Points(request["folder"], request["notes"], request["point"], request["how"])
        points.watch_libraries()
        sys.addaudithook(points.heard)
    runpy.run_path(sys.argv[0], run_name="__main__")


def attend(child: int, output: int, seconds: float, number: int) -> dict[str, Any]:
    """How the child ended and what it said; signal `number` is sent when `seconds` are over."""
    started, text, sent = time.monotonic(), b"", False
    while True:
        left = None if sent else max(0.0, started + seconds - time.monotonic())
        if not select.select([output], [], [], left)[0]:
            os.kill(child, number)
            sent = True
            continue
        block = os.read(output, 65536)
        if not block:
            break
        text += block
    status = os.waitpid(child, 0)[1]
    seconds = time.monotonic() - started
    return {"code": os.waitstatus_to_exitcode(status), "text": text.decode(), "seconds": seconds}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.path.insert(0, str(ROOT / "src"))
    from finetune.cli import quiet_libraries

    quiet_libraries()
    import bitsandbytes  # noqa: F401
    import mistral_common.protocol.instruct.request  # noqa: F401
    import peft.tuners.lora.bnb  # noqa: F401
    import transformers.models.mistral.modeling_mistral  # noqa: F401

    for module in ("results.export", "training.rehearsal", "training.samples", "training.trackers"):
        importlib.import_module(f"finetune.{module}")

    gc.freeze()  # what is imported stays, so that no child looks through it
    while line := sys.stdin.readline():
        request = json.loads(line)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            become(request, write)
            return
        os.close(write)
        answers.write(json.dumps(attend(child, read, request["seconds"], request["signal"])) + "\n")
        answers.flush()
        os.close(read)


if __name__ == "__main__":
    main()
