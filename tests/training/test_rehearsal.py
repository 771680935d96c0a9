"""The rehearsal: the worst batches go the real way, what is measured is told, and afterwards nothing is different."""

from __future__ import annotations

import errno
import itertools
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from finetune.config.schema import Config
from finetune.data.batches import Load, example_lengths, train_load, validation_load
from finetune.errors import CheckFailed, ConfigError, Diverged, OutOfResource
from finetune.files import seal
from finetune.machine import device as devices
from finetune.machine.inspect import read_machine
from finetune.machine.platforms import PLATFORMS
from finetune.model.load import load_base
from finetune.plan import fit
from finetune.plan.checkpointed_layers import Choice
from finetune.plan.memory import checkpointed_layers
from finetune.plan.model_shape import read_geometry
from finetune.plan.schedule import Pace, Schedule
from finetune.terminal import Terminal
from finetune.training import short_training
from finetune.training.arguments import training_arguments
from finetune.training.autotune import Variant
from finetune.training.keeper import Keeper
from finetune.training.progress import Progress
from finetune.training.rehearsal import Rehearsal
from finetune.training.stopper import Stopper
from finetune.training.trainer import Examples, Trainer, Watchers, make_trainer, train
from support.rehearsals import CPU, DROPOUT, KINDS, PLENTY_GIB, attributes, loaded, rehearsed
from support.training import FACTS, Case, adapter_weights, same

CONFIG: Any = None  # which the sentences below do not need


# --- which batches


def test_the_worst_batch_is_the_longest_rows() -> None:
    lengths = np.array([3, 9, 4, 9, 1, 7])
    load = train_load(lengths, 2, flat=False)
    assert (load.worst, load.worst_tokens) == ([1, 3], 18)
    longest = [max(pair) for pair in itertools.combinations(lengths.tolist(), 2)]
    assert load.tokens == pytest.approx(len(lengths) * sum(longest) / len(longest))


def test_packed_sequences_are_laid_end_to_end_so_that_nothing_is_padded() -> None:
    assert train_load(np.array([60, 64, 50, 64]), 2, flat=True) == Load([1, 3], 128, 238.0)


def test_a_batch_larger_than_the_data_is_all_of_the_data() -> None:
    assert train_load(np.array([5, 6]), 8, flat=False) == Load([1, 0], 12, 12.0)
    assert validation_load(np.array([5, 6]), 8) == Load([1, 0], 12, 12)


def test_validation_rows_are_batched_in_their_order() -> None:
    assert validation_load(np.array([5, 2, 8, 8, 3]), 2) == Load([2, 3], 16, 2 * 5 + 2 * 8 + 3)


@pytest.mark.parametrize("packing", ["true", "false"])
def test_the_real_trainer_gets_the_worst_batches_of_the_run(
    case: Case, monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
    settings = (f"training.packing={packing}", "training.gradient_accumulation_steps=2")
    config = case.config(*settings, "training.per_device_train_batch_size=5", "training.per_device_eval_batch_size=3")
    seen: list[tuple[bool, list[int], bool]] = []
    compute_loss = Trainer.compute_loss

    def spy(self: Trainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        gradients = any(parameter.grad is not None for parameter in model.parameters())
        seen.append((model.training, list(inputs["lines"]), gradients))
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "compute_loss", spy)
    rehearsed(case, config, loaded(config))
    data = case.data(config)
    order = np.argsort(-example_lengths(data), kind="stable")[:5].tolist()
    groups = data.sequences if data.sequences is not None else [[row] for row in range(len(data.train.lengths))]
    worst = [str(data.train.row(row)[0]) for index in order for row in groups[index]]
    held_out = np.argsort(-data.validation.lengths, kind="stable")[:3].tolist()
    longest = [str(data.validation.row(row)[0]) for row in held_out]
    # Gradients of earlier micro-batches lie in memory, as they do in the run itself.
    assert seen == [(True, worst, True), (True, worst, True), (False, longest, False)]


# --- what is measured


def test_the_pace_is_that_of_a_mean_step_with_all_its_micro_batches(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("training.gradient_accumulation_steps=3", "training.per_device_train_batch_size=2")
    config = case.config(*settings, "training.packing=true", "training.max_steps=100", "training.eval_steps=10")
    clock = itertools.count(step=2.0)
    monkeypatch.setattr(short_training, "time", SimpleNamespace(monotonic=clock.__next__))
    monkeypatch.setattr(short_training, "peak_memory_gib", lambda _: 3.0)
    monkeypatch.setattr(short_training, "paged_gib", lambda _: 0.2)
    found = rehearsed(case, config, loaded(config), done=20)
    data = case.data(config)
    lengths = example_lengths(data)
    steps_per_epoch = -(-len(lengths) // 6)
    batches_of_two = train_load(lengths, 2, flat=False)  # sdpa's
    assert batches_of_two.worst_tokens == 2 * lengths.max()
    two_longest = np.sort(lengths)[-2:].sum()
    step = (
        2.0 * batches_of_two.tokens / batches_of_two.worst_tokens / steps_per_epoch + 2.0
    )  # each thing timed takes 2 s
    rows, size = data.validation.lengths, config.training.per_device_eval_batch_size
    batches = [rows[first : first + size] for first in range(0, len(rows), size)]
    all_rows = sum(batch.max() * len(batch) for batch in batches)
    heaviest = rows.max() * min(size, len(rows))
    assert found == Rehearsal(
        peak_gib=3.0,
        left_gib=0.2,
        capacity_gib=PLENTY_GIB,
        pace=Pace(pytest.approx(step), pytest.approx(2.0 * all_rows / heaviest), 2.0),
        tokens_per_second=pytest.approx(lengths.sum() / steps_per_epoch / step),
        schedule=Schedule(20, 100, steps_per_epoch, 10, config.training.save_steps),
        checkpointed=Choice(0),
        config=config,
        variants=(
            Variant("plain; 0 of 2 layers checkpointed", pytest.approx(two_longest / 2.0, abs=0.1), None, "used"),
        ),
    )


@pytest.mark.parametrize(
    ("step_seconds", "sentence"),
    [
        (2.7, "peak 21.3 of 79.1 GiB, 2.7 s a step, 61 min for 1,250 steps, finished about 16:14 UTC"),
        (0.0312, "peak 21.3 of 79.1 GiB, 0.031 s a step, 5 min for 1,250 steps, finished about 15:19 UTC"),
        (28.8, "peak 21.3 of 79.1 GiB, 28.8 s a step, 10.1 h for 1,250 steps, finished about Tue 01:18 UTC"),
        (720.0, "peak 21.3 of 79.1 GiB, 720.0 s a step, 250.1 h for 1,250 steps, finished about 14 Mar 01:18 UTC"),
    ],
)
def test_the_sentence_says_memory_speed_and_when_it_will_be_over(step_seconds: float, sentence: str) -> None:
    schedule = Schedule(done=0, steps=1250, steps_per_epoch=500, eval_steps=250, save_steps=500)
    found = Rehearsal(
        21.3, 0.2, 79.1, Pace(step_seconds, 40, 10), 20_000, schedule, Choice(32), CONFIG, ()
    )  # 6 evaluations and 3 saves: 270 s
    assert found.sentence(datetime(2025, 3, 3, 15, 14, tzinfo=UTC)) == sentence


def test_what_remains_of_a_run_that_goes_on_is_told() -> None:
    found = Rehearsal(1, 0, 2, Pace(60, 0, 0), 1, Schedule(99, 100, 10, 10, 10), Choice(32), CONFIG, ())
    now = datetime(2025, 3, 3, 15, 14, tzinfo=UTC)
    assert found.sentence(now) == "peak 1.0 of 2.0 GiB, 60.0 s a step, 60 s for 1 step, finished about 15:15 UTC"


def trained(case: Case, config: Config, rehearsal_first: bool, checkpoint: Path | None = None) -> dict[str, Any]:
    """The adapter and what was logged of a training as train.py does it."""
    model = loaded(config)
    if rehearsal_first:
        rehearsed(case, config, model, done=2 if checkpoint else 0)
    data = case.data(config)
    sft = training_arguments(config.training, case.run, CPU, evaluate_first=checkpoint is None)
    rows, held_out = data.train.dataset(data.sequences), data.validation.dataset(None)
    layers = checkpointed_layers(config, read_geometry(config))
    made = make_trainer(model, case.tokenizer, Examples(rows, held_out), sft, layers)
    keeper = Keeper(case.run, FACTS, config.training.save_total_limit)
    watchers = Watchers(keeper, Stopper(case.run), Progress(Terminal(stream=StringIO())))
    train(made, config.training, watchers, 4, checkpoint)
    names = ("step", "loss", "eval_loss", "learning_rate", "grad_norm")
    logged = [{name: entry[name] for name in names if name in entry} for entry in case.metrics()]
    return {"logged": logged, "adapter": adapter_weights(model)}


@pytest.mark.parametrize(
    "kind", [kind if kind == "packed" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_a_run_after_a_rehearsal_has_the_same_bits_as_one_without_also_where_it_goes_on(case: Case, kind: str) -> None:
    config = case.config(*DROPOUT, "training.save_steps=2", *KINDS[kind])
    without = trained(case, config, rehearsal_first=False)
    assert len([entry for entry in without["logged"] if "loss" in entry]) == 4
    gone_on = trained(case, config, rehearsal_first=True, checkpoint=case.run.checkpoints / "checkpoint-2")
    assert gone_on["logged"] == without["logged"]
    assert same(gone_on["adapter"], without["adapter"])
    shutil.rmtree(case.run.folder)
    case.run.checkpoints.mkdir(parents=True)
    after = trained(case, config, rehearsal_first=True)
    assert after["logged"] == without["logged"]
    assert same(after["adapter"], without["adapter"])
    assert sorted(path.name for path in case.run.folder.iterdir()) == ["checkpoints", "metrics.jsonl"]


def test_the_capacity_is_free_memory_and_what_this_process_holds_within_its_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = read_machine()
    held_gib = psutil.Process().memory_info().rss / 2**30
    monkeypatch.setattr(devices, "read_machine", lambda: replace(machine, memory_free_gib=5.0, memory_limit_gib=None))
    assert devices.capacity_gib(CPU) == pytest.approx(5.0 + held_gib, rel=0.05)
    monkeypatch.setattr(devices, "read_machine", lambda: replace(machine, memory_free_gib=5.0, memory_limit_gib=4.5))
    assert devices.capacity_gib(CPU) == 4.5
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 12 * 2**30)
    assert devices.capacity_gib(PLATFORMS["h100"]) == 72.0


# --- what it refuses


def fails(case: Case, config: Config, capacity_gib: float = PLENTY_GIB) -> Exception:
    """How a rehearsal ends; the model is as before, and nothing is left in the run's folder."""
    model = loaded(config)
    before, weights = attributes(model), adapter_weights(model)
    with pytest.raises((CheckFailed, OutOfResource, Diverged, ConfigError)) as refused:
        rehearsed(case, config, model, capacity_gib)
    assert attributes(model)[:-3] == before[:-3]
    assert same(adapter_weights(model), weights)
    assert [path.name for path in case.run.folder.iterdir()] == ["checkpoints"]
    case.run.drop_if_unused()
    assert not case.run.folder.exists()
    return refused.value


CHANGE = "what would fit: A CHANGE\n  --set lora.r=8 --set model.max_seq_length=16"


@pytest.fixture
def advice(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float | None]]:
    """(capacity, measured peak) of each time that a change is asked for; the answer is always the same."""
    asked: list[tuple[float, float | None]] = []

    def change(_config: Config, _geometry: Any, capacity_gib: float, measured_gib: float | None) -> fit.Change | None:
        asked.append((capacity_gib, measured_gib))
        return fit.Change(("lora.r=8", "model.max_seq_length=16"), 1.0, "A CHANGE")

    monkeypatch.setattr(fit, "smallest_change", change)
    return asked


def test_a_peak_above_what_there_is_is_refused_with_a_change_that_fits(
    case: Case, monkeypatch: pytest.MonkeyPatch, advice: list[tuple[float, float | None]]
) -> None:
    peaks = iter([1.5, 2.5])
    monkeypatch.setattr(short_training, "peak_memory_gib", lambda _: next(peaks))
    refused = fails(case, case.config(), capacity_gib=2.0)
    assert str(refused) == f"rehearsal: peak 2.5 GiB, and there are 2.0 GiB; {CHANGE}"
    assert (refused.exit_code, advice) == (6, [(2.0, 2.5)])


def test_where_no_change_would_fit_it_says_so(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([1.5, 2.5])
    monkeypatch.setattr(short_training, "peak_memory_gib", lambda _: next(peaks))
    monkeypatch.setattr(fit, "smallest_change", lambda *_: None)
    assert str(fails(case, case.config(), capacity_gib=0.25)) == (
        "rehearsal: peak 2.5 GiB, and there are 0.2 GiB; "
        "no change to the config is enough; use a machine with more memory"
    )


def test_a_peak_that_the_loading_reached_and_passed_is_no_reason_to_refuse(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(short_training, "peak_memory_gib", lambda _: 2.5)
    config = case.config()
    assert rehearsed(case, config, loaded(config), capacity_gib=2.0).peak_gib == 2.5


@pytest.mark.parametrize(
    ("training", "raised", "found"),
    [
        (
            True,
            RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
            "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB.",
        ),
        (False, MemoryError(), "out of memory"),
    ],
    ids=["of a device, in a step", "of the host, in an evaluation"],
)
def test_memory_that_runs_out_is_told_with_a_change_that_fits(
    case: Case,
    monkeypatch: pytest.MonkeyPatch,
    advice: list[tuple[float, float | None]],
    training: bool,
    raised: Exception,
    found: str,
) -> None:
    compute_loss = Trainer.compute_loss

    def full(self: Trainer, model: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training == training:
            raise raised
        return compute_loss(self, model, *args, **kwargs)

    monkeypatch.setattr(Trainer, "compute_loss", full)
    refused = fails(case, case.config(), capacity_gib=80.0)
    assert str(refused) == f"rehearsal: {found}, and there are 80.0 GiB; {CHANGE}"
    assert refused.exit_code == 6
    [(capacity, measured)] = advice
    assert capacity == 80.0
    assert measured is not None and 80.0 < measured < 80.001  # how much it would have been, nobody knows


def test_a_bug_is_not_taken_for_memory_or_disk(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Trainer, "compute_loss", broken)
    config = case.config()
    with pytest.raises(RuntimeError, match=r"^shapes do not match$"):
        rehearsed(case, config, loaded(config))
    assert [path.name for path in case.run.folder.iterdir()] == ["checkpoints"]


def save_raises(error: Exception) -> Callable[..., None]:
    def save(*_args: Any, **_kwargs: Any) -> None:
        raise error

    return save


def test_a_disk_too_small_for_a_checkpoint_is_told_before_it_is_written(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "_save", save_raises(AssertionError("written all the same")))
    usage = SimpleNamespace(free=2**19)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    config = case.config("lora.r=64")
    mib = 12 * sum(value.numel() for value in adapter_weights(loaded(config)).values()) / 2**20
    refused = fails(case, config)
    assert str(refused) == (
        f"rehearsal: no space left: {case.run.folder}/rehearsal/checkpoints has 0.5 MiB free, a save takes {mib:.1f}; "
        "free some, then type the same command again"
    )
    assert refused.exit_code == 6  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "error", [PermissionError(errno.EACCES, "Permission denied"), RuntimeError("unexpected pos 64 vs 0")]
)
def test_a_save_that_fails_is_told_with_what_the_library_says_and_the_sizes(
    case: Case, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(Trainer, "_save", save_raises(error))
    usage = SimpleNamespace(free=500 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    refused = fails(case, case.config())
    sizes = f"{case.run.folder}/rehearsal/checkpoints has 500.0 MiB free, a save takes 0.4"
    assert str(refused) == f"rehearsal: cannot save: {error} ({sizes}); fix that, then type the same command again"
    assert refused.exit_code == 6  # type: ignore[attr-defined]


def test_a_checkpoint_whose_bytes_change_on_the_way_is_refused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(folder: Path, facts: dict[str, Any]) -> None:
        seal(folder, facts)
        path = folder / "optimizer.pt"
        path.write_bytes(path.read_bytes()[:-1])

    monkeypatch.setattr(short_training, "seal", damaged)
    refused = fails(case, case.config())
    assert (refused.exit_code, str(refused)) == (
        3,
        f"rehearsal: a checkpoint saved in {case.run.folder} is damaged: "
        "optimizer.pt is not what was saved (sha256 differs)",
    )


@pytest.mark.parametrize(
    ("method", "wrong"),
    [
        ("_load_from_checkpoint", "the adapter's weights"),
        ("_load_optimizer_and_scheduler", "the optimizer's states"),
    ],
)
def test_a_checkpoint_that_does_not_load_back_as_it_was_saved_is_refused(
    case: Case, monkeypatch: pytest.MonkeyPatch, method: str, wrong: str
) -> None:
    monkeypatch.setattr(Trainer, method, lambda *_args: None)
    refused = fails(case, case.config())
    text = f"rehearsal: a checkpoint does not load back as it was saved: {wrong} differ"
    assert (refused.exit_code, str(refused)) == (3, text)


def test_a_learning_rate_that_does_not_come_back_is_refused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Trainer._load_optimizer_and_scheduler

    def without_schedule(self: Trainer, checkpoint: str) -> None:
        before = self.lr_scheduler.state_dict()
        load(self, checkpoint)
        self.lr_scheduler.load_state_dict(before)

    monkeypatch.setattr(Trainer, "_load_optimizer_and_scheduler", without_schedule)
    text = "rehearsal: a checkpoint does not load back as it was saved: the learning rate's states differ"
    assert str(fails(case, case.config())) == text


def test_a_loss_that_is_not_finite_is_told_before_the_run_begins(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    load = load_base

    def infinite(*args: Any) -> Any:
        base = load(*args)
        base.model.norm.weight.data[0] = float("inf")
        return base

    monkeypatch.setattr("support.rehearsals.load_base", infinite)
    refused = fails(case, case.config("training.packing=false", "training.per_device_train_batch_size=1"))
    assert str(refused).startswith(f"rehearsal: step 1: the loss is not a finite number on rows {case.train_file}:")
    assert refused.exit_code == 5


def test_what_a_killed_rehearsal_left_is_removed_before_the_next(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    left = case.run.folder / "rehearsal" / "checkpoints" / "checkpoint-2"
    left.mkdir(parents=True)
    (left / "half").write_text("half")
    sealed: list[str] = []

    def listing(folder: Path, facts: dict[str, Any]) -> None:
        sealed.extend(path.name for path in folder.iterdir())
        seal(folder, facts)

    monkeypatch.setattr(short_training, "seal", listing)
    config = case.config()
    rehearsed(case, config, loaded(config))
    assert "optimizer.pt" in sealed
    assert "half" not in sealed
    assert [path.name for path in case.run.folder.iterdir()] == ["checkpoints"]
