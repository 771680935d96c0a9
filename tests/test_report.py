"""What a person reads in the terminal: its words, its colour, and nothing that the data wrote."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune import cli
from finetune.checks.runner import Result
from finetune.plan.describe import plan_lines
from finetune.plan.plan import Plan
from finetune.terminal import COLOURS, Terminal, tally

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
    checkpointed_layers=32,
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


def test_the_layers_that_the_program_chose_to_checkpoint_have_a_row() -> None:
    assert "recomputed" not in changed()
    assert changed(checkpointed_from="16 of 32: because")["recomputed"] == "layers 16 of 32: because"


def test_the_plan_is_told_in_nine_rows() -> None:
    assert plan_lines(PLAN) == [
        ("rows", "12,345 to train on, 1,371 held out, 1,204 cut, 3 dropped"),
        ("tokens", "4,000,000 (38% with loss)"),
        ("certificate", "13,719 rows equal mistral-common's"),
        ("sequences", "1,020, 95.8% full, 16 a step"),
        ("steps", "1,920 (64 an epoch, 58 of warm-up)"),
        ("", "21 evaluations, 4 checkpoints"),
        ("memory", "13.0 GiB expected (activations 9.1, weights 3.8), 79.1 GiB free"),
        ("disk", "2.7 GiB"),
        ("time", "3.5 h"),
    ]


def test_what_did_not_happen_or_is_not_known_is_said_so() -> None:
    assert changed(rows_truncated=0)["rows"] == "12,345 to train on, 1,371 held out, 3 dropped"
    assert changed(rows_truncated=0, rows_dropped=0)["rows"] == "12,345 to train on, 1,371 held out"
    expected = "13.0 GiB expected (activations 9.1, weights 3.8)"
    assert changed(memory_available_gib=None)["memory"] == f"{expected}, not this machine"
    assert changed(hours=None)["time"] == "not measured"
    none = {"rows": 0, "mismatches": 0}
    assert changed(certificate=none)["certificate"] == "none (not Mistral's tokenizer, or off)"


def test_on_a_mac_expected_and_specified_memory_are_set_against_the_gpus_working_set() -> None:
    mac = {"peak_memory_gib": 17.41, "working_set_gib": 21.3, "specified_memory_gb": (24, 28)}
    assert changed(**mac)[""] == (
        "21.3 GiB (22.9 GB) is the GPU's working set: expected -3.9 GiB against it, "
        "the specification's 24-28 GB +1.1 to +5.1 GB"
    )
    assert changed(**mac | {"peak_memory_gib": 25.0, "working_set_gib": 24.0})[""] == (
        "24.0 GiB (25.8 GB) is the GPU's working set: expected +1.0 GiB against it, "
        "the specification's 24-28 GB -1.8 to +2.2 GB"
    )


def test_parts_of_the_memory_that_would_read_nothing_are_left_out() -> None:
    parts = {"weights": 3.841, "lora": 0.049, "logits": 0.0, "attention_mask": 1.25, "activations": 7.82}
    row = changed(memory_parts=parts)["memory"]
    assert row == "13.0 GiB expected (activations 7.8, weights 3.8, attention mask 1.2), 79.1 GiB free"
    assert changed(memory_parts={"lora": 0.01, "weights": 0.02})["memory"].startswith("13.0 GiB expected (weights 0.0)")


def test_the_time_says_who_measured_the_speed_and_short_ones_are_in_minutes() -> None:
    assert changed(hours_from="2,950 tokens/s on a GPU, a.json")["time"] == "3.5 h at 2,950 tokens/s on a GPU, a.json"
    assert changed(hours=0.25, hours_from=None)["time"] == "15 min"


def test_the_cost_is_told_where_an_hour_has_a_price() -> None:
    assert "cost" not in changed()
    assert changed(cost_per_hour=2.5)["cost"] == "8.65 (2.50 an hour)"
    assert changed(cost_per_hour=2.5, hours=None)["cost"] == "not measured (2.50 an hour)"
    assert changed(cost_per_hour=1000, hours=3)["cost"] == "3,000.00 (1,000.00 an hour)"


def test_a_full_gpu_is_not_taken_for_an_unknown_one() -> None:
    assert changed(memory_available_gib=0.0)["memory"].endswith(", 0.0 GiB free")


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
