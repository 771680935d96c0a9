"""Train a QLoRA adapter on Mistral-7B-Instruct-v0.2, or say what a run would do. The same command again resumes."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from finetune import cli
from finetune.config import Config, is_local, load, resolve
from finetune.geometry import read_geometry
from finetune.plan import make_plan
from finetune.platforms import (
    PLATFORMS,
    Machine,
    hardware,
    memory_errors_explained,
    peak_memory_gib,
    prepare_device,
    read_machine,
)
from finetune.report import Terminal, quiet_libraries
from finetune.runs import Run, open_run

if TYPE_CHECKING:
    from finetune.data import Prepared


def parse() -> argparse.Namespace:
    parser = cli.parser(__doc__ or "", "a config file or a platform (h100, m4, cpu); default: what this machine is")
    parser.add_argument("--dry-run", action="store_true", help="check config and data, print the plan, train nothing")
    parser.add_argument("--fresh", action="store_true", help="start a new run folder instead of going on with the last")
    parser.add_argument("--resume-changed", action="store_true", help="go on although config or data changed since")
    return parser.parse_args()


def main() -> None:
    options = parse()
    terminal = Terminal(options.json)

    config, source = load(options.config, options.set)
    terminal.decision("config", source)
    geometry, machine = read_geometry(config), read_machine()

    run = None if options.dry_run else open_run(config, options.fresh)
    if run and run.finished:
        terminal.say(f"{run.folder} is finished; --fresh starts a new run beside it")
        print_manifest(run, options.json)
        return

    try:
        prepared = prepare_data(config, terminal)
        sequences = len(prepared.sequences if prepared.sequences is not None else prepared.train.lengths)
        counts = prepared.statistics
        plan = make_plan(config, counts["train"], counts["validation"], sequences, geometry, machine)
        terminal.plan(plan)
        if run is not None:
            train(config, run, prepared, plan.steps, machine, terminal, options)
            print_manifest(run, options.json)
        elif options.json:
            cli.print_json(plan.as_dict())
    finally:
        if run is not None:
            run.drop_if_unused()


def print_manifest(run: Run, wanted: bool) -> None:
    if wanted:
        cli.print_json(json.loads((run.folder / "manifest.json").read_text(encoding="utf-8")))


def prepare_data(config: Config, terminal: Terminal) -> Prepared:
    from finetune.data import prepare
    from finetune.encoding import Recipe

    recipe = Recipe(
        tokenizer_folder=str(resolve(config.model.name)) if is_local(config.model.name) else None,
        system_prompt=config.system_prompt,
        max_seq_length=config.model.max_seq_length,
        truncation=config.dataset.truncation,
        certificate=config.dataset.certificate,
    )
    cache = resolve(config.output.dir) / ".cache"
    prepared = prepare(config.dataset, recipe, config.training.packing, cache)
    terminal.decision("data", f"{config.dataset.train_file}; {prepared.split_reason}")
    for name, counts in prepared.statistics.items():
        if counts.duplicates:
            terminal.warn(f"{counts.duplicates} {name} rows are copies of another row")
        if counts.dropped_bad:
            terminal.warn(f"{counts.dropped_bad} bad {name} rows dropped; the manifest lists them")
    return prepared


def train(
    config: Config,
    run: Run,
    prepared: Prepared,
    steps: int,
    machine: Machine,
    terminal: Terminal,
    options: argparse.Namespace,
) -> None:
    quiet_libraries()
    from finetune import callbacks, export, model, resume, trainer

    platform = PLATFORMS[config.platform]
    known = export.describe(config, prepared, hardware(platform, machine))
    fingerprint = export.fingerprint(config, prepared)
    checkpoint = resume.find(run, fingerprint, options.resume_changed, terminal)
    report_to, offline = trainer.tracker_settings(config.tracking, run)
    if offline:
        terminal.decision("tracking", offline)

    with memory_errors_explained():
        prepare_device(platform)
        base = model.load_base(config.model, config.quantization, platform.device)
        peft_model = model.add_lora(base, config.lora, config.training.seed)
        tokenizer = model.make_tokenizer(prepared.chat, config.dataset.padding_side)

    export.write_start(run, config, known)
    with export.recorded(run, known), memory_errors_explained():
        made = trainer.make_trainer(
            peft_model,
            tokenizer,
            prepared.train.dataset(prepared.sequences),
            prepared.validation.dataset(None),
            config.dataset.train_file,
            trainer.arguments(config.training, run, report_to, platform, from_start=checkpoint is None),
        )
        watchers = (
            callbacks.Keeper(run, fingerprint, config.training.save_total_limit),
            callbacks.Stopper(run),
            callbacks.Progress(terminal.stream),
        )
        outcome = trainer.train(made, config.training, *watchers, steps, checkpoint)

        samples = model.compare_answers(peft_model, prepared.chat, config.dataset.sample_prompts, config.system_prompt)
        export.write_adapter(run, config, peft_model, tokenizer, known, outcome, peak_memory_gib(platform), samples)
    terminal.answers(samples)
    terminal.finished(run.folder, outcome)


if __name__ == "__main__":
    cli.run(main)
