"""What a start would do with the run that is there, and whether it is the training of a receipt."""

from __future__ import annotations

from pathlib import Path

from finetune.checks.preflight import Preflight
from finetune.checks.runner import Check, Finding, failed, passed, warned
from finetune.cli import command
from finetune.runs.folder import find_run, lock_holder


def _state(preflight: Preflight) -> Finding:
    from finetune.runs.checkpoints import ASIDE, SEAL, has_best, read_seal, refuse_code, saved, step_of
    from finetune.runs.manifest import fingerprint
    from finetune.runs.resume import best_step, differences

    folder, finished = find_run(preflight.config, fresh=False)
    if finished:
        return passed(f"{folder.name} is finished; --fresh would start a new run beside it")
    if holder := lock_holder(folder):
        return failed(f"{folder} is being written by {holder}", "--fresh starts another run beside it")
    checkpoints, notes = folder / "checkpoints", []
    best: int | None = None
    for checkpoint in reversed(saved(checkpoints)):
        try:
            seal = read_seal(checkpoint)
            refuse_code(checkpoint)
        except (ValueError, OSError) as error:
            notes.append(f"{checkpoint.name} is not whole ({error}) and would be set aside")
            continue
        changes = list(differences(seal["fingerprint"], fingerprint(preflight.config, preflight.prepared)))
        best = best_step(checkpoint) if best is None else best
        if not changes and not has_best(checkpoints) and step_of(checkpoint) >= best:
            lost = f"would be set aside: the best adapter, of step {best}, is not whole and would be made again"
            notes.append(f"{checkpoint.name} {lost}")
            continue
        return _resume(f"would go on from {checkpoint.name}", [*notes, *_set_aside(checkpoints)], changes)
    aside = _set_aside(checkpoints)
    sealed = [*checkpoints.glob(f"checkpoint-*/{SEAL}"), *checkpoints.glob(f"{ASIDE}checkpoint-*/{SEAL}")]
    if sealed and best is None:
        found = f"no checkpoint in {checkpoints} is whole: {'; '.join([*notes, *aside])}"
        return failed(found, f"{command('src/train.py')} --fresh")
    found = "; ".join([f"would start {folder.name} from step 0", *notes, *aside])  # notes: killed in its first save
    return passed(found) if best is None else warned(found, f"{command('src/train.py')} --fresh starts anew")


def _set_aside(checkpoints: Path) -> list[str]:
    """What earlier starts have set aside, and why where that can still be seen."""
    from finetune.runs.checkpoints import ASIDE, SEAL, read_seal

    notes = []
    for folder in sorted(checkpoints.glob(f"{ASIDE}*")):
        reason = ""
        try:
            if (folder / SEAL).is_file():
                read_seal(folder)
        except (ValueError, OSError) as error:
            reason = f" ({error})"
        notes.append(f"set aside before: {folder.name}{reason}")
    return notes


def _resume(goes_on: str, notes: list[str], changes: list[str]) -> Finding:
    found = "; ".join([goes_on, *notes])
    if changes:
        return failed(
            f"{found}, but changed since: {'; '.join(changes)}",
            f"{command('src/train.py')} --fresh, or --resume-changed",
        )
    return warned(found, f"{command('src/train.py')} --fresh starts anew") if notes else passed(found)


def _receipt(preflight: Preflight) -> Finding:
    from finetune.runs import receipt

    assert preflight.receipt is not None  # only chosen where there is one
    ours = receipt.make(preflight.config, preflight.prepared)
    differ, by_design = receipt.differences(ours, receipt.read(preflight.receipt))
    apart = f"; by design: {'; '.join(by_design)}" if by_design else ""
    if differ:
        return failed(
            f"not the same training: {'; '.join(differ)}{apart}", "make data and config here what they were there"
        )
    return passed(f"the same training as {preflight.receipt}{apart}")


_ROWS = ("data.rows",)
CHECKS = (
    Check("state.run", "what a start would do: a new run, or go on from which checkpoint", _state, needs=_ROWS),
    Check("receipt", "with --receipt: this is the training that the receipt is of", _receipt, needs=_ROWS),
)
