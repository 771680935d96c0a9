"""The chat: prompts, commands, and saved conversations."""

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
  QUESTION            ask the tuned model (greedy decoding: same question, same answer)
  /compare [QUESTION] ask base and tuned model; without QUESTION, repeat the last one
  /system [TEXT]      start over with this system message, or with none
  /reset              start over
  /save FILE.jsonl    append the conversation to FILE as a training row
  Ctrl-C, Ctrl-D      stop the answer; quit (as /quit does)

"""
FORGOTTEN = "(incomplete answer: this question and answer are not kept)"


@pytest.fixture
def conversation(taught: Taught) -> Conversation:
    return Conversation(taught.model, taught.chat, 256, None)


def said(conversation: Conversation, *lines: str, stream: io.StringIO | None = None) -> str:
    """Everything printed for these input lines, without the help text."""
    stream = stream or io.StringIO()
    stdin, sys.stdin = sys.stdin, io.StringIO("".join(f"{line}\n" for line in lines))
    try:
        Talk(conversation, Terminal(stream=stream)).run()
    finally:
        sys.stdin = stdin
    return stream.getvalue().removeprefix(HELP)


# Beginning ------------------------------------------------------------------------------------------------------------


def test_a_conversation_starts_with_the_runs_length_and_system_prompt(taught: Taught) -> None:
    config = taught.config.model_copy(update={"system_prompt": BRIEF})
    loaded = begin(Adapter(taught.run, config), None, SILENT)
    assert (loaded.limit, loaded.system, loaded.turns) == (256, BRIEF, [])
    reply = loaded.reply(loaded.encoded(loaded.with_question(WHO)), Listener(lambda _: None))
    assert reply is not None and reply.text == ME
    systems = [begin(Adapter(taught.run, config), system, SILENT).system for system in ("Be kind.", "")]
    assert systems == ["Be kind.", None]


# Questions ------------------------------------------------------------------------------------------------------------


def test_a_question_is_answered_with_the_earlier_turns_as_context(conversation: Conversation) -> None:
    assert said(conversation, WHO, "", "  ", f" {WHY} ") == f"{KEEPER}\n\n{SHIPS}\n\n\n"
    assert conversation.turns == turns(WHO, KEEPER, WHY, SHIPS)


def test_the_prompt_has_the_same_ids_as_in_training(taught: Taught, conversation: Conversation) -> None:
    """Compares with the row that the conversation becomes, up to its answer."""
    conversation.restart(BRIEF)
    conversation.add(WHO, ME)
    [row] = taught.chat.encode([turns(WHO, ME, WHY, SO, system=BRIEF)])
    prompt = conversation.encoded(conversation.with_question(WHY))
    assert row.input_ids[: len(prompt)] == prompt
    assert [label for label in row.labels[len(prompt) :] if label == -100] == []


def test_escape_sequences_in_an_answer_are_printed_as_text(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reply(*given: Any, **_: Any) -> None:
        given[2].heard("\033[31m\tred\n\u202e")

    monkeypatch.setattr(Conversation, "reply", reply)
    assert said(conversation, "x") == f"\\x1b[31m    red\n\\u202e (stopped)\n{FORGOTTEN}\n\n\n"


def test_an_incomplete_answer_and_its_question_are_not_kept(taught: Taught) -> None:
    prompt = len(taught.chat.encode_prompt(turns(WHO)))
    short = Conversation(taught.model, taught.chat, prompt + 2, None)
    [reply] = reply_to(taught.model, taught.chat, [taught.chat.encode_prompt(turns(WHO))], 2) or []
    assert said(short, WHO) == f"{reply.text} (cut off after 2 tokens)\n{FORGOTTEN}\n\n\n"
    assert short.turns == []


def test_a_conversation_with_no_room_for_an_answer_says_how_to_start_over(taught: Taught) -> None:
    tokens = len(taught.chat.encode_prompt(turns(WHO)))
    full = Conversation(taught.model, taught.chat, tokens, None)
    found = f"the conversation has {tokens} tokens, and model.max_seq_length is {tokens}: no answer fits"
    assert said(full, WHO) == f"warning: {found}; ask something shorter, or start over with /reset\n\n"
    with pytest.raises(ConfigError):
        full.encoded(full.with_question(WHO))
    full.limit += 1
    assert len(full.encoded(full.with_question(WHO))) == tokens


def test_an_empty_answer_is_labeled(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Conversation, "reply", lambda *_, **__: Reply("", 0, True))
    assert said(conversation, "x") == "(nothing)\n\n\n"


# Commands -------------------------------------------------------------------------------------------------------------


def test_compare_prints_the_base_answer_first_and_keeps_the_tuned_one(conversation: Conversation) -> None:
    assert said(conversation, f"/compare {WHO}", WHY) == f"base   {NOBODY}\ntuned  {KEEPER}\n\n{SHIPS}\n\n\n"
    assert conversation.turns == turns(WHO, KEEPER, WHY, SHIPS)


def test_compare_without_a_question_repeats_the_last_one_and_keeps_nothing(conversation: Conversation) -> None:
    wanted = f"{KEEPER}\n\nbase   {NOBODY}\ntuned  {KEEPER}\n\n{SHIPS}\n\n\n"
    assert said(conversation, WHO, "/compare", WHY) == wanted
    fix = "type /compare QUESTION"
    assert said(conversation, "/compare") == f"warning: /compare: nothing has been asked yet; {fix}\n\n"


def test_only_the_tuned_answer_is_green(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    printed = said(conversation, f"/compare {WHO}", stream=Tty())
    assert "base   Nobody" in printed
    assert "tuned  \033[32mThe\033[0m\033[32m ke\033[0m" in printed


def test_system_and_reset_start_over(conversation: Conversation) -> None:
    printed = said(conversation, WHO, f"/system {BRIEF}", WHO, "/reset", WHO, "/system", WHO, "/reset", "/compare")
    none = "started over: no system message\n"
    brief = f"started over: system message: {BRIEF}\n"
    again = "warning: /compare: nothing has been asked yet; type /compare QUESTION\n"
    assert printed == f"{KEEPER}\n\n{brief}{ME}\n\n{brief}{ME}\n\n{none}{KEEPER}\n\n{none}{again}\n"


def test_quit_ends_the_chat_and_an_unknown_command_lists_the_known_ones(conversation: Conversation) -> None:
    names = "/compare, /system, /reset, /save, /quit"
    wanted = f"warning: /exit: unknown command, expected one of {names}; to ask it as a question, start with a space\n"
    assert said(conversation, "/exit now", "/quit", WHO) == wanted
    assert said(conversation, " /exit").count("warning") == 0


# Saving ---------------------------------------------------------------------------------------------------------------


def test_a_saved_conversation_is_a_valid_training_row(conversation: Conversation, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    printed = said(conversation, WHO, WHY, f"/save {path}", f"/system {BRIEF}", WHO, f"/save {path}")
    assert printed.count(f"saved: 2 turns to {path}\n") == printed.count(f"saved: 1 turn to {path}\n") == 1
    rows = [parse_row(line) for line in path.read_bytes().splitlines()]
    assert rows == [turns(WHO, KEEPER, WHY, SHIPS), turns(WHO, ME, system=BRIEF)]
    assert "é" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("before", ["", '{"a": 1}\n', '{"a": 1}'])
def test_a_saved_row_gets_its_own_line(conversation: Conversation, tmp_path: Path, before: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(before, encoding="utf-8")
    conversation.add("Q", "A")
    conversation.save(path)
    row = json.dumps({"messages": turns("Q", "A")})
    assert path.read_text(encoding="utf-8") == f"{before.rstrip()}{chr(10) if before else ''}{row}\n"


def test_a_failed_save_is_reported_and_changes_no_file(conversation: Conversation, tmp_path: Path) -> None:
    packed, path, folder = tmp_path / "packed.jsonl", tmp_path / "mine.jsonl", tmp_path / "folder.jsonl"
    packed.write_bytes(gzip.compress(b"{}\n"))
    folder.mkdir()
    before = packed.read_bytes()
    assert said(conversation, f"/save {path}", "/save", WHO, f"/save {packed}", f"/save {folder}", "/save a.txt") == (
        f"warning: not saved to {path}: there are no answers yet\n"
        "warning: not saved to .: expected a name ending in .jsonl\n"
        f"{KEEPER}\n\n"
        f"warning: not saved to {packed}: it is a gzip file; rows cannot be appended to it\n"
        f"warning: not saved to {folder}: Is a directory\n"
        "warning: not saved to a.txt: expected a name ending in .jsonl\n\n"
    )
    conversation.add("Q", "")
    assert said(conversation, f"/save {path}") == f"warning: not saved to {path}: message 4 (assistant) is empty\n\n"
    assert (path.exists(), packed.read_bytes()) == (False, before)


# Ctrl-C ---------------------------------------------------------------------------------------------------------------


def test_ctrl_c_is_caught_in_the_block_and_works_as_before_after_it() -> None:
    before = signal.getsignal(signal.SIGINT)
    with until_ctrl_c() as stopped:
        assert not stopped()
        signal.raise_signal(signal.SIGINT)
        assert stopped()
    assert signal.getsignal(signal.SIGINT) is before
