"""What a person reads in the terminal: its words, its colour, and nothing that the data wrote."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.plan import Plan
from finetune.report import COLOURS, Terminal, clean, plan_lines

PLAN = Plan(
    rows_train=12_345,
    rows_validation=1_371,
    tokens_train=4_000_000,
    supervised_tokens_train=1_500_000,
    rows_truncated=1_204,
    rows_dropped=3,
    sequences_train=1_020,
    packing_efficiency=0.9575,
    effective_batch_size=16,
    steps_per_epoch=64,
    steps=1_920,
    warmup_steps=58,
    evaluations=21,
    checkpoints=4,
    peak_memory_gib=12.96,
    memory_parts={"weights": 3.841, "activations": 9.119},
    memory_available_gib=79.13,
    disk_gib=2.66,
    hours=3.46,
    certificate={"rows": 13_719, "mismatches": 0},
    problems=["too few steps", "too little memory"],
)


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def colour_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)


def changed(**values: Any) -> dict[str, str]:
    """The plan's rows by name, with some numbers changed."""
    return dict(plan_lines(Plan(**{**PLAN.as_dict(), **values})))


# The plan -------------------------------------------------------------------------------------------------------------


def test_the_plan_is_told_in_nine_rows() -> None:
    assert plan_lines(PLAN) == [
        ("rows", "12,345 to train on, 1,371 held out, 1,204 cut, 3 dropped"),
        ("tokens", "4,000,000 (38% with loss)"),
        ("certificate", "13,719 rows equal mistral-common's"),
        ("sequences", "1,020, 95.8% full, 16 a step"),
        ("steps", "1,920 (64 an epoch, 58 of warm-up)"),
        ("", "21 evaluations, 4 checkpoints"),
        ("memory", "13.0 GiB expected, 79.1 GiB free"),
        ("disk", "2.7 GiB"),
        ("time", "3.5 h"),
    ]


def test_what_did_not_happen_or_is_not_known_is_said_so() -> None:
    assert changed(rows_truncated=0)["rows"] == "12,345 to train on, 1,371 held out, 3 dropped"
    assert changed(rows_truncated=0, rows_dropped=0)["rows"] == "12,345 to train on, 1,371 held out"
    assert changed(memory_available_gib=None)["memory"] == "13.0 GiB expected, not this machine"
    assert changed(hours=None)["time"] == "not measured"
    none = {"rows": 0, "mismatches": 0}
    assert changed(certificate=none)["certificate"] == "none (not Mistral's tokenizer, or off)"


def test_a_full_gpu_is_not_taken_for_an_unknown_one() -> None:
    assert changed(memory_available_gib=0.0)["memory"] == "13.0 GiB expected, 0.0 GiB free"


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
        "  memory      13.0 GiB expected, 79.1 GiB free\n"
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
        "  report   adapters/demo/README.md, manifest.json, metrics.jsonl\n"
    )


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


# What the data may write ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("\033[31m", "\\x1b[31m"),
        ("\a", "\\x07"),
        ("\r", "\\r"),
        ("\b", "\\x08"),
        ("\t", "\\t"),
        ("\0", "\\x00"),
        ("\x7f", "\\x7f"),
        ("\x9b31m", "\\x9b31m"),  # CSI in one character
        ("\u202e", "\\u202e"),  # right-to-left override
        ("\u2066", "\\u2066"),  # isolate
        ("\u200b", "\\u200b"),  # zero width
        ("\u2028", "\\u2028"),  # line separator
        ("\ufeff", "\\ufeff"),
        ("\ud800", "\\ud800"),  # half a surrogate pair
        ("\U000e0041", "\\U000e0041"),  # tag
    ],
)
def test_a_character_that_could_steer_the_terminal_is_escaped(text: str, escaped: str) -> None:
    assert clean(f"a{text}b") == f"a{escaped}b"


@pytest.mark.parametrize(
    "text", ["", "plain text", "two\nlines\n", "naïve café", "日本語", "Привет", "שלום", "🙂", "a\\b"]
)
def test_ordinary_text_and_line_ends_stay_as_they_are(text: str) -> None:
    assert clean(text) == text
