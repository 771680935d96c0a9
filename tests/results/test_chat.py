"""A conversation with base and tuned model: its prompts, its commands, and what is saved of it."""

from __future__ import annotations

import gzip
import io
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.data.jsonl import parse_row
from finetune.errors import ConfigError
from finetune.model.generate import Listener, Reply, reply_to
from finetune.results.chat import Conversation, Talk, begin, until_ctrl_c
from finetune.runs.adapter import Adapter
from finetune.terminal import Terminal
from finetune.wording import SILENT
from support.pseudo_terminal import Tty
from support.taught import BRIEF, KEEPER, ME, NOBODY, SHIPS, SO, WHO, WHY, Taught, turns

HELP = """\
chat
  QUESTION            the tuned model answers; greedily, so always the same
  /compare [QUESTION] the base answers, then the tuned model; without QUESTION the last one again
  /system [TEXT]      start again with this system message, or without one
  /reset              start again
  /save FILE.jsonl    append the conversation to FILE as a row to train on
  Ctrl-C, Ctrl-D      end the answer; leave, as /quit does

"""
FORGOTTEN = "(an answer without an end is forgotten, and its question)"


@pytest.fixture
def conversation(taught: Taught) -> Conversation:
    return Conversation(taught.model, taught.chat, 256, None)


def said(conversation: Conversation, *lines: str, stream: io.StringIO | None = None) -> str:
    """All that is printed for these lines from a pipe, without what the commands are."""
    stream = stream or io.StringIO()
    stdin, sys.stdin = sys.stdin, io.StringIO("".join(f"{line}\n" for line in lines))
    try:
        Talk(conversation, Terminal(stream=stream)).run()
    finally:
        sys.stdin = stdin
    return stream.getvalue().removeprefix(HELP)


# Beginning ------------------------------------------------------------------------------------------------------------


def test_it_begins_with_the_runs_length_and_system_prompt(taught: Taught) -> None:
    config = taught.config.model_copy(update={"system_prompt": BRIEF})
    loaded = begin(Adapter(taught.run, config), None, SILENT)
    assert (loaded.limit, loaded.system, loaded.turns) == (256, BRIEF, [])
    reply = loaded.reply(loaded.encoded(loaded.with_question(WHO)), Listener(lambda _: None))
    assert reply is not None and reply.text == ME
    systems = [begin(Adapter(taught.run, config), system, SILENT).system for system in ("Be kind.", "")]
    assert systems == ["Be kind.", None]


# Questions ------------------------------------------------------------------------------------------------------------


def test_a_question_is_answered_after_all_that_was_said(conversation: Conversation) -> None:
    assert said(conversation, WHO, "", "  ", f" {WHY} ") == f"{KEEPER}\n\n{SHIPS}\n\n\n"
    assert conversation.turns == turns(WHO, KEEPER, WHY, SHIPS)


def test_the_prompt_is_that_of_the_training(taught: Taught, conversation: Conversation) -> None:
    """Up to its answer, the ids of the row that the conversation becomes."""
    conversation.restart(BRIEF)
    conversation.add(WHO, ME)
    [row] = taught.chat.encode([turns(WHO, ME, WHY, SO, system=BRIEF)])
    prompt = conversation.encoded(conversation.with_question(WHY))
    assert row.input_ids[: len(prompt)] == prompt
    assert [label for label in row.labels[len(prompt) :] if label == -100] == []


def test_what_a_model_says_cannot_steer_the_terminal(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reply(*given: Any, **_: Any) -> None:
        given[2].heard("\033[31m\tred\n\u202e")

    monkeypatch.setattr(Conversation, "reply", reply)
    assert said(conversation, "x") == f"\\x1b[31m    red\n\\u202e (stopped)\n{FORGOTTEN}\n\n\n"


def test_an_answer_that_is_stopped_or_too_long_is_forgotten_with_its_question(taught: Taught) -> None:
    prompt = len(taught.chat.encode_prompt(turns(WHO)))
    short = Conversation(taught.model, taught.chat, prompt + 2, None)
    [reply] = reply_to(taught.model, taught.chat, [taught.chat.encode_prompt(turns(WHO))], 2) or []
    assert said(short, WHO) == f"{reply.text} (no end within 2 tokens)\n{FORGOTTEN}\n\n\n"
    assert short.turns == []


def test_a_conversation_without_room_for_an_answer_says_so_and_can_begin_again(taught: Taught) -> None:
    tokens = len(taught.chat.encode_prompt(turns(WHO)))
    full = Conversation(taught.model, taught.chat, tokens, None)
    found = f"the conversation has {tokens} tokens, and model.max_seq_length is {tokens}: no answer fits"
    assert said(full, WHO) == f"warning: {found}; ask something shorter, or start again with /reset\n\n"
    with pytest.raises(ConfigError):
        full.encoded(full.with_question(WHO))
    full.limit += 1
    assert len(full.encoded(full.with_question(WHO))) == tokens


def test_an_empty_answer_is_shown_as_nothing(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Conversation, "reply", lambda *_, **__: Reply("", 0, True))
    assert said(conversation, "x") == "(nothing)\n\n\n"


# Commands -------------------------------------------------------------------------------------------------------------


def test_compare_lets_the_base_answer_first_and_goes_on_with_the_tuned_answer(conversation: Conversation) -> None:
    assert said(conversation, f"/compare {WHO}", WHY) == f"base   {NOBODY}\ntuned  {KEEPER}\n\n{SHIPS}\n\n\n"
    assert conversation.turns == turns(WHO, KEEPER, WHY, SHIPS)


def test_compare_alone_asks_the_last_question_again_and_adds_nothing(conversation: Conversation) -> None:
    wanted = f"{KEEPER}\n\nbase   {NOBODY}\ntuned  {KEEPER}\n\n{SHIPS}\n\n\n"
    assert said(conversation, WHO, "/compare", WHY) == wanted
    fix = "type /compare QUESTION"
    assert said(conversation, "/compare") == f"warning: /compare: nothing has been asked yet; {fix}\n\n"


def test_only_the_tuned_answer_is_green(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    printed = said(conversation, f"/compare {WHO}", stream=Tty())
    assert "base   Nobody" in printed
    assert "tuned  \033[32mThe\033[0m\033[32m ke\033[0m" in printed


def test_system_and_reset_start_again(conversation: Conversation) -> None:
    printed = said(conversation, WHO, f"/system {BRIEF}", WHO, "/reset", WHO, "/system", WHO, "/reset", "/compare")
    none = "started again: no system message\n"
    brief = f"started again: system message: {BRIEF}\n"
    again = "warning: /compare: nothing has been asked yet; type /compare QUESTION\n"
    assert printed == f"{KEEPER}\n\n{brief}{ME}\n\n{brief}{ME}\n\n{none}{KEEPER}\n\n{none}{again}\n"


def test_quit_leaves_and_an_unknown_command_is_told_those_there_are(conversation: Conversation) -> None:
    names = "/compare, /system, /reset, /save, /quit"
    wanted = f"warning: /exit: no such command, wanted one of {names}; a space before it asks it\n"
    assert said(conversation, "/exit now", "/quit", WHO) == wanted
    assert said(conversation, " /exit").count("warning") == 0


# Saving ---------------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_a_row_that_the_reader_accepts(conversation: Conversation, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    printed = said(conversation, WHO, WHY, f"/save {path}", f"/system {BRIEF}", WHO, f"/save {path}")
    assert printed.count(f"saved: 2 turns to {path}\n") == printed.count(f"saved: 1 turn to {path}\n") == 1
    rows = [parse_row(line) for line in path.read_bytes().splitlines()]
    assert rows == [turns(WHO, KEEPER, WHY, SHIPS), turns(WHO, ME, system=BRIEF)]
    assert "é" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("before", ["", '{"a": 1}\n', '{"a": 1}'])
def test_a_row_is_appended_on_a_line_of_its_own(conversation: Conversation, tmp_path: Path, before: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(before, encoding="utf-8")
    conversation.add("Q", "A")
    conversation.save(path)
    row = json.dumps({"messages": turns("Q", "A")})
    assert path.read_text(encoding="utf-8") == f"{before.rstrip()}{chr(10) if before else ''}{row}\n"


def test_what_cannot_be_saved_is_told_and_changes_no_file(conversation: Conversation, tmp_path: Path) -> None:
    packed, path, folder = tmp_path / "packed.jsonl", tmp_path / "mine.jsonl", tmp_path / "folder.jsonl"
    packed.write_bytes(gzip.compress(b"{}\n"))
    folder.mkdir()
    before = packed.read_bytes()
    assert said(conversation, f"/save {path}", "/save", WHO, f"/save {packed}", f"/save {folder}", "/save a.txt") == (
        f"warning: not saved to {path}: nothing has been answered yet\n"
        "warning: not saved to .: wanted a name that ends in .jsonl\n"
        f"{KEEPER}\n\n"
        f"warning: not saved to {packed}: it is a gzip, which no row can be appended to\n"
        f"warning: not saved to {folder}: Is a directory\n"
        "warning: not saved to a.txt: wanted a name that ends in .jsonl\n\n"
    )
    conversation.add("Q", "")
    assert said(conversation, f"/save {path}") == f"warning: not saved to {path}: message 4 (assistant) is empty\n\n"
    assert (path.exists(), packed.read_bytes()) == (False, before)


# Ctrl-C ---------------------------------------------------------------------------------------------------------------


def test_ctrl_c_is_heard_in_the_block_and_acts_again_after_it() -> None:
    before = signal.getsignal(signal.SIGINT)
    with until_ctrl_c() as stopped:
        assert not stopped()
        signal.raise_signal(signal.SIGINT)
        assert stopped()
    assert signal.getsignal(signal.SIGINT) is before
