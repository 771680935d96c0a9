"""How every command ends: its exit code, its last words, and how fast it answers when it has little to say."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune import cli
from finetune.config.load import ROOT
from finetune.errors import (
    CheckFailed,
    ConfigError,
    DataError,
    Diverged,
    OutOfResource,
    SelfTestFailed,
    Stopped,
    UserError,
)

TRAIN = ROOT / "src" / "train.py"
Ending = tuple[int, str, str]


@pytest.fixture
def ending(ended: Callable[[Callable[[], None]], Ending]) -> Callable[[BaseException | None], Ending]:
    """Exit code, stdout and stderr of a command that raises what is given."""

    def running(raised: BaseException | None) -> Ending:
        def main() -> None:
            if raised is not None:
                raise raised

        return ended(main)

    return running


def train(*arguments: str, cwd: Path = ROOT) -> Ending:
    done = subprocess.run(
        [sys.executable, str(TRAIN), *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


# Exit codes -----------------------------------------------------------------------------------------------------------

ENDINGS: list[tuple[UserError, int, str]] = [
    (ConfigError("a: wrong"), 2, "config: 1 problem\n  a: wrong\n"),
    (ConfigError("a: wrong", "b: wrong"), 2, "config: 2 problems\n  a: wrong\n  b: wrong\n"),
    (ConfigError("a: wrong", fix="type b"), 2, "config: 1 problem\n  a: wrong; type b\n"),
    (
        ConfigError("a: wrong", "b: wrong", fix="type c", between="\n"),
        2,
        "config: 2 problems\n  a: wrong\n  b: wrong\ntype c\n",
    ),
    (CheckFailed("no GPU"), 3, "no GPU\n"),
    (CheckFailed("no GPU", "type: a"), 3, "no GPU; type: a\n"),
    (DataError("data: 1 bad row"), 4, "data: 1 bad row\n"),
    (Diverged("step 3: the loss is not finite"), 5, "step 3: the loss is not finite\n"),
    (
        DataError("a.jsonl:1: \033]0;title\a\n  b.jsonl:2: \u202e"),
        4,
        "a.jsonl:1: \\x1b]0;title\\x07\n  b.jsonl:2: \\u202e\n",
    ),
    (OutOfResource("locked"), 6, "locked\n"),
    (SelfTestFailed("self-test: 1 of 7 checks failed"), 1, "self-test: 1 of 7 checks failed\n"),
    (Stopped(130, "stopped at step 4", "type it again"), 130, "stopped at step 4; type it again\n"),
    (Stopped(143, "stopped at step 4"), 143, "stopped at step 4\n"),
]


@pytest.mark.parametrize(("error", "code", "text"), ENDINGS, ids=lambda value: type(value).__name__)
def test_each_kind_of_error_has_its_exit_code_and_its_text_on_stderr(
    ending: Callable[[BaseException | None], Ending], error: UserError, code: int, text: str
) -> None:
    assert ending(error) == (code, "", text)


def test_every_kind_of_error_is_in_the_table() -> None:
    assert {type(error) for error, _, _ in ENDINGS} == set(UserError.__subclasses__())


def test_a_command_that_returns_is_exit_0_and_silent(ending: Callable[[BaseException | None], Ending]) -> None:
    assert ending(None) == (0, "", "")


def test_ctrl_c_is_exit_130(ending: Callable[[BaseException | None], Ending]) -> None:
    assert ending(KeyboardInterrupt()) == (130, "", "stopped by Ctrl-C\n")


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/runs/a/b"), "/runs/a/b"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/home/me/c"), "/home/me/c"),
        (OSError(errno.ENOSPC, "No space left on device"), "[Errno 28] No space left on device"),
    ],
)
def test_a_full_disk_is_exit_6_and_says_what_to_do(
    ending: Callable[[BaseException | None], Ending], error: OSError, what: str
) -> None:
    assert ending(error) == (6, "", f"no space left: {what}; free some, then type the same command again\n")


def test_too_little_memory_is_exit_6_and_says_what_to_lower(ending: Callable[[BaseException | None], Ending]) -> None:
    advice = "lower training.per_device_train_batch_size or model.max_seq_length"
    assert ending(MemoryError()) == (6, "", f"out of memory; {advice}\n")


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), ZeroDivisionError("bug")])
def test_what_nobody_foresaw_is_passed_on_with_its_traceback(
    ending: Callable[[BaseException | None], Ending], error: BaseException
) -> None:
    with pytest.raises(type(error)):
        ending(error)


def program(body: str) -> list[str]:
    """A command whose `main` has this body, as another process."""
    code = f"import sys\nsys.path.insert(0, {str(ROOT / 'src')!r})\nfrom finetune import cli\n"
    return [sys.executable, "-c", f"{code}def main():\n    {body}\ncli.run(main)\n"]


def test_a_bug_is_exit_1_with_a_traceback() -> None:
    done = subprocess.run(program("1 / 0"), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Traceback (most recent call last):\n")
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize(
    ("number", "code", "text"), [(signal.SIGINT, 130, "stopped by Ctrl-C\n"), (signal.SIGTERM, 143, "")]
)
def test_a_signal_ends_a_command_and_lets_it_tidy_up(number: int, code: int, text: str) -> None:
    body = (
        "import time\n    try:\n        print('ready', flush=True)\n        time.sleep(60)\n"
        "    finally:\n        print('tidied')"
    )
    process = subprocess.Popen(program(body), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (code, "tidied\n", text)


def piped_to_nobody(command: list[str], unbuffered: bool) -> tuple[int, str]:
    """Exit code and stderr of a command whose stdout is a pipe that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    if unbuffered:
        environment["PYTHONUNBUFFERED"] = "1"
    try:
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, env=environment, text=True, check=False)
    finally:
        os.close(writing)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "unbuffered",
    [
        True,
        False,
    ],
)
@pytest.mark.parametrize("body", ["print('x')", "print('x', flush=True)"], ids=["print", "flush"])
def test_a_reader_who_left_is_no_error_and_no_noise(body: str, unbuffered: bool) -> None:
    assert piped_to_nobody(program(body), unbuffered) == (0, "")


# The arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--dryrun"], ["--dry"], ["--set"], ["file.yaml"], ["--config"]])
def test_a_wrong_argument_is_exit_2_with_the_usage(arguments: list[str]) -> None:
    code, out, err = train(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("usage: train.py ")


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--dryrun"], "--dryrun; did you mean --dry-run?"),
        (["--confg=cpu"], "--confg=cpu; did you mean --config?"),
        (["--fresh", "--epochs", "3"], "--epochs 3"),
        (["cpu"], "cpu"),
    ],
)
def test_a_mistyped_flag_is_answered_with_the_one_that_is_spelled_most_like_it(
    arguments: list[str], fault: str
) -> None:
    assert train(*arguments)[2].splitlines()[-1] == f"train.py: error: unrecognized arguments: {fault}"


def test_an_unknown_config_lists_the_choices() -> None:
    text = "config: 1 problem\n  --config h200: no such file; type a path or one of: h100, m4, cpu\n"
    assert train("--config", "h200", "--dry-run") == (2, "", text)


def test_settings_are_gathered_and_config_is_offered_only_where_it_is_read() -> None:
    options = cli.parser("words", "which file").parse_args(["--set", "a=1", "--set", "b=2", "--config", "x", "--json"])
    assert (options.set, options.config, options.json) == (["a=1", "b=2"], "x", True)
    options = cli.parser("words").parse_args([])
    assert (options.set, options.json, hasattr(options, "config")) == ([], False, False)


def test_json_is_one_document_with_text_as_it_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    cli.print_json({"text": "naïve 日本", "none": None})
    assert capsys.readouterr().out == '{\n  "text": "naïve 日本",\n  "none": null\n}\n'


def test_train_works_from_another_directory_and_reads_the_config_that_lies_there(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("lora:\n  rr: 4\n", encoding="utf-8")
    model = f"model.name={tmp_path}"
    text = "config: 1 problem\n  mine.yaml:2  lora.rr: unknown key; did you mean lora.r?\n"
    assert train("--config", "mine.yaml", "--set", model, "--dry-run", cwd=tmp_path) == (2, "", text)


# How fast -------------------------------------------------------------------------------------------------------------


def cpu_seconds(command: Callable[[], Any]) -> float:
    """CPU time of the child processes of `command`, the best of three: other work on the machine is not ours."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    seconds = []
    for _ in range(3):
        before = used()
        command()
        seconds.append(used() - before)
    return min(seconds)


def test_help_takes_less_than_0_3_seconds_of_cpu() -> None:
    def command() -> None:
        code, out, err = train("--help")
        assert (code, err) == (0, "")
        assert out.startswith("usage: train.py ")
        assert set(re.findall(r"^  (--[a-z-]+)", out, re.MULTILINE)) == {
            *("--config", "--set", "--json", "--dry-run", "--fresh", "--skip", "--resume-changed")
        }

    assert cpu_seconds(command) < 0.3


def test_a_typo_in_a_config_takes_less_than_0_5_seconds_of_cpu(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(f"model:\n  name: {tmp_path}\ntraining:\n  learning_rte: 2e-4\n", encoding="utf-8")
    text = f"config: 1 problem\n  {path}:4  training.learning_rte: unknown key; did you mean training.learning_rate?\n"

    def command() -> None:
        assert train("--config", str(path)) == (2, "", text)

    assert cpu_seconds(command) < 0.5


SCRIPTS = [TRAIN, *sorted((ROOT / "scripts").glob("*.py"))]


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        *((script, ["--help"]) for script in SCRIPTS),
        (TRAIN, ["--config", "h100", "--set", "lora.rr=1"]),
        (ROOT / "scripts" / "chat.py", ["adapters/no-such-run", "--ask", "x"]),
    ],
    ids=[*(script.name for script in SCRIPTS), "typo", "a run to chat with that is not there"],
)
def test_nothing_slow_is_imported_before_there_is_work_for_it(script: Path, arguments: list[str]) -> None:
    code = (
        "import atexit, runpy, sys\n"
        "slow = {'torch', 'numpy', 'transformers', 'pyarrow', 'tokenizers', 'huggingface_hub', 'matplotlib'}\n"
        "slow |= {'ssl', 'urllib.request', 'packaging.requirements'}\n"
        "slow |= {'pydantic'} if '--help' in sys.argv else set()  # a config cannot be read without it\n"
        "atexit.register(lambda: print('slow:', *sorted(slow & set(sys.modules)), file=sys.stderr))\n"
        f"sys.argv = sys.argv[1:]\nsys.path.insert(0, {str(script.parent)!r})\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(script), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 2)
    assert done.stderr.splitlines()[-1] == "slow:"


def test_a_dry_run_takes_less_than_6_seconds_of_cpu(tmp_path: Path) -> None:
    """Three times what it may take: with a cold cache it reads, certifies and packs 150 rows."""
    data = ("--set", "dataset.train_file=data/sample/train.jsonl", "--set", "dataset.validation_file=null")

    def command() -> None:
        code, _, err = train("--config", "h100", "--dry-run", *data, "--set", f"output.dir={tmp_path}")
        assert (code, err) == (0, "")

    assert cpu_seconds(command) < 6
