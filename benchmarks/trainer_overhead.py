"""Measure what a trainer adds to a step, and a checkpoint's seconds: ours, TRL's SFTTrainer and a bare loop.

    .venv/bin/python benchmarks/trainer_overhead.py --output benchmarks/results/NAME.json

All three use the same random model in NF4 with LoRA, rows, loss function, AdamW, clipping and learning rates, on one
CPU thread, round by round; their losses must agree. Ours has every callback of a training except trackers. A step is
timed from its beginning to that of the next, so it includes reading batches and logging. `tiny` is so small that the
trainer dominates; in `135M`, the demo's, a step is mostly arithmetic. Checkpoints are those of an adapter of
Mistral-7B's size, 41.9 million weights with AdamW's two moments; ours are hashed, and verified when loaded. TRL's
bfloat16 adapters are restored to float32, and its progress bar is off.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import machine
import torch
from memory import DEMO, make_model
from transformers import TrainerCallback, get_scheduler, set_seed
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from finetune.cli import quiet_libraries
from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.data.template import IGNORED
from finetune.machine.platforms import PLATFORMS
from finetune.model import load
from finetune.plan.model_shape import Geometry
from finetune.runs import checkpoints
from finetune.runs.folder import Run
from finetune.terminal import Terminal
from finetune.training import trainer
from finetune.training.arguments import training_arguments
from finetune.training.keeper import Keeper
from finetune.training.progress import Progress
from finetune.training.stopper import Stopper
from finetune.training.totals import Sums

PACKAGES = (*machine.PACKAGES, "accelerate", "safetensors")
# A sixteenth of Mistral-7B in every dimension; with 16 times its rank, the adapter has the 7B's 448 tensors and size.
NARROW, RANK = Geometry(256, 896, 32, 8, 2, 1000, False), 256


@dataclass(frozen=True)
class Case:
    """A model and its steps: `warm` untimed ones, then `steps` timed ones."""

    name: str
    geometry: Geometry
    tokens: int
    micro_batches: int
    warm: int
    steps: int
    rounds: int
    logging_steps: int
    rank: int = 16

    def config(self, folder: Path) -> Config:
        """Return the cpu platform's config without dropout, which would draw different numbers in each variant."""
        settings = {
            "model.name": folder / self.name,
            "model.max_seq_length": self.tokens,
            "lora.r": self.rank,
            "lora.lora_dropout": 0,
            "training.per_device_train_batch_size": 1,
            "training.gradient_accumulation_steps": self.micro_batches,
            "training.gradient_checkpointing": "false",
            "training.max_steps": self.warm + self.steps + 1,
            "training.eval_steps": 1000,
            "training.save_steps": 1000,
            "training.logging_steps": self.logging_steps,
        }
        return load_config("cpu", [f"{key}={value}" for key, value in settings.items()])[0]


CASES = (
    Case("tiny", Geometry(64, 128, 2, 4, 2, 1000, False), 64, 4, warm=10, steps=60, rounds=5, logging_steps=10),
    Case("135M", DEMO, 64, 2, warm=1, steps=2, rounds=3, logging_steps=1),
)
ADAPTER = Case("adapter", NARROW, 32, 1, warm=0, steps=0, rounds=5, logging_steps=1, rank=RANK)
QUICK = (  # everything once
    replace(CASES[0], warm=1, steps=2, rounds=1, logging_steps=1),
    replace(ADAPTER, geometry=CASES[0].geometry, rounds=1, rank=8),
)


class Clock(TrainerCallback):  # type: ignore[misc]
    """Records wall and CPU seconds at the beginning of each step."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def on_step_begin(self, *arguments: Any, **kwargs: Any) -> None:
        self.marks.append((time.perf_counter(), time.process_time()))

    def milliseconds(self, case: Case) -> dict[str, float]:
        """Return the mean milliseconds of a timed step."""
        first, last = self.marks[case.warm], self.marks[case.warm + case.steps]
        wall, cpu = (1000 * (end - begin) / case.steps for begin, end in zip(first, last, strict=True))
        return {"cpu_ms": cpu, "wall_ms": wall}


def rows(case: Case) -> Any:
    """Return copies of one packed row with two documents, so that the losses do not depend on the order."""
    from datasets import Dataset

    ids = [(11 * place) % (case.geometry.vocab_size - 3) + 3 for place in range(case.tokens)]
    labels = [IGNORED if place % 2 else token for place, token in enumerate(ids)]
    half = case.tokens // 2
    row = {"input_ids": ids, "labels": labels, "seq_lengths": [half, case.tokens - half], "lines": [1]}
    return Dataset.from_list([row] * case.micro_batches * (case.warm + case.steps + 1))


def make_ours(case: Case, folder: Path) -> tuple[Any, Config, Keeper]:
    config, run = case.config(folder), Run(folder / "run", False, None)
    run.checkpoints.mkdir(parents=True)
    sft = training_arguments(config.training, run, PLATFORMS["cpu"], evaluate_first=True)
    evaluated = rows(case).select([0]).remove_columns("seq_lengths")
    examples = trainer.Examples(rows(case), evaluated)
    made = trainer.make_trainer(load.load_model(config, "cpu"), machine.tokenizer(), examples, sft, 0)
    keeper = Keeper(run, {}, config.training.save_total_limit, config.training.save_minutes)
    return made, config, keeper


def make_trl(case: Case, folder: Path) -> Any:
    config = case.config(folder)
    training, made = config.training, load.load_model(config, "cpu")
    arguments = SFTConfig(
        output_dir=str(folder / "run" / "checkpoints"), max_steps=training.max_steps, per_device_train_batch_size=1,
        gradient_accumulation_steps=case.micro_batches, learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type, warmup_steps=training.warmup_ratio,
        weight_decay=training.weight_decay, max_grad_norm=training.max_grad_norm, optim=training.optim,
        logging_steps=training.logging_steps, gradient_checkpointing=False, bf16=False, use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="no", remove_unused_columns=False, max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True}, dataloader_pin_memory=False,
    )  # fmt: skip
    weights = {name: value.detach().clone() for name, value in made.named_parameters() if value.requires_grad}
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    given = rows(case).remove_columns("lines")
    sft = SFTTrainer(
        model=made, args=arguments, data_collator=collator, train_dataset=given, processing_class=machine.tokenizer()
    )
    for name, value in made.named_parameters():
        if value.requires_grad:
            value.data = weights[name]
    return sft


def progress() -> Progress:
    """Return a training's progress that is shown nowhere."""
    return Progress(Terminal(stream=StringIO()))


def ours(case: Case, folder: Path, clock: Clock) -> float:
    """Train with our trainer; return the mean loss up to the first log."""
    made, config, keeper = make_ours(case, folder)
    made.add_callback(clock)
    steps = config.training.max_steps
    watchers = trainer.Watchers(keeper, Stopper(keeper.run), progress())
    trainer.train(made, config.training, watchers, steps, None)
    return first_loss(made)


def trl(case: Case, folder: Path, clock: Clock) -> float:
    """Train with TRL; return the mean loss up to the first log."""
    made = make_trl(case, folder)
    made.add_callback(clock)
    made.train()
    return first_loss(made)


def first_loss(made: Any) -> float:
    return float(next(entry["loss"] for entry in made.state.log_history if "loss" in entry))


def bare(case: Case, folder: Path, clock: Clock) -> float:
    """Train with a loop that does only what a training must; return the mean loss up to the first log."""
    config = case.config(folder)
    training, made = config.training, load.load_model(config, "cpu")
    add_fused_lm_head(made.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    parameters = [value for value in made.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=training.weight_decay)
    warmup = math.ceil(training.warmup_ratio * training.max_steps)
    scheduler = get_scheduler(training.lr_scheduler_type, optimizer, warmup, training.max_steps)
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    given = rows(case).remove_columns("lines")
    batches = iter(torch.utils.data.DataLoader(given, batch_size=1, collate_fn=collator))
    losses: list[float] = []
    loss_sum = torch.zeros(())
    made.train()
    for step in range(1, training.max_steps + 1):
        window = [next(batches) for _ in range(case.micro_batches)]
        supervised = sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in window)
        clock.on_step_begin()
        for batch in window:
            outputs = made(**batch, use_cache=False, fused_lm_head=True)
            loss = -outputs.log_probs.sum() / supervised
            loss.backward()
            loss_sum += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % case.logging_steps == 0:
            losses.append(loss_sum.item() / case.logging_steps)
            loss_sum.zero_()
    return losses[0]


VARIANTS: dict[str, Callable[[Case, Path, Clock], float]] = {"bare loop": bare, "ours": ours, "TRL": trl}


def measure_steps(case: Case) -> dict[str, Any]:
    """Return the milliseconds of a step for each variant. Exits if their losses differ."""

    def measure(name: str) -> dict[str, float]:
        clock = Clock()
        with model_folder(case) as folder:
            loss = VARIANTS[name](case, Path(folder), clock)
        return {**clock.milliseconds(case), "loss": loss}

    rounds = machine.in_rounds(case.rounds, VARIANTS, measure)
    losses = [result["loss"] for results in rounds.values() for result in results]
    if max(losses) - min(losses) > 1e-4 * max(losses):
        raise SystemExit(f"{case.name}: the losses of the variants differ: {losses}")
    return {**summarize(rounds, ("cpu_ms", "wall_ms")), "rounds": rounds}


def model_folder(case: Case) -> tempfile.TemporaryDirectory[str]:
    """Return a new folder with the case's random model, removed at the end of `with`."""
    folder = tempfile.TemporaryDirectory(prefix="overhead-")
    make_model(case.geometry, "float32", Path(folder.name) / case.name)
    set_seed(0)
    return folder


def summarize(rounds: dict[str, list[dict[str, float]]], clocks: tuple[str, ...]) -> dict[str, Any]:
    """Return medians, and each variant's ratio to the first by the first clock: the median over the rounds."""
    medians = {
        name: {clock: round(statistics.median(result[clock] for result in results), 3) for clock in clocks}
        for name, results in rounds.items()
    }
    clock = clocks[0]
    reference, *others = rounds
    ratios = {}
    for name in others:
        pairs = zip(rounds[name], rounds[reference], strict=True)
        ratio = statistics.median(here[clock] / there[clock] for here, there in pairs)
        ratios[f"{name} / {reference}"] = round(ratio, 4)
    return {"medians": medians, "ratios": ratios}


def measure_checkpoints(case: Case) -> dict[str, Any]:
    """Return the wall seconds of saving a checkpoint and of loading it, after one step of training."""
    with model_folder(case) as first, model_folder(case) as second:
        plain, (made, _, keeper) = make_trl(case, Path(first)), make_ours(case, Path(second))
        made.add_callback(keeper)
        made.add_callback(Sums(made, progress()))
        trainers = {"TRL": plain, "ours": made}
        for one in trainers.values():
            one.train()
        rounds = machine.in_rounds(case.rounds, trainers, partial(checkpoint_seconds, trainers))
    return {**summarize(rounds, ("save", "load")), "rounds": rounds}


def checkpoint_seconds(trainers: dict[str, Any], name: str) -> dict[str, float]:
    """Return the seconds to save and load a checkpoint, and its MiB; loading ours includes verifying its hashes."""
    made = trainers[name]
    folder = Path(made.args.output_dir) / f"checkpoint-{made.state.global_step}"
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()  # this save must not wait for earlier writes
    started = time.perf_counter()
    made._save_checkpoint(made.model, None)
    made.callback_handler.on_save(made.args, made.state, made.control)
    save = time.perf_counter() - started
    mib = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    started = time.perf_counter()
    if name == "ours":
        assert checkpoints.damage(folder) is None
    made._load_from_checkpoint(str(folder))
    made._load_optimizer_and_scheduler(str(folder))
    made._load_rng_state(str(folder))
    load = time.perf_counter() - started
    return {"save": round(save, 3), "load": round(load, 3), "mib": round(mib, 1)}


def main() -> None:
    parser = machine.parser(__doc__)
    names = [case.name for case in (*CASES, ADAPTER)]
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--only", choices=names, help="one of the three parts")
    part.add_argument("--quick", action="store_true", help="few steps and a small adapter, to test the benchmark")
    options = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    chosen = [case for case in (QUICK if options.quick else (*CASES, ADAPTER)) if options.only in (None, case.name)]
    found = {case.name: (measure_checkpoints if case.name == ADAPTER.name else measure_steps)(case) for case in chosen}
    for name, result in found.items():
        print(name, json.dumps({key: result[key] for key in ("medians", "ratios")}, indent=2))
    asked = f" --only {options.only}" if options.only else " --quick" * options.quick
    machine.record(options.output, f"benchmarks/trainer_overhead.py{asked}", PACKAGES, **found)


if __name__ == "__main__":
    main()
