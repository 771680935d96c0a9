"""Tests the adapter before it becomes final: reloaded from disk with plain PEFT onto the untouched base.

The base is the one in memory, after PEFT has removed our LoRA layers (`unload`): a second 7B would double the memory,
and loading it again would take minutes. The sha256 of its weights, compared with that before the first step, proves
that it is still the frozen base.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from finetune.data.prepare import Prepared
from finetune.data.store import Place, Rows
from finetune.data.template import IGNORED
from finetune.model.generate import evaluating, reply_to
from finetune.runs.outcome import Outcome
from finetune.training.job import Job
from finetune.wording import listed

LOSS_TOKENS = 16384  # of validation rows used to recompute eval_loss; if there are more, the first rows
ANSWERS = 4  # validation rows whose first question is answered
LEAST_NEW_TOKENS = 256  # for an answer to end; or four times the row's own answer if that is longer
LEARNED = math.log(2)  # nats: with a lower loss the end token has a probability above 1/2, so greedy decoding picks it
# How much two losses of the same weights may differ, as a share of the loss (of 1 nat if the loss is smaller). A value
# in bfloat16 is off by at most 2**-9, 0.2 %, and two passes through the model (autocast or not, padded or not) round
# differently; a loss is a mean of many such values. In float32 only the order of summation differs.
TOLERANCE = {"bfloat16": 1e-2, "float32": 1e-4}


@dataclass(frozen=True)
class Untrained:
    """sha256 digests before the first step: of the base weights, and of each adapter tensor."""

    base: str
    adapter: dict[str, str]


@dataclass(frozen=True)
class SelfCheck:
    """The result of one check of the adapter."""

    name: str
    status: Literal["pass", "warn", "fail"]
    detail: str


@dataclass(frozen=True)
class SelfTest:
    """The results of all checks; `self_test` in the manifest."""

    checks: tuple[SelfCheck, ...]

    @property
    def failed(self) -> tuple[SelfCheck, ...]:
        """Failed checks: the adapter must not become final."""
        return self._of("fail")

    @property
    def warned(self) -> tuple[SelfCheck, ...]:
        """Checks that found a symptom of a broken adapter that a good one can also show."""
        return self._of("warn")

    def _of(self, status: str) -> tuple[SelfCheck, ...]:
        return tuple(check for check in self.checks if check.status == status)

    def sentence(self) -> str:
        """Return the summary for the terminal when no check failed."""
        passed = len(self._of("pass"))
        return f"{passed} of {len(self.checks)} checks passed on the adapter reloaded from disk"

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        status = "fail" if self.failed else "warn" if self.warned else "pass"
        return {"status": status, "checks": [asdict(check) for check in self.checks]}


@dataclass(frozen=True)
class HeldOut:
    """Mean nats per supervised token of validation rows; `end`: of their end tokens only, None if there are none."""

    loss: float
    end: float | None


def before_training(model: PeftModel) -> Untrained:
    """Hash the base and the adapter before the first step."""
    adapter = get_peft_model_state_dict(model, save_embedding_layers=False)
    return Untrained(_base_digest(model.get_base_model()), {name: _digest(tensor) for name, tensor in adapter.items()})


def _base_digest(base: Any) -> str:
    """Hash all weights but LoRA's, including quantization states; the result is the same with and without LoRA."""
    weights = {name.replace(".base_layer", ""): tensor for name, tensor in base.state_dict().items()}
    lines = (f"{name} {_digest(weights[name])}\n" for name in sorted(weights) if ".lora_" not in name)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _digest(tensor: torch.Tensor) -> str:
    content = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(content.data).hexdigest()


def self_test(job: Job, folder: Path, before: Untrained, outcome: Outcome) -> SelfTest:
    """Check the adapter saved in `folder`. Removes our LoRA from `job.model`, which cannot be used afterwards.

    Stops early only if PEFT cannot read the file.
    """
    model, prepared = job.model, job.prepared
    rows = loss_rows(prepared.validation)
    all_rows = len(rows) == len(prepared.validation.lengths)
    tokens = int(prepared.validation.lengths[rows].sum())
    over = f"{'all' if all_rows else 'the first'} {len(rows)} validation rows ({tokens:,} tokens)"
    expected = outcome.eval_loss if all_rows else held_out(model.get_base_model(), prepared, rows).loss

    base = model.unload()
    checks = [_base_unchanged(before.base, _base_digest(base))]
    first = prepared.validation.row(rows[0])[1]
    plain = _logits(base, first)
    try:
        saved = load_file(folder / "adapter_model.safetensors")
        tuned = PeftModel.from_pretrained(base, folder, torch_device=base.device.type)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        return SelfTest((*checks, _check("reload", False, f"PEFT cannot read it: {error}")))
    found = held_out(tuned.get_base_model(), prepared, rows)
    checks += [
        _reloaded(saved, get_peft_model_state_dict(tuned, save_embedding_layers=False)),
        _changed(saved, before.adapter, outcome.best_step),
        _finite(saved),
        _differs(_logits(tuned.get_base_model(), first), plain),
        _same_loss(found.loss, expected, over, job.config.model.dtype),
        _answers_end(tuned, prepared, found.end),
    ]
    return SelfTest(tuple(checks))


def _check(name: str, holds: bool, detail: str) -> SelfCheck:
    return SelfCheck(name, "pass" if holds else "fail", detail)


def _base_unchanged(before: str, after: str) -> SelfCheck:
    if before == after:
        return _check("base", True, f"the base weights are unchanged (sha256 {after[:16]})")
    return _check("base", False, f"the base weights have changed (sha256 {before[:16]} -> {after[:16]})")


def _reloaded(saved: dict[str, torch.Tensor], loaded: dict[str, torch.Tensor]) -> SelfCheck:
    """Compare tensors: PEFT ignores a missing tensor silently."""
    wrong = sorted(
        name
        for name in saved.keys() | loaded.keys()
        if name not in saved or name not in loaded or not _equal(saved[name], loaded[name].cpu())
    )
    found = f"all {len(saved)} tensors equal the saved ones"
    return _check("reload", not wrong, found if not wrong else f"{_some(wrong)} not equal to the saved one")


def _equal(these: torch.Tensor, those: torch.Tensor) -> bool:
    return torch.equal(torch.nan_to_num(these), torch.nan_to_num(those))  # NaN is found by another check


def _changed(saved: dict[str, torch.Tensor], start: dict[str, str], best_step: int) -> SelfCheck:
    same = sorted(name for name, tensor in saved.items() if start.get(name) == _digest(tensor))
    if not same:
        return _check("changed", True, f"training changed all {len(saved)} tensors")
    why = "; no evaluation was better than the one before training" if best_step == 0 else ""
    return _check("changed", False, f"{_some(same)} unchanged by training, of {len(saved)} tensors{why}")


def _finite(saved: dict[str, torch.Tensor]) -> SelfCheck:
    wrong = sorted(name for name, tensor in saved.items() if not torch.isfinite(tensor).all())
    return _check("finite", not wrong, f"{_some(wrong)} not finite" if wrong else "every value is a finite number")


def _some(names: list[str]) -> str:
    return f"{listed(names, 1)} {'is' if len(names) == 1 else 'are'}"


def _differs(tuned: torch.Tensor, base: torch.Tensor) -> SelfCheck:
    """Compare logits [tokens, vocabulary] of the first validation row with and without the adapter."""
    most = float((tuned - base).abs().max())
    return _check("differs", most > 0, f"logits differ from the base's by up to {most:.3g}")


def _same_loss(found: float, expected: float, over: str, dtype: str) -> SelfCheck:
    """Compare with the loss during training; a NaN compares as false and so fails."""
    allowed = TOLERANCE[dtype] * max(1.0, expected)
    detail = f"{found:.6f} over {over}, {expected:.6f} during training (tolerance {allowed:.2g})"
    return _check("eval_loss", abs(found - expected) <= allowed, detail)


def _answers_end(tuned: PeftModel, prepared: Prepared, end_loss: float | None) -> SelfCheck:
    """Check that generated answers end, on the rows with the shortest answers, to save time.

    Answers can be long, and a short training may not teach the end token, so this is a warning. It fails only if the
    model predicts the end of the rows' own answers (`end_loss`, in nats) but never ends its own.
    """
    chat, rows = prepared.chat, prepared.validation
    turns = sorted((_first_turn(rows, index) for index in range(len(rows.lengths))), key=lambda turn: turn[2])[:ANSWERS]
    limit = max(LEAST_NEW_TOKENS, 4 * max(answer for _, _, answer in turns))
    replies = reply_to(tuned, chat, [prompt for _, prompt, _ in turns], limit) or []
    ran_on = [place for (place, _, _), reply in zip(turns, replies, strict=True) if not reply.ended]
    end = chat.format.end
    if not ran_on:
        most, empty = max(reply.tokens for reply in replies), sum(reply.tokens == 0 for reply in replies)
        found = f"{len(replies)} of {len(replies)} answers end in {end}, within {most} tokens"
        return _check("answers_end", True, f"{found}; {empty} of them are empty" if empty else found)
    lines = f"of lines {', '.join(str(place.line) for place in ran_on)}"
    where = lines if rows.files == 1 else ", ".join(place.shown for place in ran_on)
    found = f"{len(ran_on)} of {len(replies)} answers have no {end} within {limit} tokens (rows {where})"
    if len(ran_on) < len(replies):
        return SelfCheck("answers_end", "warn", found)
    if end_loss is None:
        return SelfCheck("answers_end", "warn", f"{found}; no validation row has an end token with loss")
    learned = end_loss < LEARNED
    loss = f"its loss on end tokens of validation rows is {end_loss:.3f}"
    return SelfCheck(
        "answers_end", "fail" if learned else "warn", f"{found}; {loss}: {'' if learned else 'not '}learned"
    )


def _first_turn(rows: Rows, index: int) -> tuple[Place, list[int], int]:
    """Return (place, prompt ids of the first turn, tokens of its answer including the end) of a row."""
    place, input_ids, labels = rows.row(index)
    supervised = labels != IGNORED
    begin = int(np.argmax(supervised))
    after = np.flatnonzero(~supervised[begin:])
    return place, input_ids[:begin].tolist(), int(after[0]) if len(after) else len(labels) - begin


def loss_rows(rows: Rows) -> list[int]:
    """Return indices of the first rows that fit in LOSS_TOKENS, at least one."""
    fitting = int((np.cumsum(rows.lengths) <= LOSS_TOKENS).sum())
    return list(range(max(1, fitting)))


def held_out(model: Any, prepared: Prepared, indices: list[int]) -> HeldOut:
    """Compute HeldOut of validation rows, one row at a time and without padding, to keep few logits in memory."""
    end = prepared.chat.token_id(prepared.chat.format.end)
    supervised, ends = [], []
    for index in indices:
        _, input_ids, labels = prepared.validation.row(index)
        targets = torch.from_numpy(labels[1:].astype(np.int64)).to(model.device)
        losses = torch.nn.functional.cross_entropy(_logits(model, input_ids)[:-1], targets, reduction="none")
        supervised.append(losses[targets != IGNORED].cpu())
        ends.append(losses[targets == end].cpu())
    of_ends = torch.cat(ends).double()
    return HeldOut(float(torch.cat(supervised).double().mean()), float(of_ends.mean()) if len(of_ends) else None)


def _logits(model: Any, input_ids: np.ndarray) -> torch.Tensor:
    """Return the logits of one row, float32 [tokens, vocabulary]."""
    with evaluating(model):
        ids = torch.from_numpy(input_ids.astype(np.int64)).to(model.device)
        logits: torch.Tensor = model(input_ids=ids[None]).logits[0].float()
        return logits
