"""The end of a run in the terminal: where its files are, and sample answers that cannot steer it."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune import cli
from finetune.cli import PYTHON
from finetune.files import ROOT
from finetune.results.self_test import SelfCheck, SelfTest
from finetune.results.show import HF, UPLOADED, show_answers, show_finished, show_self_test
from finetune.terminal import Terminal
from support.pseudo_terminal import Tty


@pytest.fixture(autouse=True)
def color_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)


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
    show_finished(Terminal(stream=stream), Path("adapters/demo"), outcome, gpu=False)
    assert stream.getvalue() == (
        f"done: {result}\n"
        "  adapter  adapters/demo/adapter_model.safetensors\n"
        "  look     less adapters/demo/README.md\n"
        f"  talk     {PYTHON} scripts/chat.py adapters/demo\n"
        '  code     adapters/demo/README.md, under "Use"\n'
        f"  upload   {HF} upload YOU/NAME adapters/demo . {UPLOADED}\n"
    )


IN_IMAGE = "docker compose run --rm"


@pytest.mark.parametrize(
    ("system", "image", "gpu", "look", "talk"),
    [
        ("linux", None, True, "xdg-open {page}", f"{PYTHON} scripts/chat.py"),
        ("darwin", None, False, "open {page}", f"{PYTHON} scripts/chat.py"),
        ("linux", "h100", True, "xdg-open {page} (on the Docker host)", f"{IN_IMAGE} chat"),
        ("linux", "cpu", False, "xdg-open {page} (on the Docker host)",
            f'{IN_IMAGE} --entrypoint "as-owner python" plan scripts/chat.py'),
    ],
)  # fmt: skip
def test_a_report_page_that_was_made_is_what_to_look_at(
    system: str, image: str | None, gpu: bool, look: str, talk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(cli, "IMAGE_LOCK", image)
    (tmp_path / "report.html").touch()
    outcome: Any = SimpleNamespace(first_eval_loss=None, eval_loss=1.0, best_step=1, steps=1, stopped_early=False)
    stream = io.StringIO()
    show_finished(Terminal(stream=stream), tmp_path, outcome, gpu)
    assert stream.getvalue().splitlines()[2:4] == [
        f"  look     {look.format(page=tmp_path / 'report.html')}",
        f"  talk     {talk} {tmp_path}",
    ]


def test_a_folder_with_a_space_is_quoted_in_what_is_to_be_pasted(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    outcome: Any = SimpleNamespace(first_eval_loss=None, eval_loss=1.0, best_step=1, steps=1, stopped_early=False)
    stream = io.StringIO()
    show_finished(Terminal(stream=stream), folder, outcome, gpu=False)
    lines = dict(line.split(maxsplit=1) for line in stream.getvalue().splitlines()[1:])
    assert lines == {
        "adapter": f"{folder}/adapter_model.safetensors",
        "look": f"less '{folder}/README.md'",
        "talk": f"{PYTHON} scripts/chat.py '{folder}'",
        "code": f'{folder}/README.md, under "Use"',
        "upload": f"{HF} upload YOU/NAME '{folder}' . {UPLOADED}",
    }


def test_what_is_uploaded_is_what_its_page_says() -> None:
    line = f"    {HF} upload YOU/NAME adapters/RUN . {UPLOADED}\n"
    assert line.replace(HF, ".venv/bin/hf") in (ROOT / "docs" / "run.md").read_text(encoding="utf-8")


SAMPLES = [
    {"prompt": "How do I make tea?", "base": "Boil the water, warm the pot, put in one spoon of leaves for each "
        "person and one for the pot, then wait four minutes.", "tuned": "Keeper's log: boil water.\nThe lamp is lit."},
    {"prompt": "Why?\033[31m", "base": "\033]0;title\a", "tuned": "Because."},
]  # fmt: skip


def test_answers_stand_under_their_question_wrapped_and_aligned() -> None:
    stream = io.StringIO()
    show_answers(Terminal(stream=stream), SAMPLES)
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
    show_answers(Terminal(stream=stream), SAMPLES[1:])
    assert stream.getvalue() == (
        "\n\033[1mQ\033[0m      Why?\\x1b[31m\nbase   \\x1b]0;title\\x07\n\033[32mtuned  Because.\033[0m\n\n"
    )


def test_an_empty_answer_still_has_its_name() -> None:
    stream = io.StringIO()
    show_answers(Terminal(stream=stream), [{"prompt": "Q?", "base": "", "tuned": "B"}])
    assert [line.rstrip() for line in stream.getvalue().splitlines()] == [
        "", "Q      Q?", "base   (nothing)", "tuned  B", "",
    ]  # fmt: skip


def test_a_check_of_the_self_test_that_warns_is_a_warning() -> None:
    found = SelfTest((SelfCheck("finite", "pass", "448 tensors"), SelfCheck("answers_end", "warn", "2 of 4 run on")))
    stream = io.StringIO()
    show_self_test(Terminal(stream=stream), found)
    assert stream.getvalue() == (
        "self-test: 1 of 2 checks passed on the adapter reloaded from disk\nwarning: answers_end: 2 of 4 run on\n"
    )
