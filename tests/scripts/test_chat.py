"""scripts/chat.py: on a terminal, the whole screen; one answer for scripts; what cannot be talked to."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import MistralForCausalLM

from finetune.files import ROOT
from finetune.model.generate import reply_to
from support.pseudo_terminal import Session, screen
from support.taught import BRIEF, KEEPER, ME, NOBODY, SHIPS, WHO, WHY, Taught, turns

Run = Callable[..., tuple[int, str, str]]
SCRIPT = ROOT / "scripts" / "chat.py"
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "INPUTRC")},
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TERM": "xterm-256color", "LC_ALL": "C.UTF-8",
}  # fmt: skip
HELP = [
    "chat",
    "  QUESTION            ask the tuned model (greedy decoding: same question, same answer)",
    "  /compare [QUESTION] ask base and tuned model; without QUESTION, repeat the last one",
    "  /system [TEXT]      start over with this system message, or with none",
    "  /reset              start over",
    "  /save FILE.jsonl    append the conversation to FILE as a training row",
    "  Ctrl-C, Ctrl-D      stop the answer; quit (as /quit does)",
    "",
]


def line(*arguments: object) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, arguments)]


# On a terminal --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_screen_of_a_conversation(taught: Taught, tmp_path: Path) -> None:
    saved = tmp_path / "mine.jsonl"
    session = Session(line(taught.run), ENVIRONMENT)
    for typed in (WHO, WHY, f"/compare {WHO}", f"/system {BRIEF}", WHO, f"/save {saved}", "/compare", "/nothing"):
        session.until("> ")
        session.type(f"{typed}\r")
    session.until("> ")
    session.type("half a quest")
    session.until("half a quest")
    session.until_it_waits()
    session.type("\x03")
    session.until("> ")
    session.type("\x04")
    assert session.end() == 0, session.written
    prompt = taught.chat.encode_prompt(turns(WHO, KEEPER, WHY, SHIPS, WHO))
    [tuned] = reply_to(taught.model, taught.chat, [prompt], 100) or []
    with taught.model.disable_adapter():
        [base, brief] = (
            reply_to(taught.model, taught.chat, [prompt, taught.chat.encode_prompt(turns(WHO, system=BRIEF))], 100)
            or []
        )
    assert screen(session.written) == [
        f"config: {taught.run}/config.yaml",
        f"adapter: {taught.run}, eval_loss 1.2500 (step 4)",
        *HELP,
        f"> {WHO}", KEEPER, "",
        f"> {WHY}", *SHIPS.split("\n"), "",
        f"> /compare {WHO}", *f"base   {base.text}\ntuned  {tuned.text}".split("\n"), "",
        f"> /system {BRIEF}", f"started over: system message: {BRIEF}",
        f"> {WHO}", ME, "",
        f"> /save {saved}", f"saved: 1 turn to {saved}",
        "> /compare", f"base   {brief.text}", f"tuned  {ME}", "",
        "> /nothing",
        "warning: /nothing: unknown command, expected one of /compare, /system, /reset, /save, /quit; "
        "to ask it as a question, start with a space",
        "> half a quest", "(type /quit or press Ctrl-D to quit)",
        ">", "",
    ]  # fmt: skip
    inspect = [sys.executable, str(ROOT / "scripts" / "inspect_data.py"), str(saved), "--rows", "1", "--json"]
    done = subprocess.run([*inspect, "--config", "h100"], capture_output=True, text=True, check=True)
    [row] = taught.chat.encode([turns(WHO, ME, system=BRIEF)])
    shown = json.loads(done.stdout)
    assert (shown["input_ids"], shown["labels"]) == (row.input_ids, row.labels)


@pytest.mark.slow
def test_ctrl_c_ends_an_answer_and_not_the_program(taught: Taught, tmp_path: Path) -> None:
    """Of a base whose end token never comes."""
    base = tmp_path / "endless"
    model = MistralForCausalLM.from_pretrained(taught.base)
    model.lm_head.weight.data[2] = 0
    model.save_pretrained(base)
    settings = ("--set", f"model.name={base}", "--set", "model.max_seq_length=32768")
    session = Session(line(taught.run, *settings), ENVIRONMENT | {"NO_COLOR": "1"})
    session.until("> ")
    session.type(f"/compare {WHO}\r")
    for begun in (f"base   {NOBODY}", f"tuned  {KEEPER}"):
        session.until(begun)
        session.type("\x03")
        session.until(" (stopped)")
    session.until("> ")
    session.type("/save never.jsonl\r")
    session.until("> ")
    session.type("/quit\r")
    assert session.end() == 0, session.written
    lines = screen(session.written)
    told = "\n".join(lines[lines.index(f"> /compare {WHO}") + 1 :])
    assert told.count("^C") == 2
    base_said, tuned_said, rest = told.replace("^C", "").split(" (stopped)\n")
    assert base_said.startswith(f"base   {NOBODY}")
    assert tuned_said.startswith(f"tuned  {KEEPER}")
    assert rest == (
        "(incomplete answer: this question and answer are not kept)\n\n"
        "> /save never.jsonl\nwarning: not saved to never.jsonl: there are no answers yet\n> /quit\n"
    )


# For scripts ----------------------------------------------------------------------------------------------------------


def test_ask_prints_the_answer_and_nothing_else_on_stdout(run: Run, taught: Taught) -> None:
    assert run(taught.run, "--ask", f" {WHO}") == (
        0,
        f"{KEEPER}\n",
        f"config: {taught.run}/config.yaml\nadapter: {taught.run}, eval_loss 1.2500 (step 4)\n",
    )
    assert run(taught.run, "--ask", WHO, "--system", BRIEF)[1] == f"{ME}\n"


def test_json_is_one_document(run: Run, taught: Taught) -> None:
    code, out, _ = run(taught.run, "--ask", WHO, "--system", BRIEF, "--json")
    assert (code, json.loads(out)) == (
        0, {"question": WHO, "system": BRIEF, "answer": ME, "tokens": 2, "ended": True},
    )  # fmt: skip


def test_an_answer_without_an_end_is_a_warning_on_stderr(run: Run, taught: Taught) -> None:
    limit = len(taught.chat.encode_prompt(turns(WHO, system=BRIEF))) + 2
    code, out, err = run(taught.run, "--ask", WHO, "--system", BRIEF, "--set", f"model.max_seq_length={limit}")
    assert (code, out) == (0, f"{ME}\n")
    warning = "warning: the answer has no end within 2 tokens, up to model.max_seq_length"
    assert err.splitlines()[-1] == warning


def test_lines_from_a_pipe_are_one_conversation(run: Run, taught: Taught, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{WHO}\n{WHY}\n"))
    code, out, _ = run(taught.run)
    assert (code, out.splitlines()[2:]) == (0, [*HELP, KEEPER, "", *SHIPS.split("\n"), "", ""])


# What cannot be talked to ---------------------------------------------------------------------------------------------


def test_each_fault_has_its_message_and_exit_code(run: Run, taught: Taught, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(taught.run, tmp_path / "run"))
    plain = tmp_path / "plain"
    shutil.copytree(copy / "checkpoints" / "best", plain)
    (plain / "adapter_model.safetensors").write_bytes(b"abc")
    (copy / "adapter_model.safetensors").write_bytes(b"abc")
    ends = {
        code: err.splitlines()[-1].strip()
        for code, _, err in (
            run(tmp_path, "--ask", "x"),
            run(copy, "--ask", "x"),
        )
    }
    assert set(ends) == {2, 3}
    assert ends[2].startswith(f"{tmp_path}: no adapter_config.json in it; name a run's folder")
    assert ends[3].startswith(f"{copy}/adapter_model.safetensors is not the file that the run saved; copy it again")
    code, out, err = run(plain, "--ask", "x", "--set", f"output.dir={tmp_path}")
    damaged = f"{plain}: PEFT cannot load this adapter: Error while deserializing header: header too small"
    assert (code, out, err.splitlines()[-1]) == (3, "", damaged)
    tokens = len(taught.chat.encode_prompt(turns("x " * 20)))
    code, out, err = run(taught.run, "--ask", "x " * 20, "--set", "model.max_seq_length=16")
    found = f"the conversation has {tokens - 1} tokens, and model.max_seq_length is 16: no answer fits"
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].strip() == f"{found}; ask something shorter, or start over with /reset"


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("--json",), "--json prints one answer, so it needs a question; add --ask TEXT"),
        (("--ask", " "), "--ask: empty; type a question"),
    ],
)
def test_what_makes_no_sense_is_exit_2(run: Run, arguments: tuple[str, ...], fault: str) -> None:
    assert run("run", *arguments) == (2, "", f"config: 1 problem\n  {fault}\n")
