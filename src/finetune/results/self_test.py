"""The adapter proves itself before it is called final: read back from disk, with plain PEFT, onto the untouched base.

The base is the one in memory, from which PEFT takes our LoRA layers off again (`unload`): a second 7B beside it would
double the memory, and loading one anew would cost minutes. That it is still the frozen base is no belief: the sha256 of
its weights is that of before the first step.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from finetune.data.encode import Place
from finetune.data.prepare import Prepared
from finetune.data.store import Rows
from finetune.data.template import IGNORED
from finetune.model.generate import evaluating, reply_to
from finetune.runs.outcome import Outcome
from finetune.training.job import Job
from finetune.wording import listed

LOSS_TOKENS = 16384  # of validation rows, over which eval_loss is computed again; the first rows where there are more
ANSWERS = 4  # validation rows whose first question is answered
LEAST_NEW_TOKENS = 256  # in which an answer should end; four times the row's own answer where that is longer
LEARNT = math.log(2)  # nats: an end token of a lower loss is more likely than all others together, so greedy takes it
# How far two losses of the same weights may lie apart, as a share of the loss (of 1 nat where it is smaller). One value
# in bfloat16 is off by at most 2**-9, 0.2 %, and two ways through the model (autocast or not, padded or not) round
# differently; a loss is a mean of many such values. In float32 only the order of sums differs.
TOLERANCE = {"bfloat16": 1e-2, "float32": 1e-4}


@dataclass(frozen=True)
class Untrained:
    """sha256 digests from before the first step: of the base's weights, and of each tensor of the adapter."""

    base: str
    adapter: dict[str, str]


@dataclass(frozen=True)
class SelfCheck:
    """One property of the adapter, and what was found."""

    name: str
    status: Literal["pass", "warn", "fail"]
    detail: str


@dataclass(frozen=True)
class SelfTest:
    """What the manifest holds as `self_test`."""

    checks: tuple[SelfCheck, ...]

    @property
    def failed(self) -> tuple[SelfCheck, ...]:
        """Those that say that this adapter must not be called final."""
        return self._of("fail")

    @property
    def warned(self) -> tuple[SelfCheck, ...]:
        """Those that found what a broken adapter does, and what a good one may do as well."""
        return self._of("warn")

    def _of(self, status: str) -> tuple[SelfCheck, ...]:
        return tuple(check for check in self.checks if check.status == status)

    def sentence(self) -> str:
        """For the terminal, where none has failed."""
        passed = len(self._of("pass"))
        return f"{passed} of {len(self.checks)} checks passed, on the adapter as it was read back from disk"

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        status = "fail" if self.failed else "warn" if self.warned else "pass"
        return {"status": status, "checks": [asdict(check) for check in self.checks]}


@dataclass(frozen=True)
class HeldOut:
    """Mean nats a supervised token of validation rows; `end` of the end tokens among them, None where none is."""

    loss: float
    end: float | None


def before_training(model: PeftModel) -> Untrained:
    """Untrained of a model that is not trained yet; `Untrained` says of what."""
    adapter = get_peft_model_state_dict(model, save_embedding_layers=False)
    return Untrained(_base_digest(model.get_base_model()), {name: _digest(tensor) for name, tensor in adapter.items()})


def _base_digest(base: Any) -> str:
    """Of all weights that are not LoRA's, quantisation states included; the same with LoRA on and off."""
    weights = {name.replace(".base_layer", ""): tensor for name, tensor in base.state_dict().items()}
    lines = (f"{name} {_digest(weights[name])}\n" for name in sorted(weights) if ".lora_" not in name)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _digest(tensor: torch.Tensor) -> str:
    content = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(content.data).hexdigest()


def self_test(job: Job, folder: Path, before: Untrained, outcome: Outcome) -> SelfTest:
    """Look at the adapter in `folder`, which the model was saved to; takes our LoRA off it, so it is of no use then.

    A file that cannot be read back ends it early; all else is looked at in any case.
    """
    model, prepared = job.model, job.prepared
    rows = loss_rows(prepared.validation)
    whole = len(rows) == len(prepared.validation.lengths)
    tokens = int(prepared.validation.lengths[rows].sum())
    over = f"{'all' if whole else 'the first'} {len(rows)} validation rows ({tokens:,} tokens)"
    expected = outcome.eval_loss if whole else held_out(model.get_base_model(), prepared, rows).loss

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
        return _check("base", True, f"the base's weights are those of the start (sha256 {after[:16]})")
    return _check("base", False, f"the base's weights have changed (sha256 {before[:16]} -> {after[:16]})")


def _reloaded(saved: dict[str, torch.Tensor], loaded: dict[str, torch.Tensor]) -> SelfCheck:
    """PEFT itself is silent about a tensor that it does not find."""
    wrong = sorted(
        name
        for name in saved.keys() | loaded.keys()
        if name not in saved or name not in loaded or not _equal(saved[name], loaded[name].cpu())
    )
    found = f"{len(saved)} tensors, all as saved"
    return _check("reload", not wrong, found if not wrong else f"{_some(wrong)} not as saved")


def _equal(these: torch.Tensor, those: torch.Tensor) -> bool:
    return torch.equal(torch.nan_to_num(these), torch.nan_to_num(those))  # NaN is another check's


def _changed(saved: dict[str, torch.Tensor], start: dict[str, str], best_step: int) -> SelfCheck:
    same = sorted(name for name, tensor in saved.items() if start.get(name) == _digest(tensor))
    if not same:
        return _check("changed", True, f"{len(saved)} tensors, none as at the start")
    why = "; no evaluation was better than the one before training" if best_step == 0 else ""
    return _check("changed", False, f"{_some(same)} as at the start, of {len(saved)} tensors{why}")


def _finite(saved: dict[str, torch.Tensor]) -> SelfCheck:
    wrong = sorted(name for name, tensor in saved.items() if not torch.isfinite(tensor).all())
    return _check("finite", not wrong, f"{_some(wrong)} not finite" if wrong else "every value is a finite number")


def _some(names: list[str]) -> str:
    return f"{listed(names, 1)} {'is' if len(names) == 1 else 'are'}"


def _differs(tuned: torch.Tensor, base: torch.Tensor) -> SelfCheck:
    """Logits [tokens, vocabulary] of the first validation row, with and without the adapter."""
    most = float((tuned - base).abs().max())
    return _check("differs", most > 0, f"logits differ from the base's by up to {most:.3g}")


def _same_loss(found: float, expected: float, over: str, dtype: str) -> SelfCheck:
    """A loss that is not a number is no loss: it compares as false."""
    allowed = TOLERANCE[dtype] * max(1.0, expected)
    detail = f"{found:.6f} over {over}, in training {expected:.6f}, {allowed:.2g} allowed between"
    return _check("eval_loss", abs(found - expected) <= allowed, detail)


def _answers_end(tuned: PeftModel, prepared: Prepared, end_loss: float | None) -> SelfCheck:
    """Whether answers end, asked of the rows with the shortest ones, where that takes the least time.

    Answers may be long, and a short training does not teach to end: a warning. Only a model that predicts the end where
    the rows' own answers end (`end_loss`, in nats) and ends none of its own contradicts itself.
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
        return SelfCheck("answers_end", "warn", f"{found}; no validation row has one that carries loss")
    learnt = end_loss < LEARNT
    loss = f"where answers of the validation rows end, its loss is {end_loss:.3f}"
    return SelfCheck("answers_end", "fail" if learnt else "warn", f"{found}; {loss}: {'' if learnt else 'not '}learnt")


def _first_turn(rows: Rows, index: int) -> tuple[Place, list[int], int]:
    """(place, ids up to where the first answer begins, tokens of that answer with its end) of a row."""
    place, input_ids, labels = rows.row(index)
    supervised = labels != IGNORED
    begin = int(np.argmax(supervised))
    after = np.flatnonzero(~supervised[begin:])
    return place, input_ids[:begin].tolist(), int(after[0]) if len(after) else len(labels) - begin


def loss_rows(rows: Rows) -> list[int]:
    """Indices of the first rows, as many as LOSS_TOKENS hold; at least one."""
    fitting = int((np.cumsum(rows.lengths) <= LOSS_TOKENS).sum())
    return list(range(max(1, fitting)))


def held_out(model: Any, prepared: Prepared, indices: list[int]) -> HeldOut:
    """HeldOut of validation rows, one by one without padding; the logits of one row are in memory at a time."""
    end = prepared.chat.token_id(prepared.chat.format.end)
    supervised, ends = [], []
    for input_ids, labels in _examples(prepared.validation, indices):
        wanted = torch.from_numpy(labels[1:].astype(np.int64)).to(model.device)
        losses = torch.nn.functional.cross_entropy(_logits(model, input_ids)[:-1], wanted, reduction="none")
        supervised.append(losses[wanted != IGNORED].cpu())
        ends.append(losses[wanted == end].cpu())
    of_ends = torch.cat(ends).double()
    return HeldOut(float(torch.cat(supervised).double().mean()), float(of_ends.mean()) if len(of_ends) else None)


def _examples(rows: Rows, indices: list[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for index in indices:
        _, input_ids, labels = rows.row(index)
        yield input_ids, labels


def _logits(model: Any, input_ids: np.ndarray) -> torch.Tensor:
    """Of one row, float32 [tokens, vocabulary]."""
    with evaluating(model):
        ids = torch.from_numpy(input_ids.astype(np.int64)).to(model.device)
        logits: torch.Tensor = model(input_ids=ids[None]).logits[0].float()
        return logits
