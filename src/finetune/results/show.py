"""The end of a run in the terminal: what it achieved, where its files are, what to do with them, and sample answers."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

from finetune.cli import PYTHON, advice, command
from finetune.files import quoted, shown
from finetune.results.self_test import SelfTest
from finetune.runs.adapter import CHAT
from finetune.runs.outcome import Outcome
from finetune.terminal import Terminal
from finetune.wording import clean

HF = advice(str(Path(PYTHON).with_name("hf")), 'docker compose run --rm --entrypoint "as-owner hf" demo')
# Of a run's folder, what belongs to the adapter: manifest, metrics and samples hold paths and answers.
UPLOADED = '--include README.md --include "adapter_*" --include "*token*" --include chat_template.jinja'


def show_finished(terminal: Terminal, folder: Path, outcome: Outcome, gpu: bool) -> None:
    """The result of a run (`gpu`: that needed one), and what to do with it; a report that was not made is not named."""
    folder, drawn = shown(folder), (folder / "report.html").is_file()
    before = "" if outcome.first_eval_loss is None else f"{outcome.first_eval_loss:.4f} -> "
    early = f", stopped early at step {outcome.steps}" if outcome.stopped_early else ""
    result = f"eval_loss {before}{outcome.eval_loss:.4f} (step {outcome.best_step}{early})"
    terminal.say(f"{terminal.paint('done', 'green')}: {result}")
    opener = "open" if sys.platform == "darwin" else "xdg-open"
    look = f"{opener} {quoted(folder / 'report.html')}" if drawn else f"less {quoted(folder / 'README.md')}"
    for name, text in (
        ("adapter", f"{folder}/adapter_model.safetensors"),
        ("look", advice(look, f"{look} (on the Docker host)")),
        ("talk", f"{command(CHAT, gpu)} {quoted(folder)}"),
        ("code", f'{folder}/README.md, under "Use"'),
        ("upload", f"{HF} upload YOU/NAME {quoted(folder)} . {UPLOADED}"),
    ):
        terminal.say(f"  {name:<9}{text}")


def show_self_test(terminal: Terminal, found: SelfTest) -> None:
    """Print how many checks passed, and the warnings."""
    terminal.decision("self-test", found.sentence())
    for check in found.warned:
        terminal.warn(f"{check.name}: {check.detail}")


def show_answers(terminal: Terminal, samples: Iterable[dict[str, str]]) -> None:
    """Print each question with the base's and the tuned model's answer."""
    for number, sample in enumerate(samples):
        if number == 0:
            terminal.say()
        terminal.say(f"{terminal.paint('Q', 'bold')}      {clean(sample['prompt'])}")
        for name in ("base", "tuned"):
            reply = clean(sample[name]) or "(nothing)"
            text = textwrap.fill(reply, 100, initial_indent=f"{name:<7}", subsequent_indent=" " * 7)
            terminal.say(terminal.paint(text, "green") if name == "tuned" else text)
        terminal.say()
