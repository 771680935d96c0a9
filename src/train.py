"""Train a QLoRA adapter on Mistral-7B-Instruct-v0.2, or print the plan. Run the same command again to resume."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from functools import partial
from typing import Any

from finetune import checks, cli
from finetune.checks.device import same_bits
from finetune.checks.preflight import Preflight
from finetune.checks.show import require_checks
from finetune.config.load import load_config
from finetune.files import shown
from finetune.machine.inspect import read_machine
from finetune.machine.platforms import hardware
from finetune.plan.describe import plan_lines
from finetune.plan.model_shape import read_geometry
from finetune.results.report import refresh
from finetune.runs.folder import Run, open_run, read_manifest
from finetune.terminal import Terminal


def parse() -> argparse.Namespace:
    parser = cli.parser(__doc__ or "", "a config file or a platform (h100, m4, cpu); default: this machine's")
    parser.add_argument("--dry-run", action="store_true", help="check config and data, print the plan, train nothing")
    parser.add_argument("--fresh", action="store_true", help="start a new run instead of resuming the last one")
    cli.add_ids(parser, "--skip", "skip these checks, by id or group")
    parser.add_argument("--resume-changed", action="store_true", help="resume even if config or data changed")
    return parser.parse_args()


def main() -> None:
    cli.quiet_libraries()
    options = parse()
    terminal = Terminal(options.json)
    skipped = checks.expand("--skip", options.skip)

    config, source = load_config(options.config, options.set)
    terminal.decision("config", source)
    preflight = Preflight(config, read_machine(), report=terminal.report())
    geometry = read_geometry(config)  # refuses a base of another shape before anything is written
    if config.lora.init_from is not None:
        from finetune.runs import warm_start

        warm_start.require(config, preflight.chat.format.template, geometry)

    run = None if options.dry_run else open_run(config, options.fresh)
    if run and run.finished:
        terminal.say(f"{shown(run.folder)} is finished; --fresh starts a new run next to it")
        refresh.make(run, terminal)  # a kill may have hit between the manifest and the report
        if options.json:
            cli.print_json(read_manifest(run.folder))
        return

    try:
        if run and run.died:
            terminal.warn(
                f"the previous start ({run.died}) ended without a message; "
                "it was probably killed, possibly out of memory"
            )
        terminal.status(f"reading {config.dataset.train_files_named}")
        terminal.decision("data", f"{config.dataset.train_files_named}; {preflight.prepared.split_reason}")
        terminal.table("plan", plan_lines(preflight.plan), preflight.plan.problems)
        if run is not None and not options.resume_changed:
            from finetune.runs import manifest

            manifest.refuse_changes(run, config, preflight.prepared)
        results = require_checks(preflight, skipped, options.dry_run, terminal)
        if run is not None:
            looked = {"skipped_checks": sorted(skipped), "same_bits": same_bits(results)}
            train(preflight, run, looked, options.resume_changed, terminal)
        if options.json:
            cli.print_json(read_manifest(run.folder) if run else preflight.plan.as_dict())
    finally:
        terminal.clear()
        if run is not None:
            run.close()


def train(preflight: Preflight, run: Run, looked: dict[str, Any], accept_changes: bool, terminal: Terminal) -> None:
    from finetune.results import export, self_test, show
    from finetune.runs import manifest, resume
    from finetune.training import job as training_job
    from finetune.training import recovery, rehearsal, trackers, trainer

    config, prepared, steps = preflight.config, preflight.prepared, preflight.plan.steps
    facts = manifest.describe(config, prepared, hardware(preflight.platform, preflight.machine))
    record = manifest.Manifest(run, facts | looked | {"plan": preflight.plan.as_dict()})
    fingerprint = manifest.fingerprint(config, prepared)
    decision = resume.decide(run.checkpoints, fingerprint)
    set_aside = resume.apply(decision, accept_changes, terminal)
    tracking = trackers.make_trackers(config, run, terminal)

    terminal.status(f"loading {config.model.name}")
    job = training_job.load_job(run, config, prepared, terminal.report())
    untrained = self_test.before_training(job.model)
    outlook = rehearsal.look_ahead(job, decision, steps, "rehearsal" in looked["skipped_checks"], terminal)
    manifest.write_config(run, config, prepared)
    record.started(decision, set_aside, outlook.used, outlook.measured)

    job, seal = outlook.job, {"fingerprint": fingerprint, "used": outlook.used}
    copies = job.copies(terminal)
    copied = nullcontext() if copies is None else copies.finished()
    with copied, tracking.closed(), refresh.reported(run, terminal), record.recorded(), job.memory_explained():
        made = job.trainer(decision.checkpoint, tracking)
        made.recovery = recovery.Recovery(made, terminal, record.memory_ran_out, seal["used"])
        watchers = job.watchers(seal, outlook.pace, tracking.all(), copies, terminal)
        watchers.keeper.describe = partial(export.describe_best, job, record)
        outcome = trainer.train(made, config.training, watchers, steps, decision.checkpoint)
        answers = watchers.final_samples(job.model, outcome)
        show.show_answers(terminal, answers)
        terminal.phase("testing the adapter as it was saved")
        proof = export.write_adapter(job, untrained, record, outcome, answers)
    show.show_self_test(terminal, proof)
    show.show_finished(terminal, run.folder, outcome, job.platform.accelerated)


if __name__ == "__main__":
    cli.run(main)
