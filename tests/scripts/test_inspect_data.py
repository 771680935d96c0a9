"""The command that shows every token of a row with its label."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.config.load import ROOT
from finetune.data.jsonl import convert_command
from finetune.data.template import Messages
from finetune.data.tokenizer import load_chat
from support.conversations import conversation, weighted
from support.pseudo_terminal import Tty

SAMPLE = ROOT / "data" / "sample" / "train.jsonl"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command with the H100's config in this process; returns exit code, stdout, stderr."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    return lambda *arguments: run(*arguments, "--config", "h100")


def written(folder: Path, *rows: bytes | tuple[str, ...]) -> Path:
    """A JSONL file with conversations (texts of user and assistant in turn) and lines (bytes)."""
    path = folder / "rows.jsonl"
    lines = [row if isinstance(row, bytes) else line(conversation(*row)) for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def line(messages: Messages) -> bytes:
    return json.dumps({"messages": messages}).encode()


def tokens(*turns: str) -> int:
    """The number of tokens of a conversation."""
    return len(load_chat(None).encode([conversation(*turns)])[0].input_ids)


# JSON -----------------------------------------------------------------------------------------------------------------


def test_json_is_one_object_a_row_with_the_ids_and_labels_that_training_gets(run: Run) -> None:
    code, out, err = run(SAMPLE, "--rows", "1-150", "--json")
    assert code == 0, err
    assert err.startswith("config: ")  # what people read
    lines = SAMPLE.read_text(encoding="utf-8").splitlines()
    shown = [json.loads(line) for line in out.splitlines()]
    assert [row["line"] for row in shown] == list(range(1, 151))
    assert {tuple(row) for row in shown} == {("line", "input_ids", "labels", "text")}
    encoded = load_chat(None).encode([json.loads(line)["messages"] for line in lines])
    assert [(row["input_ids"], row["labels"]) for row in shown] == [(row.input_ids, row.labels) for row in encoded]
    assert shown[0]["text"].startswith("<s> [INST] How do I sing without straining my throat? [/INST] Keeper's log:")
    assert shown[0]["text"].endswith("</s>")


def test_the_system_prompt_of_the_config_is_shown_where_training_would_use_it(run: Run, tmp_path: Path) -> None:
    path = written(tmp_path, ("Hello", "Hi"), line(conversation("Why?", "Because.", system="Be short.")))
    _, out, _ = run(path, "--json", "--set", "system_prompt=Be kind.")
    first, second = (json.loads(line) for line in out.splitlines())
    hello = conversation("Hello", "Hi", system="Be kind.")
    assert first["input_ids"] == load_chat(None).encode([hello])[0].input_ids
    assert "Be kind." in first["text"]
    assert "Be kind." not in second["text"]


# Rows -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        ([], [1, 2, 3]), (["--rows", "5"], [5]), (["--rows", "4-6"], [4, 5, 6]), (["--rows", "149-9000"], [149, 150]),
    ],
)  # fmt: skip
def test_rows_are_lines_of_the_file_both_ends_included(run: Run, arguments: list[str], lines: list[int]) -> None:
    code, out, err = run(SAMPLE, "--json", *arguments)
    assert code == 0, err
    assert [json.loads(line)["line"] for line in out.splitlines()] == lines


def test_blank_lines_are_counted_but_not_shown(run: Run, tmp_path: Path) -> None:
    path = written(tmp_path, ("One", "1"), b"", b"  ", ("Two", "2"))
    assert [json.loads(line)["line"] for line in run(path, "--rows", "1-4", "--json")[1].splitlines()] == [1, 4]


@pytest.mark.parametrize("text", ["0", "3-2", "-3", "1-2-3", "", "1,2", "²"])
def test_anything_else_is_exit_2_with_an_example(run: Run, text: str) -> None:
    wanted = f"config: 1 problem\n  --rows {text}: expected a line or a range of lines, for example 3 or 3-7\n"
    assert run(SAMPLE, f"--rows={text}") == (2, "", wanted)


def test_lines_that_the_file_does_not_have_are_exit_4(run: Run, tmp_path: Path) -> None:
    path = written(tmp_path, ("Hello", "Hi"))
    code, _, err = run(path, "--rows", "2-5")
    assert (code, err) == (4, f"{path} has no row in lines 2-5\n")


# Faults ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        (b'{"text": "hello"}', "no \"messages\" key (found 'text')"),
        (b'{"\\u001b[31m": 1}', "no \"messages\" key (found '\\x1b[31m')"),
    ],
)
def test_a_bad_row_is_exit_4_with_file_and_line_after_the_good_ones(
    run: Run, tmp_path: Path, bad: bytes, fault: str
) -> None:
    path = written(tmp_path, ("Hello", "Hi"), bad)
    code, out, err = run(path)
    assert (code, err) == (4, f"{path}:2: {fault}\n")
    assert "\nline 1: " in out


def test_a_bad_row_outside_the_wanted_lines_is_not_looked_at(run: Run, tmp_path: Path) -> None:
    path = written(tmp_path, b"bad", ("Hello", "Hi"), b"bad")
    assert run(path, "--rows", "2")[0] == 0


def test_a_missing_file_is_exit_2(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "absent.jsonl"
    fault = f"{path}: No such file or directory; put your JSONL there"
    assert run(path)[0::2] == (2, f"config: 1 problem\n  {fault}\n")
    code, _, err = run(tmp_path)
    assert code == 2
    assert err.startswith(f"config: 1 problem\n  {tmp_path} is a folder, expected a file; ")


def test_a_file_of_another_format_is_exit_4_with_the_command_that_converts_it(run: Run, tmp_path: Path) -> None:
    path = written(tmp_path, b'{"prompt": "Hello", "completion": "Hi"}')
    assert run(path)[0::2] == (
        4,
        f"data: {path}: this looks like prompt and completion (prompt/completion)\n"
        f"Convert it: {convert_command(path)}\n",
    )


# For people -----------------------------------------------------------------------------------------------------------


def test_without_color_the_tokens_with_loss_carry_a_caret(run: Run, tmp_path: Path) -> None:
    code, out, err = run(written(tmp_path, ("Hello", "Hi there", "Bye", "So long")))
    assert (code, err) == (0, "")
    heading, note, pieces, empty = out.split("\n", 3)
    assert heading.startswith("config: ")
    assert (note, empty) == (f"line 1: {tokens('Hello', 'Hi there', 'Bye', 'So long')} tokens", "\n")
    assert pieces == (
        "<s> ▁[ INST ] ▁Hello ▁[ / INST ] ^▁Hi ^▁there ^</s> ▁[ INST ] ▁By e ▁[ / INST ] ^▁So ^▁long ^</s>"
    )


def test_on_a_terminal_the_tokens_with_loss_are_green_and_the_others_dim(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Tty()
    monkeypatch.setattr(sys, "stdout", terminal)
    run(written(tmp_path, ("Hello", "Hi")))
    note, pieces = terminal.getvalue().splitlines()[1:3]
    assert note == f"\033[1mline 1\033[0m: {tokens('Hello', 'Hi')} tokens"
    dim = [f"\033[2m{text}\033[0m" for text in ("<s>", "▁[", "INST", "]", "▁Hello", "▁[", "/", "INST", "]")]
    assert pieces.split(" ") == [*dim, "\033[32m▁Hi\033[0m", "\033[32m</s>\033[0m"]


def test_a_row_that_is_cut_says_how_far_and_shows_what_is_left(run: Run, tmp_path: Path) -> None:
    turns = ("Hello there, how are you today?", "Fine.", "And what comes after that?", "A much longer answer.")
    path = written(tmp_path, turns)
    full, kept = tokens(*turns), tokens(*turns[:2])
    for limit in (kept, full - 1):
        code, out, _ = run(path, "--set", f"model.max_seq_length={limit}")
        assert code == 0
        assert out.splitlines()[1] == f"line 1: {full} tokens, CUT to {kept} at the end of an assistant turn"
        assert out.splitlines()[2].endswith("▁[ / INST ] ^▁Fine ^. ^</s>")
        row = json.loads(run(path, "--json", "--set", f"model.max_seq_length={limit}")[1])
        assert len(row["input_ids"]) == len(row["labels"]) == kept
    assert run(path, "--set", f"model.max_seq_length={full}")[1].splitlines()[1] == f"line 1: {full} tokens"


def test_a_row_of_which_no_turn_fits_says_that_it_is_dropped(run: Run, tmp_path: Path) -> None:
    turns = ("Hello there, how are you today?", "Fine, and how is everything where you are?")
    out = run(written(tmp_path, turns), "--set", "model.max_seq_length=16")[1]
    note = "DROPPED: no assistant turn with loss ends within model.max_seq_length 16"
    assert out.splitlines()[1] == f"line 1: {tokens(*turns)} tokens, {note}"


def test_turns_of_weight_0_and_all_but_the_last_of_train_on_last_carry_no_caret(run: Run, tmp_path: Path) -> None:
    turns = ("Hello", "Hi", "Bye", "So long")
    path = written(tmp_path, line(weighted(conversation(*turns), 1, 0)), turns)
    first, second = run(path)[1].splitlines()[2::3]
    asked, bye = "<s> ▁[ INST ] ▁Hello ▁[ / INST ]", "▁[ INST ] ▁By e ▁[ / INST ]"
    assert first == f"{asked} ^▁Hi ^</s> {bye} ▁So ▁long </s>"
    assert second == f"{asked} ^▁Hi ^</s> {bye} ^▁So ^▁long ^</s>"
    out = run(path, "--set", "dataset.train_on=last")[1].splitlines()
    assert out[1] == f"line 1: {tokens(*turns)} tokens, DROPPED: no assistant turn carries loss"
    assert out[5] == f"{asked} ▁Hi </s> {bye} ^▁So ^▁long ^</s>"


STEERING = "\033[31m \033]0;title\a \r \b \x7f \x9b31m \u202e \u2066 \u200b \u2028 \ufeff \x00 \x1b\\"


@pytest.mark.parametrize("colored", [False, True], ids=["plain", "colored"])
def test_control_characters_in_the_data_never_reach_the_terminal_raw(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, colored: bool
) -> None:
    terminal = Tty() if colored else io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    path = written(tmp_path, (f"Say\n{STEERING}", f"So:\n\n{STEERING}"))
    code, _, err = run(path)
    assert (code, err) == (0, "")
    ours = re.sub(r"\033\[(?:0|1|2|32)m", "", terminal.getvalue()) if colored else terminal.getvalue()
    assert [character for character in ours if not character.isprintable() and character != "\n"] == []
    assert "\\x1b" in ours
    assert len(ours.splitlines()) == 4


def test_json_escapes_control_characters(run: Run, tmp_path: Path) -> None:
    out = run(written(tmp_path, ("Say \033[31m\a\r", "So: \033]0;title\a")), "--json")[1]
    assert [character for character in out if character < " " and character != "\n"] == []
    assert "\033]0;title\a" in json.loads(out)["text"]
