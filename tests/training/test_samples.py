"""Base versus tuned in the middle of a training: when they are asked, what stays of it, and that no bit changes."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune.errors import Stopped
from finetune.files import read_seal
from finetune.runs.outcome import Outcome
from finetune.terminal import Terminal
from finetune.training import samples as samples_module
from finetune.training.keeper import Keeper
from finetune.training.progress import Progress
from finetune.training.samples import FILE, Question, Sampler, make_questions
from finetune.training.stopper import Stopper
from finetune.training.trainer import Watchers, evaluates_first, train
from support.training import FACTS, Case, adapter_weights, same

SETTINGS = ("training.eval_steps=2", "training.save_steps=2", "training.learning_rate=1e-3")
ASKED = "dataset.sample_prompts=['What is two plus one?', 'Why?']"


@pytest.fixture
def case(case: Case, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setattr(samples_module, "MAX_NEW_TOKENS", 6)
    return case


@dataclass
class Shown:
    """A tracker that remembers."""

    seen: list[tuple[int, list[dict[str, str]]]] = field(default_factory=list)

    def samples(self, step: int, samples: list[dict[str, str]]) -> None:
        self.seen.append((step, samples))


@dataclass
class Start:
    """One start of a training, with a sampler."""

    case: Case
    prompts: str = ASKED
    number: int | None = None  # of a signal that comes while the tuned model is at its third token
    tracker: Shown = field(default_factory=Shown)
    stream: StringIO = field(default_factory=StringIO)

    def __post_init__(self) -> None:
        config = self.case.config(*SETTINGS, self.prompts)
        self.stopper = Stopper(self.case.run)
        self.keeper = Keeper(self.case.run, FACTS, 3)
        self.asked = 0
        prepared = self.case.data(config)
        questions, terminal = make_questions(config, prepared), Terminal(stream=self.stream)
        self.sampler = Sampler(questions, self.keeper, self._stopped, terminal, [self.tracker])

    def _stopped(self) -> bool:
        self.asked += 1
        if self.number is not None and self.asked == 10:
            signal.raise_signal(self.number)
        return self.stopper.signalled()

    def __call__(self, checkpoint: Path | None = None, sampled: bool = True) -> tuple[Outcome, Any]:
        config = self.case.config(*SETTINGS, self.prompts)
        trainer = self.case.trainer(*SETTINGS, first=evaluates_first(checkpoint), change=endless)
        progress = Progress(Terminal(stream=self.stream))
        watchers = Watchers(self.keeper, self.stopper, progress, self.sampler if sampled else None)
        outcome = train(trainer, config.training, watchers, 4, checkpoint)
        return outcome, trainer.model

    def written(self) -> list[dict[str, Any]]:
        lines = (self.case.run.folder / FILE).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def endless(base: Any) -> None:
    base.lm_head.weight.data[2, 0] = 0  # the tiny base then has no wish to end, and says something


# --- what is asked


def test_the_configs_own_prompts_are_asked_with_its_system_prompt(case: Case) -> None:
    config = case.config(ASKED, "system_prompt=Be kind.")
    prepared = case.data(config)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
    found = make_questions(config, prepared).asked
    assert [question.prompt for question in found] == ["What is two plus one?", "Why?"]
    assert found[1].input_ids == prepared.chat.encode_prompt(messages)


def test_without_any_the_first_questions_of_the_first_short_validation_rows_are_asked(case: Case) -> None:
    rows = []
    for number in range(6):
        question = f"What is {number}?" if number != 1 else "Why? " * 400
        asked = [{"role": "system", "content": f"Be {number}."}, {"role": "user", "content": question}]
        more = [{"role": "assistant", "content": "So."}, {"role": "user", "content": "And?"}]
        rows.append([*asked, *more, {"role": "assistant", "content": "So it is."}])
    path = case.folder / "val.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    config = case.config("dataset.sample_prompts=null", f"dataset.validation_file={path}", "model.max_seq_length=2048")
    prepared = case.data(config)
    assert make_questions(config, prepared).asked == [
        Question(f"What is {number}?", prepared.chat.encode_prompt(rows[number][:2])) for number in (0, 2, 3)
    ]


def test_held_out_rows_of_several_files_are_asked_in_their_order(case: Case) -> None:
    paths = []
    for name in ("a", "b"):
        rows = [
            [{"role": "user", "content": f"What is {name}{number}?"}, {"role": "assistant", "content": "So it is."}]
            for number in range(4)
        ]
        paths.append(case.folder / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    config = case.config("dataset.sample_prompts=null", f"dataset.train_file=[{paths[1]}, {paths[0]}]")
    prepared = case.data(config)
    held_out = [prepared.validation.row(index)[0] for index in range(len(prepared.validation.lengths))]
    assert [question.prompt for question in make_questions(config, prepared).asked] == [
        f"What is {Path(place.file).stem}{place.line - 1}?" for place in held_out
    ]


def test_none_are_asked_where_the_list_is_empty(case: Case) -> None:
    start = Start(case, "dataset.sample_prompts=[]")
    outcome, model = start()
    assert start.sampler.finish(model, outcome.best_step, outcome.eval_loss) == []
    assert not (case.run.folder / FILE).exists()
    assert start.asked == 0


# --- when, and what stays of it


def test_base_and_tuned_model_answer_at_each_new_best_and_at_the_end(case: Case) -> None:
    start = Start(case)
    outcome, model = start()
    final = start.sampler.finish(model, outcome.best_step, outcome.eval_loss)
    written = start.written()
    losses = start.keeper.eval_losses
    assert outcome.best_step == 4 and losses[4] < losses[2] < losses[0]
    assert [(entry["step"], entry["eval_loss"], entry.get("final")) for entry in written] == [
        (2, losses[2], None),
        (4, losses[4], None),
        (4, losses[4], True),
    ]
    assert written[2]["samples"] == written[1]["samples"] == final
    assert start.tracker.seen == [(entry["step"], entry["samples"]) for entry in written]
    assert [sample["prompt"] for sample in final] == ["What is two plus one?", "Why?"]
    assert all(list(sample) == ["prompt", "base", "tuned"] and sample["base"] for sample in final)
    assert start.asked == 7 + 3 * 7  # after each of six tokens and after each batch: of the base once
    told = [line for line in start.stream.getvalue().splitlines() if "the best so far" in line]
    prompt, tuned = final[0]["prompt"], final[0]["tuned"]
    assert told[1] == f"step 4: the best so far; {prompt} -> {' '.join(tuned.split())}"
    assert len(told) == 2


def test_a_line_of_the_terminal_is_cut_and_cannot_steer_it() -> None:
    sample = {"prompt": "Why\n\033[31m?", "base": "", "tuned": "Because. " * 20}
    line = samples_module._new_best(7, sample)
    assert line.startswith("step 7: the best so far; Why \\x1b[31m? -> Because. Because. ") and line.endswith(" ...")
    assert len(line) == 110
    assert samples_module._new_best(7, {**sample, "tuned": " "}).endswith("-> (nothing)")


@pytest.mark.slow
def test_the_adapter_has_the_same_bits_with_and_without_samples(case: Case) -> None:
    with_samples = adapter_weights(Start(case)()[1])
    random_state = torch.get_rng_state()
    for folder in case.run.checkpoints.iterdir():
        folder.rename(case.folder / folder.name)
    without = adapter_weights(Start(case)(sampled=False)[1])
    assert same(with_samples, without)
    assert torch.equal(random_state, torch.get_rng_state())


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_between_two_tokens_saves_the_step_and_a_resume_has_the_same_bits(
    case: Case, number: signal.Signals, tmp_path: Path
) -> None:
    start = Start(case, number=number)
    with pytest.raises(Stopped) as stopped:
        start()
    assert start.asked <= 13  # the base's seven, then the third token of the tuned model and the ends of its batch
    assert stopped.value.exit_code == 128 + number
    text = f"stopped by {number.name} at step 2; the same command resumes from checkpoint-2"
    assert str(stopped.value) == text
    assert start.written() == []
    checkpoint = case.run.checkpoints / "checkpoint-2"
    assert read_seal(checkpoint)["eval_loss"] == start.keeper.eval_losses[2]

    resumed = Start(case)
    outcome, model = resumed(checkpoint)
    assert [entry["step"] for entry in resumed.written()] == [4]
    whole = Case(case.base, Path(case.train_file), tmp_path / "whole", case.tokenizer)
    other, untouched = Start(whole)()
    assert same(adapter_weights(model), adapter_weights(untouched))
    assert (outcome.best_step, outcome.eval_loss) == (other.best_step, other.eval_loss)


def test_what_was_said_after_the_checkpoint_goes_when_a_run_goes_on(case: Case) -> None:
    start = Start(case)
    entries = [{"step": 2, "samples": []}, {"step": 4, "samples": []}, {"step": 4, "final": True, "samples": []}]
    (case.run.folder / FILE).write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    start.sampler.on_train_begin(None, SimpleNamespace(global_step=3), None)
    assert start.written() == entries[:1]
    start.sampler.on_train_begin(None, SimpleNamespace(global_step=0), None)
    assert start.written() == []


def test_the_last_word_of_an_earlier_start_is_replaced(case: Case) -> None:
    start = Start(case)
    _, model = start()
    for eval_loss in (2.0, 1.0):
        start.sampler.finish(model, 4, eval_loss)
    assert [(entry["step"], entry["eval_loss"]) for entry in start.written() if "final" in entry] == [(4, 1.0)]
