"""The run's arithmetic: steps, memory, hours; and, with --deep, the rehearsal that measures them."""

from __future__ import annotations

import math
import os
from datetime import datetime

from finetune.checks.preflight import Preflight
from finetune.checks.runner import Check, Finding, failed, passed, skipped, warned
from finetune.cli import PYTHON
from finetune.config.load import load_config
from finetune.files import ROOT, resolve
from finetune.machine.device import capacity_gib
from finetune.machine.platforms import names
from finetune.model import hub
from finetune.plan.automatic import in_words, left_open, used
from finetune.plan.describe import time_text
from finetune.plan.plan import hours_problem
from finetune.plan.schedule import check_budget
from finetune.runs.folder import Run
from finetune.wording import duration


def _steps(preflight: Preflight) -> Finding:
    plan = preflight.plan
    found = (
        f"{plan.steps:,} steps of {plan.effective_batch_size}, {plan.warmup_steps:,} of warmup, "
        f"evaluations {plan.evaluations:,}, checkpoints {plan.checkpoints:,}"
    )
    problem = plan.schedule_problem(preflight.config.training.eval_steps)
    return warned(f"{found}; {problem[0]}", problem[1]) if problem else passed(found)


def _memory(preflight: Preflight) -> Finding:
    machine, fitting = preflight.machine, preflight.fitting
    if fitting.fits:
        return passed(fitting.found)
    others_hold_it = fitting.peak_gib <= (machine.memory_limit_gib or machine.memory_gib)
    return failed(fitting.found, fitting.fix("close other programs" if others_hold_it else ""))


def _hours(preflight: Preflight) -> Finding:
    training, plan = preflight.config.training, preflight.plan
    budget = training.time_budget_hours
    problem = hours_problem(plan, preflight.config)
    if problem:
        return warned(*problem)
    if plan.hours is None:
        limit = "" if budget is None else f"; the rehearsal will compare with training.time_budget_hours {budget:g}"
        found = time_text(plan) if plan.hours_expected else "not measured on this platform"
        return skipped(f"{found}{limit}")
    found = f"{duration(3600 * plan.hours)} expected"
    if budget is None or plan.hours <= budget:
        return passed(found)
    epochs = math.floor(100 * training.num_train_epochs * budget / plan.hours) / 100  # rounded up it would not fit
    share = f"--set training.num_train_epochs={epochs:g}"
    longer = f"--set training.time_budget_hours={math.ceil(round(110 * plan.hours, 6)) / 100:g}"
    return warned(f"{found}, training.time_budget_hours is {budget:g}", f"{share}, or {longer}")


def _rehearsal(preflight: Preflight) -> Finding:
    model, demo = preflight.config.model, preflight.platform.demo
    if not demo or preflight.tokenizer_folder is not None or hub.is_cached(model.name, model.revision):
        return passed(_rehearsed(preflight))
    config = load_config(str(ROOT / demo), [f"output.dir={preflight.config.output.dir}"])[0]
    fetch = hub.fetch_command(model.name, model.revision)
    if hub.missing_weights(resolve(config.model.name)):
        return failed("neither the base nor the demo's is here", f"{PYTHON} scripts/make_demo_model.py, or {fetch}")
    found = _rehearsed(Preflight(config, preflight.machine, report=preflight.report))
    return warned(f"the base is not here yet, and the demo's was rehearsed in its place: {found}", fetch)


def _rehearsed(preflight: Preflight) -> str:
    from finetune.training.job import load_job
    from finetune.training.rehearsal import rehearse

    config = preflight.config
    folder = resolve(config.output.dir) / f".rehearsal-{os.getpid()}"
    job = load_job(Run(folder, False, None), config, preflight.prepared, preflight.report)
    found = rehearse(job, folder, capacity_gib(preflight.platform))
    partial = check_budget(config.training, found.schedule, found.pace, elapsed=0)
    fused = f"fused paths: {in_words(used(found.config, job.geometry))}" if left_open(config) else None
    chosen = f"checkpointed layers {found.checkpointed.reason}" if found.checkpointed.reason else None
    return "; ".join(filter(None, (fused, chosen, found.sentence(datetime.now().astimezone()), partial)))


_ROWS, _GEOMETRY = ("data.rows",), ("model.geometry",)
CPU = names(lambda row: not row.accelerated)
CHECKS = (
    Check("plan.steps", "steps, warm-up, evaluations and checkpoints", _steps, needs=_ROWS, level="warn"),
    Check("plan.memory", "free memory against the expected peak", _memory, CPU, _GEOMETRY),
    Check("plan.hours", "expected hours against training.time_budget_hours", _hours, needs=_ROWS, level="warn"),
)
DEEP = "with --deep: the largest batches, an evaluation, a save and a load; on a Mac without the base, the demo's"
REHEARSAL = (Check("rehearsal", DEEP, _rehearsal, needs=_ROWS, deep=True),)
