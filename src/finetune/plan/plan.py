"""What a run costs, by arithmetic: steps, evaluations, memory, disk. Needs no GPU, weights or network."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from finetune.files import GIB
from finetune.machine.inspect import Machine
from finetune.machine.platforms import PLATFORMS, Expectation, memory_available_gib, memory_limits
from finetune.plan import throughput
from finetune.plan.automatic import settled
from finetune.plan.checkpointed_layers import by_formula
from finetune.plan.fit import Fitting, compare
from finetune.plan.memory import lora_parameters, memory_parts
from finetune.plan.model_shape import MISTRAL_7B, Geometry
from finetune.wording import counted

if TYPE_CHECKING:
    from finetune.config.schema import Config

BEFORE = "a rehearsal decides"  # until then, the plan has only the formula
LEAST_FULL = 0.8  # share of unpacked batches that is not padding; below it, packing is worth it
MOST_EVALUATED = 1 / 3  # of the training's tokens
LEAST_EVALUATED = 100  # rows
EVALUATION_SPEED = 3  # against training, by arithmetic: forward only, without recomputation and backward


class RowCounts(Protocol):
    """What the plan reads of `data.encode.Statistics`."""

    rows: int
    tokens: int
    supervised_tokens: int
    truncated: int
    dropped_long: int
    dropped_without_loss: int
    dropped_bad: int
    dropped_duplicates: int
    encoded: int
    certified: int


@dataclass(frozen=True)
class Data:
    """The data to train and evaluate on.

    `sequences` counts training examples: packed ones with packing, else rows. `batch_tokens` is the size of an epoch's
    batches, including padding. An evaluation reads `evaluated_rows` validation rows with `evaluated_tokens` tokens.
    """

    train: RowCounts
    validation: RowCounts
    sequences: int
    batch_tokens: float
    evaluated_rows: int
    evaluated_tokens: int


@dataclass(frozen=True)
class Plan:
    """The numbers of `--dry-run --json`. Memory and disk in GiB; `memory_parts` adds up to `peak_memory_gib`.

    `packing_efficiency` is the share of an epoch's batches that is not padding; with packing, of full sequences.
    `tokens_evaluated` counts all evaluations. `hours` is None if no file in benchmarks/results has measured such a run;
    else `hours_from` names file and machine. `hours_expected` (least, most) is by the arithmetic in
    `hours_expected_from`, for Mistral-7B on a platform with an expectation. `checkpointed_from` is the reason for the
    number of checkpointed layers, if the config has `auto`. `working_set_gib` is what a Mac's GPU may use before macOS
    swaps, and `specified_memory_gb` an early estimate of the peak there (least, most). `problems` are things to change
    before a long run, each with what to type.
    """

    rows_train: int
    rows_validation: int
    rows_evaluated: int
    tokens_train: int
    supervised_tokens_train: int
    rows_truncated: int
    rows_dropped: int
    sequences_train: int
    packing_efficiency: float
    effective_batch_size: int
    steps_per_epoch: int
    steps: int
    warmup_steps: int
    evaluations: int
    tokens_evaluated: int
    checkpoints: int
    peak_memory_gib: float
    memory_parts: dict[str, float]
    memory_available_gib: float | None
    disk_gib: float
    hours: float | None
    certificate: dict[str, int]
    problems: list[str]
    checkpointed_layers: int
    hours_from: str | None = None
    hours_expected: tuple[float, float] | None = None
    hours_expected_from: str | None = None
    checkpointed_from: str | None = None
    cost_per_hour: float | None = None
    working_set_gib: float | None = None
    specified_memory_gb: tuple[int, int] | None = None

    @property
    def cost(self) -> float | None:
        """The cost of `hours`, in the currency of `tracking.cost_per_hour`."""
        return None if self.hours is None or self.cost_per_hour is None else self.hours * self.cost_per_hour

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    def schedule_problem(self, eval_steps: int) -> tuple[str, str] | None:
        """What is wrong and what to type, if no evaluation falls inside the run."""
        if self.steps >= eval_steps:
            return None
        every = max(1, self.steps // 5)
        found = f"{self.steps} steps, but training.eval_steps is {eval_steps}: evaluated only before and after"
        return found, f"--set training.eval_steps={every} --set training.save_steps={every} evaluates every {every}"


def make_plan(
    config: Config,
    data: Data,
    geometry: Geometry,
    machine: Machine,
    working_set_gib: float | None = None,
) -> Plan:
    """The plan of a run over `data`.

    Memory is enough if the peak is within free memory and, on a Mac, within `working_set_gib`.
    """
    limits = memory_limits(PLATFORMS[config.platform], machine, working_set_gib)
    layers = by_formula(config, geometry, min(limits.values(), default=PLATFORMS[config.platform].memory_gib), BEFORE)
    speed = throughput.find(config, geometry)
    config = settled(config, {"checkpointed_layers": layers.layers})
    plan = Plan(
        **_rows(data),
        **_schedule(config, data),
        **_memory(config, geometry, machine, working_set_gib),
        checkpointed_layers=layers.layers,
        checkpointed_from=layers.reason,
        disk_gib=round(disk_bytes(config, geometry, data.train.tokens + data.validation.tokens) / GIB, 2),
        hours=None,
        cost_per_hour=config.tracking.cost_per_hour,
        problems=[],
    )
    plan = dataclasses.replace(plan, **_hours(plan, config, geometry, machine, speed))
    return dataclasses.replace(plan, problems=_problems(plan, config, compare(config, geometry, limits)))


def _rows(data: Data) -> dict[str, Any]:
    """The plan's figures of rows, tokens and certificate."""
    train, validation = data.train, data.validation
    return {
        "rows_train": train.rows,
        "rows_validation": validation.rows,
        "rows_evaluated": data.evaluated_rows,
        "tokens_train": train.tokens,
        "supervised_tokens_train": train.supervised_tokens,
        "rows_truncated": train.truncated + validation.truncated,
        "rows_dropped": _dropped(train) + _dropped(validation),
        "certificate": {
            "rows": train.certified + validation.certified,
            "of": train.encoded + validation.encoded,
            "mismatches": 0,
        },
    }


def _schedule(config: Config, data: Data) -> dict[str, Any]:
    """The plan's figures of sequences, steps, evaluations and checkpoints."""
    training = config.training
    steps_per_epoch, steps = count_steps(config, data.sequences)
    evaluations = 1 + math.ceil(steps / training.eval_steps)  # before the first step, and always after the last
    room = config.model.max_seq_length * data.sequences if training.packing else data.batch_tokens
    return {
        "sequences_train": data.sequences,
        "packing_efficiency": round(data.train.tokens / room, 4),
        "effective_batch_size": config.effective_batch_size,
        "steps_per_epoch": steps_per_epoch,
        "steps": steps,
        "warmup_steps": math.ceil(steps * training.warmup_ratio),
        "evaluations": evaluations,
        "tokens_evaluated": evaluations * data.evaluated_tokens,
        "checkpoints": math.ceil(steps / training.save_steps),
    }


def _memory(config: Config, geometry: Geometry, machine: Machine, working_set_gib: float | None) -> dict[str, Any]:
    """The plan's figures of expected and available memory, GiB."""
    parts, platform = memory_parts(config, geometry), PLATFORMS[config.platform]
    return {
        "peak_memory_gib": round(sum(parts.values()), 2),
        "memory_parts": {name: round(gib, 3) for name, gib in parts.items()},
        "memory_available_gib": _rounded(memory_available_gib(platform, machine)),
        "working_set_gib": _rounded(working_set_gib),
        "specified_memory_gb": platform.specified_memory_gb,
    }


def _dropped(rows: RowCounts) -> int:
    return rows.dropped_long + rows.dropped_without_loss + rows.dropped_bad + rows.dropped_duplicates


def _hours(
    plan: Plan, config: Config, geometry: Geometry, machine: Machine, speed: throughput.Throughput | None
) -> dict[str, Any]:
    """The plan's hours at the measured `speed`, else those expected on the platform; empty if neither is known.

    If the speed of evaluations was not measured, the hours do not include them.
    """
    expected = PLATFORMS[config.platform].expectation
    if speed is None:
        return _expected_hours(plan, config, expected, machine) if expected and geometry == MISTRAL_7B else {}
    seconds = _tokens(plan, config) / speed.tokens_per_second
    if speed.eval_tokens_per_second is not None:
        seconds += plan.tokens_evaluated / speed.eval_tokens_per_second
    return {"hours": round(seconds / 3600, 4), "hours_from": _source(speed)}


def _expected_hours(plan: Plan, config: Config, expected: Expectation, machine: Machine) -> dict[str, Any]:
    """The expected hours (least, most) of training, padding included, and of evaluations."""
    cores = machine.gpu_cores or expected.gpu_cores
    share = cores / expected.gpu_cores if cores and expected.gpu_cores else 1.0
    slow, fast = (share * speed for speed in expected.tokens_per_second)
    computed = _tokens(plan, config) / (1 if config.training.packing else plan.packing_efficiency)
    hours = (computed + plan.tokens_evaluated / EVALUATION_SPEED) / 3600
    what = f" for {cores} GPU cores" if expected.gpu_cores else ""
    padding = "" if config.training.packing else " with padding"
    speeds = f"{slow:,.0f}-{fast:,.0f} tokens/s{padding}"
    evaluating = f"{EVALUATION_SPEED * slow:,.0f}-{EVALUATION_SPEED * fast:,.0f} in evaluations"
    return {
        "hours_expected": (round(hours / fast, 4), round(hours / slow, 4)),
        "hours_expected_from": f"{speeds} and {evaluating}, by arithmetic{what}, not measured",
    }


def _tokens(plan: Plan, config: Config) -> float:
    """Tokens trained on over all epochs."""
    epochs = config.training.num_train_epochs
    if config.training.max_steps > 0:
        epochs = plan.steps / plan.steps_per_epoch
    return epochs * plan.tokens_train


def hours_problem(plan: Plan, config: Config) -> tuple[str, str] | None:
    """What is wrong and what to type, if training takes longer than is sensible on the platform.

    Uses the measured speed, else the slower end of the platform's expectation. A time budget replaces the platform's
    limit; the check plan.hours compares measured hours with it.
    """
    expected, budget = PLATFORMS[config.platform].expectation, config.training.time_budget_hours
    hours = plan.hours_expected if plan.hours is None else (plan.hours,)
    if expected is None or hours is None or (budget and plan.hours):
        return None
    limit = budget or expected.hours
    if hours[-1] <= limit:
        return None
    tokens, shares = _tokens(plan, config), [limit / most for most in hours]
    found = (
        f"{tokens:,.0f} tokens over all epochs take {'-'.join(f'{most:,.1f}' for most in hours)} h on "
        f"{config.platform} ({plan.hours_from or plan.hours_expected_from}); {limit:g} h are "
        f"{'-'.join(f'{share * tokens / 1e6:.1f}' for share in reversed(shares))} million"
    )
    fewer = f"dataset.max_rows={max(1, int(shares[-1] * plan.rows_train))}"
    if config.training.max_steps > 0:  # fewer rows would not shorten it
        fewer = f"training.max_steps={max(1, int(shares[-1] * plan.steps))}"
    faster = "" if PLATFORMS[config.platform].nvidia else ", or train on the H100 (--config h100)"
    return found, f"--set {fewer} fits into that{faster}"


def _padding_problem(plan: Plan, config: Config) -> str | None:
    if config.training.packing or plan.packing_efficiency >= LEAST_FULL:
        return None
    padding = f"batches are {plan.packing_efficiency:.0%} full, the rest is padding"
    return f"{padding}; --set training.packing=true computes no padding"


def _evaluation_problem(plan: Plan, config: Config) -> str | None:
    """If evaluations read more than MOST_EVALUATED of the training's tokens."""
    share = plan.tokens_evaluated / _tokens(plan, config)
    rows = int(plan.rows_evaluated * MOST_EVALUATED / share)
    if share <= MOST_EVALUATED or rows < LEAST_EVALUATED:  # eval_loss over fewer rows would mean little
        return None
    found = f"{counted(plan.evaluations, 'evaluation')} read {plan.tokens_evaluated:,} tokens, {share:.1f} times"
    return f"{found} the training's; --set dataset.max_validation_rows={rows} keeps them to a third of it"


def _source(speed: throughput.Throughput) -> str:
    evaluations = "" if speed.eval_tokens_per_second is not None else ", evaluations not counted"
    return f"{speed.tokens_per_second:,.0f} tokens/s on {speed.machine}, {speed.file}{evaluations}"


def _rounded(gib: float | None) -> float | None:
    return None if gib is None else round(gib, 2)


def count_steps(config: Config, sequences: int) -> tuple[int, int]:
    """(optimizer steps per epoch, in all), as transformers' Trainer counts them: a smaller last batch is a step too."""
    micro_batches = math.ceil(sequences / config.training.per_device_train_batch_size)
    steps_per_epoch = math.ceil(micro_batches / config.training.gradient_accumulation_steps)
    if config.training.max_steps > 0:
        return steps_per_epoch, config.training.max_steps
    return steps_per_epoch, math.ceil(config.training.num_train_epochs * steps_per_epoch)


def disk_bytes(config: Config, geometry: Geometry, tokens: int) -> float:
    """Bytes of checkpoints (adapter and two moments, fp32), best and final adapter, and the cache of encoded rows."""
    adapter = 4 * lora_parameters(config, geometry)
    kept = config.training.save_total_limit + 2  # the best ones, the newest, and the one being written
    return kept * 3 * adapter + 2 * adapter + 8 * tokens


def _problems(plan: Plan, config: Config, fitting: Fitting) -> list[str]:
    problems = []
    if config.dataset.rows_read:
        found = f"dataset.max_rows is {config.dataset.max_rows}: {config.dataset.rows_read}"
        problems.append(f"{found}; --set dataset.max_rows=null reads all")
    problems += filter(None, (_padding_problem(plan, config), _evaluation_problem(plan, config)))
    pairs = plan.schedule_problem(config.training.eval_steps), hours_problem(plan, config)
    problems += ["; ".join(pair) for pair in pairs if pair]
    if not fitting.fits:
        why = f" ({fitting.change.sentence})" if fitting.change else ""
        problems.append(f"{fitting.found}: {fitting.fix()}{why}")
    return problems
