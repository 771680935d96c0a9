"""Resolves `auto` for the fused paths: each is tried on the largest micro-batch, and used if correct and faster."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from peft.tuners.lora import LoraLayer
from transformers import TrainerCallback
from transformers.training_args import OptimizerNames

from finetune.config.rules import cannot_fuse
from finetune.config.schema import Config
from finetune.errors import CheckFailed, Diverged
from finetune.machine.device import forget_memory, peak_memory_gib, synchronize
from finetune.plan.automatic import FUSED, PLAIN, in_words, left_open, settled, used
from finetune.training.recompute import checkpoint_first
from finetune.training.short_training import MemoryEnds, Stage, Trial, zero_gradients
from finetune.wording import duration

WITHOUT_DROPOUT, WITH_DROPOUT, COMPUTED_AGAIN = range(3)  # the first passes over the micro-batch; the others are timed
TIMED = 3  # the fastest counts
LEAST_GAIN = 0.03
SEED, SPREAD = 1, 0.02  # of what the passes draw; of LoRA's B, which a new adapter has at 0, and A's gradients with it
PROBED_TOKENS, PROBED_INPUTS = 4096, 512
PROBE = 16.0  # far above the base's weights, and above what bfloat16 rounds them by
DEVIATIONS = 5  # of a binomial distribution: by chance more than one in two million rehearsals

Gradients = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Tolerance:
    """The relative difference allowed between a fused path and the plain one; for gradients, of norms.

    `loss`, all `gradients` together, one weight's `gradient`; `again`: one weight's gradient when one more or one
    fewer layer is recomputed.
    """

    loss: float
    gradients: float
    gradient: float
    again: float


# On the demo model (135M, 30 layers, 64 tokens) both paths together were 4e-7, 4e-6 and 1e-5 from the plain one in
# float32. In bfloat16 each result has rounding of its own: kernels were 0.0015, 0.064 and 0.13 away, and the plain path
# itself was 0.0033, 0.21 and 0.51 from float32; more tokens average that out. What is wrong, as a factor that is
# left out or a mask that is drawn anew, is 0.3 or more away.
TOLERANCES = {"float32": Tolerance(1e-5, 1e-4, 1e-4, 1e-4), "bfloat16": Tolerance(0.01, 0.15, 0.3, 0.03)}


@dataclass(frozen=True)
class Variant:
    """A row of the rehearsal's table: one way to compute the steps, and the result.

    Tokens/s of the largest micro-batch, without padding; None if it failed. `peak_gib` is also None if the platform
    cannot reset the peak.
    """

    name: str
    tokens_per_second: float | None
    peak_gib: float | None
    verdict: str

    def row(self) -> tuple[str, str]:
        """Return (name, text) for the terminal."""
        speed = "" if self.tokens_per_second is None else f"{self.tokens_per_second:,.0f} tokens/s"
        memory = "" if self.peak_gib is None else f"{self.peak_gib:.1f} GiB"
        return self.name, f"{speed:>15}{memory:>10}  {self.verdict}"


def variant(stage: Stage, seconds: float | None, peak_gib: float | None, verdict: str) -> Variant:
    """Return the row of `stage`, computed from the seconds of its micro-batch."""
    speed = None if seconds is None else round(stage.tokens / seconds, 1)
    known = peak_gib is not None and stage.job.platform.peak_begins_anew
    return Variant(_name(stage), speed, round(peak_gib, 3) if known and peak_gib else None, verdict)


def _name(stage: Stage) -> str:
    values, total = used(stage.config, stage.job.geometry), stage.job.geometry.num_hidden_layers
    return f"{in_words(values)}; {stage.layers} of {total} layers checkpointed"


class Passes(TrainerCallback):  # type: ignore[misc]
    """Passes over one micro-batch, one per step, without applying the gradients.

    The first is without dropout, the second with it, the third with the same random numbers and another number of
    recomputed layers; TIMED more follow. Records the first loss, the first three gradients (in host memory), the
    seconds of the fastest timed pass, the peak, how many of the probed inputs dropout keeps, and how much its masks
    differ between forward and backward pass.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.gradients: list[Gradients] = []
        self.loss, self.seconds, self.peak_gib = math.nan, math.inf, 0.0
        self.kept, self.probed, self.apart = 0, 0, 0.0
        self._begun = 0.0

    @property
    def expected_share(self) -> float:
        """The share of its inputs that dropout should keep."""
        return 1 - self.stage.config.lora.lora_dropout

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        job, config = self.stage.job, self.stage.config
        _set_dropout(job.model, 0.0 if state.global_step == WITHOUT_DROPOUT else config.lora.lora_dropout)
        layers = self._another() if state.global_step == COMPUTED_AGAIN else self.stage.layers
        checkpoint_first(job.model.get_base_model().model.layers, layers, job.platform)
        if config.training.gradient_accumulation_steps > 1:
            zero_gradients(job.model)
        torch.manual_seed(SEED)
        synchronize(job.platform)
        self._begun = time.monotonic()

    def _another(self) -> int:
        """Return one layer more, or one fewer if all are checkpointed, which takes hardly more memory."""
        layers, total = self.stage.layers, self.stage.job.geometry.num_hidden_layers
        if not self.stage.config.training.gradient_checkpointing:
            return layers
        return layers - 1 if layers == total else layers + 1

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize(self.stage.job.platform)
        if state.global_step > COMPUTED_AGAIN:
            self.seconds = min(self.seconds, time.monotonic() - self._begun)
            return
        named = self.stage.job.model.named_parameters()
        self.gradients.append({name: _gradient(value) for name, value in named if value.requires_grad})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if state.global_step == 1 and "loss" in logs:
            self.loss = logs["loss"]


def _gradient(weight: torch.Tensor) -> torch.Tensor:
    """Copy the gradient to host memory; zeros if a broken path produced none."""
    found = torch.zeros_like(weight) if weight.grad is None else weight.grad
    return found.detach().to("cpu", copy=True)


Tried = TypeVar("Tried", Passes, Trial)


def tried(stage: Stage, train: Callable[[Stage], Tried]) -> Tried:
    """Return the result of `train`; report the variant before, and the duration and the peak memory after it."""
    name, report, started = _name(stage), stage.job.report, time.monotonic()
    report.progress(f"rehearsing {name}")
    found = train(stage)
    seconds = time.monotonic() - started
    report.progress(f"rehearsed {name} in {duration(seconds)}, peak {found.peak_gib:.1f} GiB")
    return found


def measure(stage: Stage) -> Passes:
    """Run the passes of `stage`. Raises MemoryEnds, Diverged, and CheckFailed if something cannot be compiled."""
    job = stage.job
    forget_memory(job.platform)
    with stage.putting_back():
        _leave_zero(job.model)
        trainer, passes = stage.trainer(COMPUTED_AGAIN + 1 + TIMED), Passes(stage)
        args = trainer.args
        args.learning_rate, args.optim, args.max_grad_norm = 0.0, OptimizerNames.SGD, math.inf  # SGD has no state
        args.logging_steps, args.eval_strategy, args.save_strategy = 1, "no", "no"
        trainer.add_callback(passes)
        trainer.train()
        passes.peak_gib = peak_memory_gib(job.platform)
        for layer in _lora_layers(job.model.get_base_model().model.layers[0].modules()):
            mask, apart = _probe(layer, job.model.dtype, stage.config.training.bf16, passes.expected_share)
            passes.kept, passes.probed = passes.kept + int(mask.sum()), passes.probed + mask.numel()
            passes.apart = max(passes.apart, apart)
    return passes


def _lora_layers(modules: Iterable[Any]) -> list[Any]:
    return [module for module in modules if isinstance(module, LoraLayer)]


def _set_dropout(model: Any, probability: float) -> None:
    for layer in _lora_layers(model.modules()):
        for noise in layer.lora_dropout.values():
            if isinstance(noise, torch.nn.Dropout):  # PEFT has an Identity where the config's is 0
                noise.p = probability


def _leave_zero(model: Any) -> None:
    """Give each B small random values."""
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            values = torch.randn(parameter.shape, generator=generator) * SPREAD
            parameter.data = values.to(parameter.device, parameter.dtype)


def _probe(layer: Any, dtype: torch.dtype, bf16: bool, kept: float) -> tuple[torch.Tensor, float]:
    """Return dropout's mask in the backward pass [tokens, inputs], and how much the other passes differ from it.

    The difference is 0 if the forward pass and A's gradient use the same mask, and about 1 if they draw their own. Only
    one path, from the first inputs to the first output, is open; overwrites the weights of `layer`. `kept`: the
    expected share.
    """
    (name,) = layer.active_adapters
    a, b, scaling = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    x = torch.ones(PROBED_TOKENS, a.shape[1], dtype=dtype, device=a.device, requires_grad=True)
    found = []
    for size in (0.0, PROBE):
        with torch.no_grad():
            a.zero_()[0, :PROBED_INPUTS] = size / scaling
            b.zero_()[0, 0] = 1.0
        with torch.autocast(a.device.type, torch.bfloat16, enabled=bf16):
            y = layer(x)[:, 0].float()
        found.append((y.detach(), *torch.autograd.grad(y.sum(), (x, a), materialize_grads=True)))
    (y_without, x_without, _), (y, of_x, of_a) = found
    mask = (of_x - x_without)[:, :PROBED_INPUTS] > PROBE / 2
    forward = _apart((y - y_without) * kept / PROBE, mask, 1, kept)
    return mask, max(forward, _apart(of_a[0, :PROBED_INPUTS] * kept / scaling, mask, 0, kept))


def _apart(counts: torch.Tensor, mask: torch.Tensor, dimension: int, kept: float) -> float:
    """Return the difference of `counts` and `mask` sums, in standard deviations of independently drawn masks."""
    off = (counts.float() - mask.sum(dimension)).square().mean().sqrt()
    deviation = math.sqrt(2 * mask.shape[dimension] * kept * (1 - kept))
    return float(off) / deviation if deviation else 0.0


def choose(stage: Stage) -> tuple[Config, list[Variant]]:
    """Return the config of `stage` with each `auto` of a fused path replaced, and the variants tried, in order.

    Raises as `measure` does if the plain path itself fails.
    """
    config, refused = stage.config, cannot_fuse(stage.config)
    plain, to_try = settled(config, PLAIN), [key for key in left_open(config) if key not in refused]
    variants = [
        Variant(FUSED[key], None, None, f"not used: {why}") for key, why in refused.items() if key in left_open(config)
    ]
    if not to_try:
        return plain, variants
    search = _Search(stage.of(plain), variants)
    kept = [key for key in to_try if search.tries({key: True})]
    if len(kept) > 1:
        search.tries(dict.fromkeys(kept, True))
    return search.best.stage.config, variants


class _Search:
    """The fastest correct variant so far, and the plain one that all are compared with."""

    def __init__(self, stage: Stage, variants: list[Variant]) -> None:
        self.stage, self.variants = stage, variants
        self.plain = self.best = tried(stage, measure)
        variants.append(variant(stage, self.plain.seconds, self.plain.peak_gib, "baseline"))

    def tries(self, changes: dict[str, bool]) -> bool:
        """Whether `changes` give correct results and are faster than plain; two changes must beat each one alone."""
        stage = self.stage.of(self.stage.config.changed("training", **changes))
        found, why = _attempt(stage)
        if found is None:
            gc.collect()  # the error kept the memory until now
            self.variants.append(variant(stage, None, None, f"not used: {why}"))
            return False
        beaten = self.plain if len(changes) == 1 else self.best
        gain = beaten.seconds / found.seconds - 1
        text = f"{abs(100 * gain):.0f} % {'faster' if gain > 0 else 'slower'}"
        if len(changes) > 1:
            text += f" than {in_words(used(self.best.stage.config, stage.job.geometry))}"
        slow = "" if gain >= LEAST_GAIN else f"{text}, {100 * LEAST_GAIN:.0f} % expected"
        why = wrong(found, self.plain) or slow
        self.variants.append(variant(stage, found.seconds, found.peak_gib, f"not used: {why}" if why else text))
        if not why and found.seconds < self.best.seconds:
            self.best = found
        return not why


def _attempt(stage: Stage) -> tuple[Passes | None, str]:
    """Return the passes, or (None, why there are none)."""
    try:
        return tried(stage, measure), ""
    except (MemoryEnds, CheckFailed, Diverged) as error:
        return None, error.found


def wrong(found: Passes, plain: Passes) -> str:
    """Say how `found` differs from `plain` beyond rounding; empty if it does not."""
    tolerance = TOLERANCES[found.stage.config.model.dtype]
    off = abs(found.loss - plain.loss) / abs(plain.loss)
    if not off <= tolerance.loss:
        return f"the loss differs from plain by {off:.2g} of it, at most {tolerance.loss:g}"
    ours, theirs = found.gradients[WITHOUT_DROPOUT], plain.gradients[WITHOUT_DROPOUT]
    off = _together(ours, theirs)
    if not off <= tolerance.gradients:
        return f"the gradients differ from plain by {off:.2g} of them, at most {tolerance.gradients:g}"
    name, off = _furthest(ours, theirs)
    if not off <= tolerance.gradient:
        return f"the gradient of {name} differs from plain by {off:.2g} of it, at most {tolerance.gradient:g}"
    name, off = _furthest(found.gradients[COMPUTED_AGAIN], found.gradients[WITH_DROPOUT])
    if not off <= tolerance.again:
        return f"dropout differs in a recomputed layer: the gradient of {name} differs by {off:.2g} of it"
    if why := _wrong_share(found):
        return why
    return "dropout differs in the backward pass" if found.apart > 0.5 else ""  # 0 or 1, but for rounding


def _together(found: Gradients, plain: Gradients) -> float:
    off = sum(float((found[name] - plain[name]).square().sum()) for name in plain)
    return math.sqrt(off / sum(float(value.square().sum()) for value in plain.values()))


def _furthest(found: Gradients, plain: Gradients) -> tuple[str, float]:
    """Return the weight whose gradient differs most, and by what share of its norm; NaN counts as most."""
    off = {name: float((found[name] - plain[name]).norm() / plain[name].norm()) for name in plain}
    name = max(off, key=lambda name: math.inf if math.isnan(off[name]) else off[name])
    return name.removeprefix("base_model.model.model.").removesuffix(".default.weight"), off[name]


def _wrong_share(found: Passes) -> str:
    expected = found.expected_share
    bound = DEVIATIONS * math.sqrt(expected * (1 - expected) / found.probed)
    share = found.kept / found.probed
    if abs(share - expected) <= bound:
        return ""
    return f"dropout keeps {share:.4f} of its inputs, expected {expected:.4f} within {bound:.2g}"
