"""`training.checkpointed_layers: auto`: recompute as few layers as memory allows. Arithmetic only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.machine.platforms import AUTO_SHARE
from finetune.plan.memory import checkpointed_layers, peak_gib
from finetune.plan.model_shape import Geometry

if TYPE_CHECKING:
    from finetune.config.schema import Config

TRIALS = 6  # at most; each takes two steps, an evaluation and a save


@dataclass(frozen=True)
class Choice:
    """How many of the first decoder layers are checkpointed, and the reason if the program chose."""

    layers: int
    reason: str | None = None


def with_layers(config: Config, layers: int) -> Config:
    """`config` with that many checkpointed layers."""
    return config.changed("training", checkpointed_layers=layers)


def by_formula(config: Config, geometry: Geometry, capacity_gib: float, why: str) -> Choice:
    """The config's number, or for `auto` the fewest layers whose expected peak is within the budget, else all.

    `why` only the formula decides is added to the reason.
    """
    if config.training.checkpointed_layers != "auto" or not config.training.gradient_checkpointing:
        return Choice(checkpointed_layers(config, geometry))
    total, budget = geometry.num_hidden_layers, AUTO_SHARE * capacity_gib
    expected = [peak_gib(with_layers(config, layers), geometry) for layers in range(total + 1)]
    layers = next((layers for layers in range(total) if expected[layers] <= budget), total)
    peak = f"{expected[layers]:.1f} GiB expected by the formula alone"
    return Choice(layers, f"{layers} of {total}: {peak}, {_limit(expected[layers], capacity_gib)}; {why}")


def by_trials(
    config: Config, geometry: Geometry, capacity_gib: float, measure: Callable[[int], float | None]
) -> Choice:
    """The fewest checkpointed layers whose measured peak is within the budget, else all.

    `measure` returns the peak in GiB with that many layers checkpointed, or None if memory ran out; with all of them it
    must return a number. Tries all layers, then half as many layers kept in full as the formula suggests, then
    repeatedly what the line through two measurements suggests. The line interpolates the difference between measurement
    and formula, because the peak itself is not linear.
    """
    total, budget = geometry.num_hidden_layers, AUTO_SHARE * capacity_gib
    expected = [peak_gib(with_layers(config, layers), geometry) for layers in range(total + 1)]
    peaks = {total: measure(total)}
    suggested = total - (total - _fewest(peaks, expected, budget) + 1) // 2
    while suggested not in peaks and len(peaks) < TRIALS:
        peaks[suggested] = measure(suggested)
        suggested = _fewest(peaks, expected, budget)
    layers = min((layers for layers, peak in peaks.items() if peak is not None and peak <= budget), default=total)
    return Choice(layers, _reason(layers, total, peaks, capacity_gib))


def _fewest(peaks: dict[int, float | None], expected: list[float], budget: float) -> int:
    """The fewest layers that should fit by all measurements; after running out of memory, halfway to what fitted."""
    known = {layers: peak - expected[layers] for layers, peak in peaks.items() if peak is not None}
    total, (first, *others) = len(expected) - 1, sorted(known)
    second = others[0] if others else first
    slope = (known[second] - known[first]) / (second - first) if others else 0.0
    line = (expected[layers] + known[first] + slope * (layers - first) for layers in range(total))
    fewest = next((layers for layers, peak in enumerate(line) if peak <= budget), total)
    ended = [layers for layers, peak in peaks.items() if peak is None]
    if not ended:
        return fewest
    least = min(layers for layers in known if known[layers] + expected[layers] <= budget or layers == total)
    return max(fewest, (max(ended) + least + 1) // 2)


def _reason(layers: int, total: int, peaks: dict[int, float | None], capacity_gib: float) -> str:
    trials = (
        f"{peak:.1f} with {tried}" if peak is not None else f"out of memory with {tried}"
        for tried, peak in peaks.items()
    )
    peak = peaks[layers]
    assert peak is not None  # only a measured number is chosen
    return f"{layers} of {total}: peak {peak:.1f} GiB measured, {_limit(peak, capacity_gib)} ({', '.join(trials)})"


def _limit(peak_gib: float, capacity_gib: float) -> str:
    budget = AUTO_SHARE * capacity_gib
    return f"{'at most' if peak_gib <= budget else 'more than'} {budget:.1f} of {capacity_gib:.1f}"
