"""What a training is made of: its callbacks take what the config says, and come in the order that the bits rest on."""

from __future__ import annotations

from io import StringIO

from finetune.plan.schedule import Pace
from finetune.terminal import Terminal
from finetune.training.job import Job
from finetune.training.keeper import Keeper
from finetune.training.progress import Progress
from finetune.training.samples import Sampler
from finetune.training.stopper import Stopper, TimeBudget
from support.rehearsals import loaded
from support.training import FACTS, Case


def test_the_callbacks_take_what_the_config_says_and_come_in_their_order(case: Case) -> None:
    settings = ("training.save_total_limit=7", "training.time_budget_hours=2", "dataset.sample_prompts=['Why?']")
    config = case.config(*settings)
    job = Job(case.run, config, case.data(config), loaded(config), case.tokenizer)
    watchers = job.watchers(FACTS, Pace(), [], None, Terminal(stream=StringIO()))
    order = [type(callback) for callback in watchers.in_order()]
    assert order == [Keeper, Sampler, TimeBudget, Stopper, Progress]
    assert watchers.stopper.budget is not None and watchers.sampler is not None
    asked = [question.prompt for question in watchers.sampler.questions.asked]
    assert (watchers.keeper.keep, watchers.stopper.budget.hours, asked) == (7, 2, ["Why?"])
