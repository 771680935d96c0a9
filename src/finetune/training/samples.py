"""Sample answers of base and tuned model to the same questions, at each new best and at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from peft import PeftModel
from transformers import TrainerCallback

from finetune.config.schema import Config
from finetune.data.encode import with_system_prompt
from finetune.data.jsonl import open_lines, parse_row, read_lines
from finetune.data.prepare import Prepared
from finetune.data.template import Messages
from finetune.data.tokenizer import Chat
from finetune.files import read_json_lines, write_json_lines
from finetune.model.generate import reply_to
from finetune.terminal import Terminal
from finetune.training.keeper import Keeper
from finetune.wording import clean

FILE = "samples.jsonl"
MAX_NEW_TOKENS = 80  # per answer: enough to show the style, and limits the time
PROMPTS = 3  # taken from the validation rows if the config has none
LONGEST_PROMPT = 256  # tokens of such a prompt, so it is quick to read and to answer
LINE = 110  # columns of the line printed at a new best

Samples = list[dict[str, str]]


class Shows(Protocol):
    """A tracker that shows samples."""

    def samples(self, step: int, samples: Samples) -> None: ...


@dataclass(frozen=True)
class Question:
    """A user's `prompt`, and `input_ids` of the complete prompt, up to the reply."""

    prompt: str
    input_ids: list[int]


@dataclass(frozen=True)
class Questions:
    """The sample questions, and the `chat` to decode the answers."""

    chat: Chat
    asked: list[Question]

    def answered_by(self, model: PeftModel, stopped: Callable[[], bool]) -> list[str] | None:
        """Return the replies; None if `stopped`, called after each token, returned true."""
        prompts = [question.input_ids for question in self.asked]
        replies = reply_to(model, self.chat, prompts, MAX_NEW_TOKENS, stopped)
        return None if replies is None else [reply.text for reply in replies]


def make_questions(config: Config, prepared: Prepared) -> Questions:
    """Return dataset.sample_prompts; if null, the first questions of up to PROMPTS validation rows."""
    prompts = config.dataset.sample_prompts
    if prompts is None:
        conversations: Iterator[Messages] = _held_out(prepared)
    else:
        conversations = iter([[{"role": "user", "content": prompt}] for prompt in prompts])
    found: list[Question] = []
    for messages in conversations:
        conversation = with_system_prompt(messages, config.system_prompt)
        question = Question(messages[-1]["content"], prepared.chat.encode_prompt(conversation))
        if prompts is not None or len(question.input_ids) <= LONGEST_PROMPT:
            found.append(question)
        if prompts is None and len(found) == PROMPTS:
            break
    return Questions(prepared.chat, found)


def _held_out(prepared: Prepared) -> Iterator[Messages]:
    """Yield validation rows in file order, each up to its first question."""
    rows = prepared.validation
    places = [rows.row(index)[0] for index in range(len(rows.lengths))]
    held_out = set(places)
    for path in dict.fromkeys(place.file for place in places):
        with open_lines(Path(path)) as stream:
            for number, line in read_lines(stream):
                if (path, number) in held_out:
                    messages = parse_row(line)
                    yield messages[: 2 if messages[0]["role"] == "system" else 1]


@dataclass(eq=False)
class Sampler(TrainerCallback):  # type: ignore[misc]
    """Prints answers of base and tuned model (adapter off and on) at each new best of `keeper` and at `finish`.

    The base answers once per start. `stopped` is called after each token; if it returns true, the answers are dropped,
    the step is saved and training ends.
    """

    questions: Questions
    keeper: Keeper
    stopped: Callable[[], bool]
    terminal: Terminal
    trackers: Sequence[Shows] = ()
    _base: list[str] = field(default_factory=list)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Steps after the checkpoint will be repeated, so their samples are removed.
        self._write([entry for entry in self._entries() if entry["step"] <= state.global_step])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        best, step = self.keeper.best, state.global_step
        if not self.questions.asked or step == 0 or best is None or best["step"] != step:
            return
        samples = self._ask(kwargs["model"])
        if samples is None:
            control.should_save = control.should_training_stop = True
            return
        self._add({"step": step, "eval_loss": best["eval_loss"], "samples": samples})
        self.terminal.say(_new_best(step, samples[0]))

    def finish(self, model: PeftModel, step: int, eval_loss: float) -> Samples:
        """Sample the model of `step` as it is exported."""
        samples = self._ask(model) if self.questions.asked else None
        if samples is None:
            return []
        self._add({"step": step, "eval_loss": eval_loss, "final": True, "samples": samples})
        return samples

    def _ask(self, model: PeftModel) -> Samples | None:
        if not self._base:
            with model.disable_adapter():
                base = self.questions.answered_by(model, self.stopped)
            if base is None:
                return None
            self._base = base
        tuned = self.questions.answered_by(model, self.stopped)
        if tuned is None:
            return None
        answers = zip(self.questions.asked, self._base, tuned, strict=True)
        return [{"prompt": question.prompt, "base": base, "tuned": reply} for question, base, reply in answers]

    def _add(self, entry: dict[str, Any]) -> None:
        self._write([*self._entries(), entry])
        for tracker in self.trackers:
            tracker.samples(entry["step"], entry["samples"])

    def _entries(self) -> list[dict[str, Any]]:
        """Return the entries of samples.jsonl without the final ones of an earlier start."""
        return [entry for entry in read_json_lines(self._path) if "final" not in entry]

    def _write(self, entries: list[dict[str, Any]]) -> None:
        if self.questions.asked or self._path.is_file():
            write_json_lines(self._path, entries)

    @property
    def _path(self) -> Path:
        return self.keeper.run.folder / FILE


def _new_best(step: int, sample: dict[str, str]) -> str:
    reply = " ".join(clean(sample["tuned"]).split()) or "(nothing)"
    line = f"step {step}: the best so far; {' '.join(clean(sample['prompt']).split())} -> {reply}"
    return line if len(line) <= LINE else f"{line[: LINE - 4]} ..."
