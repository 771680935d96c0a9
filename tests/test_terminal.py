"""What a person reads in the terminal: all that a training prints, its words and colour, and nothing the data wrote."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune import cli
from finetune.checks.runner import Result
from finetune.config.load import ROOT
from finetune.terminal import COLOURS, Terminal, tally
from support.plans import PLAN
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


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def colour_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_the_plan_and_its_problems_are_one_screen() -> None:
    stream = io.StringIO()
    Terminal(stream=stream).plan(PLAN)
    assert stream.getvalue() == (
        "plan\n"
        "  rows        12,345 to train on, 1,371 held out, 1,204 cut, 3 dropped\n"
        "  tokens      4,000,000 (38% with loss)\n"
        "  certificate 13,719 rows equal mistral-common's\n"
        "  sequences   1,020, 95.8% full, 16 a step\n"
        "  steps       1,920 (64 an epoch, 58 of warm-up)\n"
        "              21 evaluations, 4 checkpoints\n"
        "  memory      13.0 GiB expected (activations 9.1, weights 3.8), 79.1 GiB free\n"
        "  disk        2.7 GiB\n"
        "  time        3.5 h\n"
        "warning: too few steps\n"
        "warning: too little memory\n"
    )


# Colour and streams ---------------------------------------------------------------------------------------------------


def shown(stream: io.StringIO) -> str:
    terminal = Terminal(stream=stream)
    terminal.decision("config", "because")
    terminal.warn("look out")
    terminal.say(terminal.paint("text", "red"))
    return stream.getvalue()


def test_a_terminal_gets_colour() -> None:
    assert shown(Tty()) == ("\033[1mconfig\033[0m: because\n\033[33mwarning\033[0m: look out\n\033[31mtext\033[0m\n")


@pytest.mark.parametrize("name", sorted(COLOURS))
def test_every_colour_ends_where_its_text_ends(name: str) -> None:
    assert Terminal(stream=Tty()).paint("text", name) == f"\033[{COLOURS[name]}mtext\033[0m"


def test_a_file_or_pipe_gets_no_colour() -> None:
    assert shown(io.StringIO()) == "config: because\nwarning: look out\ntext\n"


def test_no_color_takes_the_colour_from_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown(Tty()) == "config: because\nwarning: look out\ntext\n"


def everything(terminal: Terminal) -> None:
    outcome: Any = SimpleNamespace(first_eval_loss=2.0, eval_loss=1.0, best_step=5, steps=10, stopped_early=False)
    terminal.say("said")
    terminal.decision("decided", "because")
    terminal.warn("warned")
    terminal.plan(PLAN)
    terminal.finished(Path("adapters/demo"), outcome)
    terminal.answers([{"prompt": "Q?", "base": "A", "tuned": "B"}])


def test_with_json_everything_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    everything(Terminal(json=True))
    first = capsys.readouterr()
    everything(Terminal())
    second = capsys.readouterr()
    assert (first.out, second.err) == ("", "")
    assert first.err == second.out != ""


def test_colour_is_decided_by_the_stream_that_is_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Tty())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert (Terminal().colour, Terminal(json=True).colour) == (True, False)


# The status -----------------------------------------------------------------------------------------------------------


def on_screen(written: str) -> list[str]:
    """The lines that a terminal shows after `written`: what follows a carriage return goes over what was there."""
    lines = []
    for line in written.split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


def test_a_status_gives_way_to_the_next_one_and_to_a_line() -> None:
    stream = Tty()
    terminal = Terminal(stream=stream)
    terminal.status("a long status")
    assert on_screen(stream.getvalue()) == ["a long status"]
    terminal.status("one", "two")
    assert on_screen(stream.getvalue()) == ["one, two"]
    terminal.say("said")
    assert on_screen(stream.getvalue()) == ["said", ""]
    terminal.status("last")
    terminal.clear()
    terminal.clear()
    assert on_screen(stream.getvalue()) == ["said", ""]


def test_what_does_not_fit_into_the_terminals_width_is_left_out_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {}
    for columns in (4, 12, 13, 22, 80):
        monkeypatch.setenv("COLUMNS", str(columns))
        stream = Tty()
        Terminal(stream=stream).status("step 1/2", "10 s left", "cost 1.00")
        shown[columns] = stream.getvalue()
    whole = "\rstep 1/2, 10 s left, cost 1.00"
    assert shown == {4: "\rste", 12: "\rstep 1/2", 13: "\rstep 1/2", 22: whole[:20], 80: whole}


def test_a_file_or_pipe_gets_no_status() -> None:
    stream = io.StringIO()
    Terminal(stream=stream).status("step 1/2")
    Terminal(stream=stream).clear()
    assert stream.getvalue() == ""


# Checks ---------------------------------------------------------------------------------------------------------------


def result(id_: str, status: str, detail: str = "found", fix: str = "") -> Result:
    return Result(id_, status, detail, fix, 0.1)


RESULTS = (
    result("gpu.driver", "pass", "driver 550.90.07"),
    result("gpu.processes", "warn", "1 other program", "kill 4711"),
    result("data.rows", "fail", "data: 1 bad row\n  train.jsonl:7: not JSON", "mend it"),
    result("model.access", "skip", "a local folder needs no Hub"),
)


def checked(stream: io.StringIO, *results: Result) -> str:
    terminal = Terminal(stream=stream)
    terminal.header("validate")
    for one in results:
        terminal.check(one)
    return stream.getvalue()


def test_checks_stand_under_their_title_each_with_its_status_in_a_word() -> None:
    assert checked(io.StringIO(), *RESULTS) == (
        "validate\n"
        "  pass  gpu.driver               driver 550.90.07\n"
        "  WARN  gpu.processes            1 other program\n"
        "                                 -> kill 4711\n"
        "  FAIL  data.rows                data: 1 bad row\n"
        "                                   train.jsonl:7: not JSON\n"
        "                                 -> mend it\n"
        "  skip  model.access             a local folder needs no Hub\n"
    )


def test_on_a_terminal_the_status_and_the_arrow_have_its_colour() -> None:
    assert checked(Tty(), *RESULTS[:2], RESULTS[3]) == (
        "\033[1mvalidate\033[0m\n"
        "  \033[32mpass\033[0m  gpu.driver               driver 550.90.07\n"
        "  \033[33mWARN\033[0m  gpu.processes            1 other program\n"
        "                                 \033[33m-> \033[0mkill 4711\n"
        "  \033[2mskip\033[0m  model.access             a local folder needs no Hub\n"
    )
    assert checked(Tty(), result("a", "fail")).splitlines()[1].startswith("  \033[31mFAIL\033[0m  a ")


def test_what_a_check_found_cannot_steer_the_terminal() -> None:
    assert checked(io.StringIO(), result("a", "warn", "\033[2J", "\033]0;x\a")) == (
        "validate\n  WARN  a                        \\x1b[2J\n                                 -> \\x1b]0;x\\x07\n"
    )


def test_every_id_leaves_room_before_what_was_found() -> None:
    from finetune.checks import CHECKS

    lines = checked(io.StringIO(), *(result(check.id, "pass") for check in CHECKS)).splitlines()[1:]
    assert {line.index(" found") for line in lines} == {32}


def test_the_tally_counts_each_status() -> None:
    assert tally(RESULTS) == "1 passed, 1 warning, 1 failed, 1 skipped"
    assert tally([]) == "0 passed, 0 warnings, 0 failed, 0 skipped"


# The end of a run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "early", "result"),
    [
        (2.34567, False, "eval_loss 2.3457 -> 1.2346 (step 15)"),
        (None, False, "eval_loss 1.2346 (step 15)"),
        (2.34567, True, "eval_loss 2.3457 -> 1.2346 (step 15, stopped early at step 40)"),
    ],
)
def test_the_end_says_what_came_of_it_and_where_it_lies(first: float | None, early: bool, result: str) -> None:
    outcome: Any = SimpleNamespace(
        first_eval_loss=first, eval_loss=1.23456, best_step=15, steps=40, stopped_early=early
    )
    stream = io.StringIO()
    Terminal(stream=stream).finished(Path("adapters/demo"), outcome)
    assert stream.getvalue() == (
        f"done: {result}\n"
        "  adapter  adapters/demo/adapter_model.safetensors\n"
        "  card     adapters/demo/README.md, with the lines that load the adapter\n"
        "next: less adapters/demo/README.md\n"
    )


@pytest.mark.parametrize(
    ("system", "image", "next_line"),
    [
        ("linux", None, "next: xdg-open {page}"),
        ("darwin", None, "next: open {page}"),
        ("linux", "h100", "next: xdg-open {page} (on the Docker host)"),
    ],
)
def test_a_report_page_that_was_made_is_the_next_thing_to_look_at(
    system: str, image: str | None, next_line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(cli, "IMAGE_LOCK", image)
    (tmp_path / "report.html").touch()
    outcome: Any = SimpleNamespace(first_eval_loss=None, eval_loss=1.0, best_step=1, steps=1, stopped_early=False)
    stream = io.StringIO()
    Terminal(stream=stream).finished(tmp_path, outcome)
    page = f"{tmp_path}/report.html"
    assert stream.getvalue().splitlines()[-2:] == [f"  report   {page}", next_line.format(page=page)]


SAMPLES = [
    {
        "prompt": "How do I make tea?",
        "base": "Boil the water, warm the pot, put in one spoon of leaves for each person and one for the pot, then "
        "wait four minutes.",
        "tuned": "Keeper's log: boil water.\nThe lamp is lit.",
    },
    {"prompt": "Why?\033[31m", "base": "\033]0;title\a", "tuned": "Because."},
]


def test_answers_stand_under_their_question_wrapped_and_aligned() -> None:
    stream = io.StringIO()
    Terminal(stream=stream).answers(SAMPLES)
    assert stream.getvalue() == (
        "\n"
        "Q      How do I make tea?\n"
        "base   Boil the water, warm the pot, put in one spoon of leaves for each person and one for the pot,\n"
        "       then wait four minutes.\n"
        "tuned  Keeper's log: boil water. The lamp is lit.\n"
        "\n"
        "Q      Why?\\x1b[31m\n"
        "base   \\x1b]0;title\\x07\n"
        "tuned  Because.\n"
        "\n"
    )


def test_only_the_tuned_answer_is_green() -> None:
    stream = Tty()
    Terminal(stream=stream).answers(SAMPLES[1:])
    assert stream.getvalue() == (
        "\n\033[1mQ\033[0m      Why?\\x1b[31m\nbase   \\x1b]0;title\\x07\n\033[32mtuned  Because.\033[0m\n\n"
    )


def test_an_empty_answer_still_has_its_name() -> None:
    stream = io.StringIO()
    Terminal(stream=stream).answers([{"prompt": "Q?", "base": "", "tuned": "B"}])
    assert [line.rstrip() for line in stream.getvalue().splitlines()] == [
        "",
        "Q      Q?",
        "base   (nothing)",
        "tuned  B",
        "",
    ]
