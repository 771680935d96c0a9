"""Compare expected peak memory with available memory, and find the smallest config change that fits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.plan.memory import peak_gib
from finetune.plan.model_shape import Geometry

if TYPE_CHECKING:
    from finetune.config.schema import Config

# The keys that may be changed, and the text that follows each in the sentence.
EFFECTS = {
    "training.checkpointed_layers": "; ",
    "training.per_device_train_batch_size": ", ",
    "training.gradient_accumulation_steps": " keeps the effective batch of {batch}; ",
    "training.per_device_eval_batch_size": "; ",
    "training.gradient_checkpointing": "; ",
    "quantization.storage": "; ",
    "model.max_seq_length": " cuts longer rows; ",
}
LEAST_LENGTH = 256  # of max_seq_length: below it, most conversations would lose their answers
NOTHING_FITS = "no change to the config is enough; use a machine with more memory"


@dataclass(frozen=True)
class Change:
    """The smallest change with which a run fits: `--set` arguments, the expected peak, and a sentence."""

    settings: tuple[str, ...]
    peak_gib: float
    sentence: str

    @property
    def command(self) -> str:
        """The settings as command-line arguments."""
        return " ".join(f"--set {setting}" for setting in self.settings)


@dataclass(frozen=True)
class Fitting:
    """A run's expected peak and its `limits`, the available memory (GiB, by kind).

    `change` is the smallest that fits: empty if none is needed, None if no change is enough.
    """

    peak_gib: float
    limits: dict[str, float]
    change: Change | None

    @property
    def fits(self) -> bool:
        """Whether the peak is within every limit; true if no limit is known."""
        return self.peak_gib <= min(self.limits.values(), default=math.inf)

    @property
    def found(self) -> str:
        """Peak and limits in words."""
        there = (f"{gib:.1f} GiB {what}" for what, gib in self.limits.items())
        return ", ".join((f"{self.peak_gib:.1f} GiB expected", *there))

    def fix(self, release: str = "") -> str:
        """What to type if the run does not fit; `release` says how to free memory that something else holds."""
        if self.change is None:
            return release or NOTHING_FITS
        return f"{release}, or {self.change.command}" if release else self.change.command


def compare(config: Config, geometry: Geometry, limits: dict[str, float], measured_gib: float | None = None) -> Fitting:
    """How `config` fits into `limits`, by its measured peak if there is one, else by the expected one."""
    capacity_gib = min(limits.values(), default=math.inf)
    change = smallest_change(config, geometry, capacity_gib, measured_gib)
    return Fitting(measured_gib or peak_gib(config, geometry), limits, change)


def smallest_change(
    config: Config, geometry: Geometry, capacity_gib: float, measured_gib: float | None = None
) -> Change | None:
    """The smallest change of `config` whose peak is at most `capacity_gib`; None if no change is enough.

    Changes are applied in the order of `_changes`, each only if it lowers the peak. `measured_gib`, the measured peak
    of the unchanged `config`, corrects every prediction by the same factor.
    """
    factor = 1.0 if measured_gib is None else measured_gib / peak_gib(config, geometry)
    changed = config
    while factor * (peak := peak_gib(changed, geometry)) > capacity_gib:
        lower = (other for other in _changes(changed) if peak_gib(other, geometry) < peak)
        following = next(lower, None)
        if following is None:
            return None
        changed = following
    return _described(config, changed, factor * peak)


def what_would_fit(config: Config, geometry: Geometry, capacity_gib: float, measured_gib: float | None = None) -> str:
    """Advice for a run that ran out of memory: the smallest change that fits, as a sentence and a command.

    Without a measured peak, assumes the run needs a little more than there is.
    """
    more_than_there_is = max(peak_gib(config, geometry), 1.000001 * capacity_gib)
    change = compare(config, geometry, {"": capacity_gib}, measured_gib or more_than_there_is).change
    if change is None:
        return NOTHING_FITS
    return f"what would fit: {change.sentence}\n  {change.command}"


def _changes(config: Config) -> Iterator[Config]:
    """The next possible changes, least harmful first; the first three and the fifth do not change the result."""
    training, length = config.training, config.model.max_seq_length
    rows, evaluated = _divisor_below(training.per_device_train_batch_size), training.per_device_eval_batch_size
    if isinstance(training.checkpointed_layers, int):
        yield config.changed("training", checkpointed_layers="all")
    if rows:
        steps = training.gradient_accumulation_steps * training.per_device_train_batch_size // rows
        yield config.changed("training", per_device_train_batch_size=rows, gradient_accumulation_steps=steps)
    if evaluated > 1:
        yield config.changed("training", per_device_eval_batch_size=_divisor_below(evaluated))
    yield config.changed("training", gradient_checkpointing=True)
    yield config.changed("quantization", storage="packed")
    if length // 2 >= LEAST_LENGTH:
        yield config.changed("model", max_seq_length=length // 2)


def _divisor_below(count: int) -> int:
    """The largest divisor of `count` below it; 0 for 1."""
    return max((divisor for divisor in range(1, count) if count % divisor == 0), default=0)


def _described(before: Config, after: Config, peak: float) -> Change:
    """The differences between two configs, as `--set` arguments and as a sentence."""
    settings, clauses = [], []
    for path, why in EFFECTS.items():
        section, key = path.split(".")
        old, new = (_shown(getattr(getattr(config, section), key)) for config in (before, after))
        if old != new:
            settings.append(f"{path}={new}")
            clauses.append(f"{path} {old} -> {new}{why.format(batch=before.effective_batch_size)}")
    sentence = "".join(clauses).removesuffix("; ") or "nothing to change"
    return Change(tuple(settings), round(peak, 2), f"{sentence}; {peak:.1f} GiB expected")


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
