"""All that a training prints, from its first byte to its last: into a pipe, and on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from itertools import groupby
from pathlib import Path

import pytest

from finetune.config.load import ROOT
from support.train_command import ENVIRONMENT, STEPS, Command, train_file  # noqa: F401  # a fixture

COLUMNS = 200
# What these would find of the machine at hand is not what is looked at here.
OPTIONS = ("--skip", "host,container,libraries,paths.disk", "--set", "tracking.cost_per_hour=3")

BEFORE = """\
config: configs/training_config_cpu.yaml (--config cpu)
data: DATA; no validation file: #% of the rows, chosen by content, are held out
plan
  rows        # to train on, # held out
  tokens      # (#% with loss)
  certificate # rows equal mistral-common's
  sequences   #, #% full, # a step
  steps       # (# an epoch, # of warm-up)
              # evaluations, # checkpoints
  memory      # GiB expected (program #, logits #), # GiB free
  disk        # GiB
  time        not measured
  cost        not measured (# an hour)
checks: # passed, # warnings, # failed, # skipped
rehearsal: peak # of # GiB, # s a step, # for # steps, finished about #
cost: # (# an hour)
step #/#: eval_loss #
"""
AFTER = """\
self-test: # of # checks passed, on the adapter as it was read back from disk
done: eval_loss # -> # (step #)
  adapter  RUN/adapter_model.safetensors
  card     RUN/README.md, with the lines that load the adapter
  report   RUN/report.html
next: open RUN/report.html
"""
STEP = "step #/#: loss #, # tokens/s, # left, ends about #, cost # of #, peak # GiB\n"
EVALUATION = "step #/#: eval_loss #\n"


@pytest.fixture
def command(tiny_mistral: Path, train_file: Path, tmp_path: Path) -> Command:  # noqa: F811
    return Command(tiny_mistral, train_file, tmp_path / "output")


@pytest.fixture(scope="module")
def trained(
    tiny_mistral: Path,
    train_file: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Command, str]:
    """A training on a terminal, and all that it wrote."""
    command = Command(tiny_mistral, train_file, tmp_path_factory.mktemp("terminal"))
    status, written = on_a_terminal(command.line(*OPTIONS))
    assert status == 0, written
    return command, written


def masked(text: str, command: Command) -> str:
    """`text` with `#` for every number, length of time and time of day, and names for its paths."""
    text = text.replace(str(command.train_file), "DATA").replace(str(command.output / "run"), "RUN")
    text = text.replace(f"loading {command.base}", "loading BASE")
    text = text.replace("next: xdg-open ", "next: open ")  # the Mac's name of it
    text = re.sub(r"about (\w+ |\d\d \w+ )?\d\d:\d\d", "about #", text)
    text = re.sub(r"\d+(,\d\d\d)*(\.\d+)?(e-\d+)?", "#", text)
    return re.sub(r"# (s|min|h)( left| for)", r"#\2", text)


def on_a_terminal(line: list[str]) -> tuple[int, str]:
    """(exit status, all that was written) of a command whose streams are a terminal."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in ("COLUMNS", "NO_COLOR")}
    with subprocess.Popen(line, env=environment, stdin=its, stdout=its, stderr=its) as process:
        os.close(its)
        written = b""
        while chunk := read(ours):
            written += chunk
    os.close(ours)
    return process.returncode, written.decode()


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # what Linux answers when the last program has let go of a terminal
        return b""


def screen(written: str) -> str:
    """What is left on the screen, without colours."""
    shown = []
    for line in re.sub(r"\x1b\[\d+m", "", written).split("\r\n"):
        text = ""
        for part in line.split("\r"):
            text = part + text[len(part) :]
        shown.append(text.rstrip())
    return "\n".join(shown)


def test_a_pipe_gets_these_plain_lines_and_stderr_nothing(command: Command) -> None:
    done = command(*OPTIONS)
    assert (done.returncode, done.stderr) == (0, "")
    steps = 2 * (2 * STEP + EVALUATION) + 2 * STEP + EVALUATION
    assert masked(done.stdout, command) == BEFORE + steps + AFTER
    assert STEPS == 6


def test_a_terminal_gets_the_same_screen_but_for_the_lines_that_gave_way(trained: tuple[Command, str]) -> None:
    command, written = trained
    assert masked(screen(written), command) == BEFORE + 3 * EVALUATION + AFTER
    assert set(re.findall(r"\x1b[^m]*m?", written)) == {"\x1b[1m", "\x1b[32m", "\x1b[0m"}


def test_on_a_terminal_the_line_below_says_what_is_being_done(trained: tuple[Command, str]) -> None:
    command, written = trained
    passing = [part.rstrip() for line in written.split("\r\n") for part in line.split("\r")[1:-1]]
    checks = [part for part in passing if part.startswith("checks: ")]
    assert checks[0] == f"checks: 1 of {len(checks)}, model.geometry"
    assert checks[-1] == f"checks: {len(checks)} of {len(checks)}"
    others = [masked(part, command) for part in passing if part and not part.startswith("checks: ")]
    whole = "step #/#: loss #, # tokens/s, # left, ends about #, eval_loss #, cost # of #, peak # GiB"
    assert [text for text, _ in groupby(others)] == [
        "reading DATA",
        "loading BASE",
        "rehearsing the largest batches",
        "step #/#",
        "step #/#, peak # GiB, eval_loss #",
        "step #/#, # left, ends about #, eval_loss #, cost # of #, peak # GiB",
        whole,
        "testing the adapter as it was saved",
    ]


def test_validate_on_a_terminal_names_the_check_at_hand_and_leaves_only_results(command: Command) -> None:
    sets = [word for setting in command.settings() for word in ("--set", setting)]
    script = str(ROOT / "scripts" / "validate_environment.py")
    line = [command.line()[0], script, "--config", "cpu", *sets, "--only", "model.name,model.geometry,paths.output"]
    status, written = on_a_terminal(line)
    assert status == 0, written
    assert "\r  model.geometry\r" in written
    assert [text[:23] for text in screen(written).splitlines()] == [
        "validate configs/traini",
        "  pass  model.name     ",
        "  pass  model.geometry ",
        "  pass  paths.output   ",
        "3 passed, 0 warnings, 0",
    ]
