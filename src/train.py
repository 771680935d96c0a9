"""Train a QLoRA adapter on Mistral-7B-Instruct-v0.2, or say what a run would do. The same command again resumes."""

from __future__ import annotations

import argparse
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING

from finetune import checks, cli
from finetune.checks.preflight import Preflight
from finetune.checks.runner import Result
from finetune.checks.runner import run as run_checks
from finetune.checks.show import show_result, tally
from finetune.cli import quiet_libraries
from finetune.config.load import load_config
from finetune.errors import CheckFailed
from finetune.files import shown
from finetune.machine.device import capacity_gib, memory_errors_explained, peak_memory_gib, prepare_device
from finetune.machine.inspect import read_machine
from finetune.machine.platforms import hardware
from finetune.plan.checkpointed_layers import by_formula, settled
from finetune.plan.describe import cost_text, plan_lines
from finetune.plan.fit import what_would_fit
from finetune.plan.schedule import Pace, check_budget, seconds_since_start
from finetune.results.report import refresh
from finetune.runs.folder import Run, open_run, read_manifest
from finetune.terminal import Terminal

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerFast

    from finetune.training.rehearsal import Rehearsal


def parse() -> argparse.Namespace:
    parser = cli.parser(__doc__ or "", "a config file or a platform (h100, m4, cpu); default: what this machine is")
    parser.add_argument("--dry-run", action="store_true", help="check config and data, print the plan, train nothing")
    parser.add_argument("--fresh", action="store_true", help="start a new run folder instead of going on with the last")
    cli.add_ids(parser, "--skip", "leave out these checks, by id or group")
    parser.add_argument("--resume-changed", action="store_true", help="go on although config or data changed since")
    return parser.parse_args()


def main() -> None:
    quiet_libraries()
    options = parse()
    terminal = Terminal(options.json)
    skipped = checks.expand("--skip", options.skip)

    config, source = load_config(options.config, options.set)
    terminal.decision("config", source)
    preflight = Preflight(config, read_machine())
    preflight.geometry  # noqa: B018  # a base of another shape is told before anything is written

    run = None if options.dry_run else open_run(config, options.fresh)
    if run and run.finished:
        terminal.say(f"{shown(run.folder)} is finished; --fresh starts a new run beside it")
        refresh.make(run, terminal)  # a kill may have come between the manifest and the page
        print_manifest(run, options.json)
        return

    try:
        if run and run.died:
            terminal.warn(
                f"the start before this one ({run.died}) ended without a word: killed, perhaps for its memory"
            )
        terminal.status(f"reading {config.dataset.train_file}")
        terminal.decision("data", f"{config.dataset.train_file}; {preflight.prepared.split_reason}")
        terminal.table("plan", plan_lines(preflight.plan), preflight.plan.problems)
        make_checks(preflight, skipped, options.dry_run, terminal)
        if run is not None:
            train(preflight, run, skipped, options.resume_changed, terminal)
            print_manifest(run, options.json)
        elif options.json:
            cli.print_json(preflight.plan.as_dict())
    finally:
        terminal.clear()
        if run is not None:
            run.close()


def make_checks(preflight: Preflight, skipped: frozenset[str], dry_run: bool, terminal: Terminal) -> None:
    """What `scripts/validate_environment.py` looks at, too; a dry run looks at data and tokens only."""
    only = ("data", "tokens") if dry_run else ()
    chosen = checks.select(preflight.config.platform, only, skipped | {*checks.TRAINING_DOES})
    results: list[Result] = []
    for result in run_checks(chosen, preflight):
        results.append(result)
        if result.status == "warn":
            show_result(terminal, result)
        following = [check.id for check in chosen[len(results) :]]
        terminal.status(f"checks: {len(results)} of {len(chosen)}", *following[:1])
    terminal.decision("checks", tally(results))
    failed = {
        result.id: f"  {result.id}: {result.detail}\n    {result.fix}" for result in results if result.status == "fail"
    }
    if failed:
        found = "\n".join([f"checks: {len(failed)} failed", *failed.values()])
        raise CheckFailed(found, f"mend that, or leave it out: --skip {','.join(failed)}", between="\n")


def print_manifest(run: Run, wanted: bool) -> None:
    if wanted:
        cli.print_json(read_manifest(run.folder))


def train(preflight: Preflight, run: Run, skipped: frozenset[str], resume_changed: bool, terminal: Terminal) -> None:
    from finetune.model import load
    from finetune.results import export, self_test, show
    from finetune.runs import manifest, resume
    from finetune.training import keeper, progress, samples, stopper, trackers, trainer
    from finetune.training.arguments import training_arguments

    config, prepared, platform = preflight.config, preflight.prepared, preflight.platform
    known = manifest.describe(config, prepared, hardware(platform, preflight.machine))
    plan = preflight.plan.as_dict()
    record = manifest.Manifest(run, known | {"skipped_checks": sorted(skipped), "plan": plan})
    fingerprint = manifest.fingerprint(config, prepared)
    decision = resume.decide(run.checkpoints, fingerprint)
    set_aside = resume.apply(decision, resume_changed, terminal)
    checkpoint = decision.checkpoint
    tracking = trackers.make_trackers(config, run, terminal)

    prepare_device(platform)
    capacity = capacity_gib(platform)
    terminal.status(f"loading {config.model.name}")
    with memory_errors_explained(what_would_fit(config, preflight.geometry, capacity)):
        peft_model = load.load_model(config, platform.device)
    tokenizer = load.make_tokenizer(prepared.chat, config.dataset.padding_side)
    start = self_test.before_training(peft_model)

    over = checkpoint is not None and trainer.is_over(config.training, preflight.plan.steps, checkpoint)
    done = decision.step
    rehearsed = None
    if over or "rehearsal" in skipped:
        pace, choice = Pace(), by_formula(config, preflight.geometry, capacity, "the rehearsal is left out")
        if choice.reason and not over:
            terminal.decision("checkpointed layers", choice.reason)
    else:
        rehearsed = rehearse(preflight, run, peft_model, tokenizer, done, terminal)
        pace, choice = rehearsed.pace, rehearsed.checkpointed
    hours = config.training.time_budget_hours
    budget = None if hours is None else stopper.TimeBudget(hours, pace, seconds_since_start)

    manifest.write_config(run, config, prepared)
    layers = None if over else choice.layers  # after its last step a run computes no layer again
    record.started(decision, set_aside, layers, rehearsed.as_dict() if rehearsed else None)
    out_of_memory = memory_errors_explained(what_would_fit(settled(config, choice), preflight.geometry, capacity))
    with tracking.closed(), refresh.reported(run, terminal), record.recorded(), out_of_memory:
        made = trainer.make_trainer(
            peft_model,
            tokenizer,
            prepared.train.dataset(prepared.sequences),
            prepared.validation.dataset(None),
            config.dataset.train_file,
            training_arguments(config.training, run, [], platform, trainer.evaluates_first(checkpoint)),
            choice.layers,
        )
        for tracker in tracking.all():
            made.add_callback(tracker)
        keeper = keeper.Keeper(run, fingerprint, config.training.save_total_limit, config.training.save_minutes)
        stopper = stopper.Stopper(run, budget)
        sampler = samples.Sampler(
            run.folder,
            prepared.chat,
            samples.questions(config, prepared),
            keeper,
            stopper.signalled,
            terminal,
            tracking.all(),
        )
        peak_now = partial(peak_memory_gib, platform)
        watchers = (keeper, stopper, progress.Progress(terminal, pace, config.tracking.cost_per_hour, peak_now))
        outcome = trainer.train(made, config.training, *watchers, preflight.plan.steps, checkpoint, sampler)

        answers = sampler.finish(peft_model, outcome.best_step, outcome.eval_loss)
        show.show_answers(terminal, answers)
        peak_gib = peak_memory_gib(platform)
        terminal.status("testing the adapter as it was saved")
        proof = export.write_adapter(
            run, config, prepared, peft_model, start, tokenizer, record, outcome, peak_gib, answers
        )
    terminal.decision("self-test", proof.sentence())
    show.show_finished(terminal, run.folder, outcome)


def rehearse(
    preflight: Preflight,
    run: Run,
    peft_model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    done: int,
    terminal: Terminal,
) -> Rehearsal:
    from finetune.training import rehearsal

    config, folder = preflight.config, run.folder / "rehearsal"
    capacity = capacity_gib(preflight.platform)
    terminal.status("rehearsing the largest batches")
    found = rehearsal.rehearse(peft_model, tokenizer, preflight.prepared, config, folder, capacity, done)
    if found.checkpointed.reason:
        terminal.decision("checkpointed layers", found.checkpointed.reason)
    terminal.decision("rehearsal", found.sentence(datetime.now()))
    if config.tracking.cost_per_hour is not None:
        terminal.decision("cost", cost_text(found.hours * config.tracking.cost_per_hour, config.tracking.cost_per_hour))
    budget = check_budget(config.training, found.schedule, found.pace, seconds_since_start())
    if budget:
        terminal.decision("time budget", budget)
    return found


if __name__ == "__main__":
    cli.run(main)
