"""Everything a person reads in the terminal; the only module that knows colour."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from finetune.cli import advice
from finetune.files import shown
from finetune.plan.plan import Plan

if TYPE_CHECKING:
    from finetune.checks.runner import Result
    from finetune.runs.outcome import Outcome

from finetune.plan.describe import plan_lines
from finetune.wording import clean, counted

STATUSES = {"pass": ("pass", "green"), "warn": ("WARN", "yellow"), "fail": ("FAIL", "red"), "skip": ("skip", "dim")}
DETAIL_COLUMN = 33  # where what a check found begins
COLOURS = {"red": "31", "green": "32", "yellow": "33", "bold": "1", "dim": "2"}


class Terminal:
    """Writes to stdout, or to stderr where stdout belongs to one JSON document."""

    def __init__(self, json: bool = False, stream: TextIO | None = None) -> None:
        self.stream = stream or (sys.stderr if json else sys.stdout)
        self.live = self.stream.isatty()
        self.colour = self.live and "NO_COLOR" not in os.environ
        self._status = 0  # characters of the status that is on the screen

    def paint(self, text: str, colour: str) -> str:
        """`text` in one of COLOURS where this is a terminal."""
        return f"\033[{COLOURS[colour]}m{text}\033[0m" if self.colour else text

    def say(self, text: str = "") -> None:
        """One line."""
        self.clear()
        print(text, file=self.stream, flush=True)

    def status(self, text: str, *more: str) -> None:
        """On a terminal a line that lives until the next one: `text`, and what of `more` fits beside it."""
        if not self.live:
            return
        columns = shutil.get_terminal_size().columns - 1  # 79 where the terminal does not say
        text = text[:columns]
        for part in more:
            if len(text) + len(part) + 2 > columns:
                break
            text += f", {part}"
        print(f"\r{text:<{self._status}}", end="", file=self.stream, flush=True)
        self._status = len(text)

    def clear(self) -> None:
        """Take the status off the screen."""
        if self._status:
            print(f"\r{' ' * self._status}\r", end="", file=self.stream, flush=True)
            self._status = 0

    def decision(self, what: str, because: str) -> None:
        """An automatic decision with its reason, once."""
        self.say(f"{self.paint(what, 'bold')}: {because}")

    def warn(self, text: str) -> None:
        """Something to act on that does not stop the run."""
        self.say(f"{self.paint('warning', 'yellow')}: {text}")

    def header(self, title: str) -> None:
        """A title over lines that follow."""
        self.say(self.paint(title, "bold"))

    def check(self, result: Result) -> None:
        """One check's result: its status in a word, what was found, and what to type where something is wrong."""
        word, colour = STATUSES[result.status]
        detail = clean(result.detail).replace("\n", "\n" + " " * DETAIL_COLUMN)
        self.say(f"  {self.paint(word, colour)}  {result.id:<{DETAIL_COLUMN - 9}} {detail}")
        if result.fix:
            self.say(" " * DETAIL_COLUMN + self.paint("-> ", colour) + clean(result.fix))

    def plan(self, plan: Plan) -> None:
        """The plan on one screen."""
        self.say(self.paint("plan", "bold"))
        for name, text in plan_lines(plan):
            self.say(f"  {name:<12}{text}")
        for problem in plan.problems:
            self.warn(problem)

    def finished(self, folder: Path, outcome: Outcome) -> None:
        """What came of it, where it lies, and how to look at it; a report page that could not be made is not named."""
        folder, drawn = shown(folder), (folder / "report.html").is_file()
        before = "" if outcome.first_eval_loss is None else f"{outcome.first_eval_loss:.4f} -> "
        early = f", stopped early at step {outcome.steps}" if outcome.stopped_early else ""
        result = f"eval_loss {before}{outcome.eval_loss:.4f} (step {outcome.best_step}{early})"
        self.say(f"{self.paint('done', 'green')}: {result}")
        self.say(f"  adapter  {folder}/adapter_model.safetensors")
        self.say(f"  card     {folder}/README.md, with the lines that load the adapter")
        if drawn:
            self.say(f"  report   {folder}/report.html")
        opener = "open" if sys.platform == "darwin" else "xdg-open"
        look = f"{opener} {folder}/report.html" if drawn else f"less {folder}/README.md"
        self.decision("next", advice(look, f"{look} (on the Docker host)"))

    def answers(self, samples: Iterable[dict[str, str]]) -> None:
        """The same questions answered by the base and by the tuned model."""
        for number, sample in enumerate(samples):
            if number == 0:
                self.say()
            self.say(f"{self.paint('Q', 'bold')}      {clean(sample['prompt'])}")
            for name in ("base", "tuned"):
                reply = clean(sample[name]) or "(nothing)"
                text = textwrap.fill(reply, 100, initial_indent=f"{name:<7}", subsequent_indent=" " * 7)
                self.say(self.paint(text, "green") if name == "tuned" else text)
            self.say()


def tally(results: Iterable[Result]) -> str:
    """`34 passed, 1 warning, 0 failed, 6 skipped`."""
    counts = Counter(result.status for result in results)
    warnings = counted(counts["warn"], "warning")
    return f"{counts['pass']} passed, {warnings}, {counts['fail']} failed, {counts['skip']} skipped"
