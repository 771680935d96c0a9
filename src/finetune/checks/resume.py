"""Checks of an existing run: what a start would do with it, and whether it matches a receipt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finetune.checks.preflight import Preflight
from finetune.checks.runner import Check, Finding, failed, passed, warned
from finetune.cli import command
from finetune.runs.folder import find_run, lock_holder

TRAIN = command("src/train.py")


def _state(preflight: Preflight) -> Finding:
    from finetune.runs.manifest import fingerprint
    from finetune.runs.resume import decide

    folder, finished = find_run(preflight.config, fresh=False)
    if finished:
        return passed(f"{folder.name} is finished; --fresh would start a new run next to it")
    if holder := lock_holder(folder):
        return failed(f"{folder} is being written by {holder}", "--fresh starts another run next to it")
    checkpoints = folder / "checkpoints"
    if not any(checkpoints.glob("*")):
        return passed(f"would start {folder.name} from step 0")
    decision = decide(checkpoints, fingerprint(preflight.config, preflight.prepared))
    lost = f"the best adapter, of step {decision.best_step}, is lost and would be trained again"
    notes = [
        *(f"{damaged.name} is damaged ({why}) and would be set aside" for damaged, why in decision.damaged),
        *(f"{repeated.name} would be set aside: {lost}" for repeated in decision.repeated),
        *_set_aside(checkpoints),
    ]
    if decision.nothing_intact:
        return failed(f"every checkpoint in {checkpoints} is damaged: {'; '.join(notes)}", f"{TRAIN} --fresh")
    if decision.checkpoint is not None:
        return _resume(f"would resume from {decision.checkpoint.name}", notes, decision.changes)
    found = "; ".join([f"would start {folder.name} from step 0", *notes])
    return warned(found, f"{TRAIN} --fresh starts a new run") if decision.repeated else passed(found)


def _set_aside(checkpoints: Path) -> list[str]:
    """Checkpoints set aside by earlier starts, with the reason where it can still be found."""
    from finetune.files import SEAL
    from finetune.runs.checkpoints import ASIDE, damage

    notes = []
    for folder in sorted(checkpoints.glob(f"{ASIDE}*")):
        reason = damage(folder) if (folder / SEAL).is_file() else None
        notes.append(f"set aside before: {folder.name}" + (f" ({reason})" if reason else ""))
    return notes


def _resume(resumes: str, notes: list[str], changes: Sequence[str]) -> Finding:
    found = "; ".join([resumes, *notes])
    if changes:
        return failed(f"{found}, but changed since: {'; '.join(changes)}", f"{TRAIN} --fresh, or --resume-changed")
    return warned(found, f"{TRAIN} --fresh starts a new run") if notes else passed(found)


def _receipt(preflight: Preflight) -> Finding:
    from finetune.runs import receipt

    assert preflight.receipt is not None  # this check is only selected with --receipt
    ours = receipt.make(preflight.config, preflight.prepared)
    differ, by_design = receipt.differences(ours, receipt.read(preflight.receipt))
    apart = f"; by design: {'; '.join(by_design)}" if by_design else ""
    if differ:
        return failed(f"not the same training: {'; '.join(differ)}{apart}", "use the same data and config as that run")
    return passed(f"the same training as {preflight.receipt}{apart}")


_ROWS = ("data.rows",)
CHECKS = (
    Check("state.run", "what a start would do: a new run, or resume, and from which checkpoint", _state, needs=_ROWS),
    Check("receipt", "with --receipt: this is the training the receipt describes", _receipt, needs=_ROWS),
)
