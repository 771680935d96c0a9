"""The terminal: color, streams and the status line; and all that a training prints, into a pipe and on a terminal."""

from __future__ import annotations

import io
import re
import sys
from itertools import groupby
from pathlib import Path

import pytest

from finetune.cli import PYTHON
from finetune.files import ROOT
from finetune.results.show import HF, UPLOADED
from finetune.terminal import COLORS, Terminal
from support.pseudo_terminal import Session, Tty, screen
from support.train_command import ENVIRONMENT, STEPS, Command, train_file  # noqa: F401  # a fixture


@pytest.fixture(autouse=True)
def color_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)


# Color and streams ---------------------------------------------------------------------------------------------------


def shown(stream: io.StringIO) -> str:
    terminal = Terminal(stream=stream)
    terminal.decision("config", "because")
    terminal.warn("look out")
    terminal.say(terminal.paint("text", "red"))
    return stream.getvalue()


def test_a_terminal_gets_color() -> None:
    assert shown(Tty()) == ("\033[1mconfig\033[0m: because\n\033[33mwarning\033[0m: look out\n\033[31mtext\033[0m\n")


@pytest.mark.parametrize("name", sorted(COLORS))
def test_every_color_ends_where_its_text_ends(name: str) -> None:
    assert Terminal(stream=Tty()).paint("text", name) == f"\033[{COLORS[name]}mtext\033[0m"


def test_a_file_or_pipe_gets_no_color() -> None:
    assert shown(io.StringIO()) == "config: because\nwarning: look out\ntext\n"


def test_no_color_takes_the_color_from_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown(Tty()) == "config: because\nwarning: look out\ntext\n"


def everything(terminal: Terminal) -> None:
    terminal.say("said")
    terminal.decision("decided", "because")
    terminal.warn("warned")
    terminal.header("title")
    terminal.table("plan", [("rows", "12")])


def test_with_json_everything_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    everything(Terminal(json=True))
    first = capsys.readouterr()
    everything(Terminal())
    second = capsys.readouterr()
    assert (first.out, second.err) == ("", "")
    assert first.err == second.out != ""


def test_color_is_decided_by_the_stream_that_is_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Tty())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert (Terminal().color, Terminal(json=True).color) == (True, False)


def test_a_long_name_moves_the_column_of_all_sentences() -> None:
    stream = io.StringIO()
    Terminal(stream=stream).table("speed", [("plain", "1"), ("fused kernels and more", "2")])
    assert stream.getvalue() == "speed\n  plain                  1\n  fused kernels and more 2\n"


def test_a_table_has_its_sentences_in_one_column_and_its_warnings_below() -> None:
    stream = io.StringIO()
    rows = [("rows", "12 to train on"), ("", "1 held out"), ("certificate", "none")]
    Terminal(stream=stream).table("plan", rows, ["too few steps", "too little memory"])
    assert stream.getvalue() == (
        "plan\n"
        "  rows        12 to train on\n"
        "              1 held out\n"
        "  certificate none\n"
        "warning: too few steps\n"
        "warning: too little memory\n"
    )


# The status -----------------------------------------------------------------------------------------------------------


def test_a_status_gives_way_to_the_next_one_and_to_a_line() -> None:
    stream = Tty()
    terminal = Terminal(stream=stream)
    terminal.status("a long status")
    assert screen(stream.getvalue()) == ["a long status"]
    terminal.status("one", "two")
    assert screen(stream.getvalue()) == ["one, two"]
    terminal.say("said")
    assert screen(stream.getvalue()) == ["said", ""]
    terminal.status("last")
    terminal.clear()
    terminal.clear()
    assert screen(stream.getvalue()) == ["said", ""]


def test_what_does_not_fit_into_the_terminals_width_is_left_out_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {}
    for columns in (4, 12, 13, 22, 80):
        monkeypatch.setenv("COLUMNS", str(columns))
        stream = Tty()
        Terminal(stream=stream).status("step 1/2", "10 s left", "cost 1.00")
        shown[columns] = stream.getvalue()
    whole = "\rstep 1/2, 10 s left, cost 1.00"
    assert shown == {4: "\rste", 12: "\rstep 1/2", 13: "\rstep 1/2", 22: whole[:20], 80: whole}


def test_progress_is_the_status_of_a_terminal_and_in_a_log_a_line_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds, log, live = [0.0], io.StringIO(), Tty()
    monkeypatch.setattr("finetune.terminal.time.monotonic", lambda: seconds[0])
    terminals = Terminal(stream=log), Terminal(stream=live)
    for terminal in terminals:
        terminal.status("loading")
    for number in range(1, 26):
        seconds[0] = number
        for terminal in terminals:
            terminal.progress(f"layer {number}")
    assert log.getvalue() == "layer 10\nlayer 20\n"
    assert screen(live.getvalue()) == ["layer 25"]


def test_a_file_or_pipe_gets_no_status() -> None:
    stream = io.StringIO()
    Terminal(stream=stream).status("step 1/2")
    Terminal(stream=stream).clear()
    assert stream.getvalue() == ""


def test_long_work_begins_with_a_status_on_a_terminal_and_with_a_line_in_a_log() -> None:
    live, log = Tty(), io.StringIO()
    for stream in (live, log):
        terminal = Terminal(stream=stream)
        terminal.phase("rehearsing")
        terminal.progress("too soon for a line")
        terminal.say("done")
    assert (screen(live.getvalue()), log.getvalue()) == (["done", ""], "rehearsing\ndone\n")


# A training -----------------------------------------------------------------------------------------------------------

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
  sequences   #, #% full, # per step
  steps       # (# per epoch, # of warmup)
              # evaluations (# tokens), # checkpoints
  memory      # GiB expected (program #, logits #), # GiB free
  disk        # GiB
  time        not measured
  cost        not measured (# an hour)
checks: # passed, # warnings, # failed, # skipped
rehearsing the largest batches
rehearsal: peak # of # GiB, # s a step, # for # steps, finished about #
cost: # (# an hour)
step #/#: eval_loss #
"""
AFTER = """\
testing the adapter as it was saved
self-test: # of # checks passed on the adapter reloaded from disk
done: eval_loss # -> # (step #)
  adapter  RUN/adapter_model.safetensors
  look     open RUN/report.html
  talk     PYTHON scripts/chat.py RUN
  code     RUN/README.md, under "Use"
  upload   HF upload YOU/NAME RUN . UPLOADED
"""
PHASES = ("rehearsing the largest batches\n", "testing the adapter as it was saved\n")  # statuses on a terminal
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
    text = text.replace("look     xdg-open ", "look     open ")  # the Mac's name of it
    text = text.replace(f"{PYTHON} scripts/chat.py", "PYTHON scripts/chat.py").replace(f"{HF} upload", "HF upload")
    text = text.replace(UPLOADED, "UPLOADED")
    text = re.sub(r"about (\w+ |\d\d \w+ )?\d\d:\d\d [\w+-]+", "about #", text)
    text = re.sub(r"\d+(,\d\d\d)*(\.\d+)?(e-\d+)?", "#", text)
    return re.sub(r"# (s|min|h)( left| for)", r"#\2", text)


def on_a_terminal(line: list[str]) -> tuple[int, str]:
    """(exit status, all that was written) of a command whose streams are a terminal."""
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in ("COLUMNS", "NO_COLOR")}
    session = Session(line, environment, COLUMNS)
    return session.end(300), session.written


def test_a_pipe_gets_these_plain_lines_and_stderr_nothing(command: Command) -> None:
    done = command(*OPTIONS)
    assert (done.returncode, done.stderr) == (0, "")
    steps = 2 * (2 * STEP + EVALUATION) + 2 * STEP + EVALUATION
    assert masked(done.stdout, command) == BEFORE + steps + AFTER
    assert STEPS == 6


def test_a_terminal_gets_the_same_screen_but_for_the_lines_that_gave_way(trained: tuple[Command, str]) -> None:
    command, written = trained
    lines = [line for line in (BEFORE + 3 * EVALUATION + AFTER).splitlines(keepends=True) if line not in PHASES]
    assert masked("\n".join(screen(written)), command) == "".join(lines)
    assert set(re.findall(r"\x1b[^m]*m?", written)) == {"\x1b[1m", "\x1b[32m", "\x1b[0m"}


def test_on_a_terminal_the_line_below_says_what_is_being_done(trained: tuple[Command, str]) -> None:
    command, written = trained
    passing = [part.rstrip() for line in written.split("\r\n") for part in line.split("\r")[1:-1]]
    checks = [part for part in passing if part.startswith("checks: ")]
    assert checks[0] == f"checks: 1 of {len(checks)}, model.geometry"
    assert checks[-1] == f"checks: {len(checks)} of {len(checks)}"
    others = [masked(part, command) for part in passing if part and not part.startswith("checks: ")]
    others = [text for text in others if not text.startswith("encoding ")]  # only where it takes more than a second
    whole = "step #/#: loss #, # tokens/s, # left, ends about #, eval_loss #, cost # of #, peak # GiB"
    assert [text for text, _ in groupby(others)] == [
        "reading DATA",
        "loading BASE",
        "loading BASE: layer # of #, # s",
        "rehearsing the largest batches",
        "rehearsing plain; # of # layers checkpointed",
        "rehearsed plain; # of # layers checkpointed in # s, peak # GiB",
        "rehearsing a resume from its checkpoint",
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
    assert [text[:23] for text in screen(written)[:-1]] == [
        "validate configs/traini", "  pass  model.name     ", "  pass  model.geometry ", "  pass  paths.output   ",
        "3 passed, 0 warnings, 0",
    ]  # fmt: skip
