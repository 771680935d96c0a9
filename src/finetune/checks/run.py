"""The run itself: its arithmetic, the folders it writes, where its metrics go, and what its folder already holds."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from datetime import datetime
from pathlib import Path

from finetune.checks.check import Check, Finding, failed, passed, skipped, warned
from finetune.checks.preflight import Preflight
from finetune.cli import advice, command
from finetune.files import GIB, make_folder, resolve, shown
from finetune.machine.device import capacity_gib, memory_errors_explained, prepare_device
from finetune.model import hub
from finetune.plan.fit import fit, what_would_fit
from finetune.plan.memory import peak_gib
from finetune.plan.plan import hours_problem
from finetune.plan.schedule import check_budget
from finetune.runs.folder import find_run, lock_holder
from finetune.training.wandb_access import KEY_FILE, NO_KEY, wandb_offline_reason, wandb_sync

BASE_GIB = 13.5  # three safetensors files of 14.5 GB together


def _steps(preflight: Preflight) -> Finding:
    plan = preflight.plan
    found = (
        f"{plan.steps:,} steps of {plan.effective_batch_size}, {plan.warmup_steps:,} of warm-up, "
        f"evaluations {plan.evaluations:,}, checkpoints {plan.checkpoints:,}"
    )
    problem = plan.schedule_problem(preflight.config.training.eval_steps)
    return warned(f"{found}; {problem[0]}", problem[1]) if problem else passed(found)


def _memory(preflight: Preflight) -> Finding:
    config, free = preflight.config, preflight.machine.memory_free_gib
    expected = peak_gib(config, preflight.geometry)
    found = f"{expected:.1f} GiB expected, {free:.1f} free"
    if expected <= free:
        return passed(found)
    smaller = fit(config, preflight.geometry, free)
    return failed(found, smaller.command if smaller else "close other programs, or take a machine with more memory")


def _hours(preflight: Preflight) -> Finding:
    training, plan = preflight.config.training, preflight.plan
    budget = training.time_budget_hours
    problem = hours_problem(plan, preflight.config)
    if problem:
        return warned(*problem)
    if plan.hours is None:
        limit = "" if budget is None else f"; the rehearsal will compare with training.time_budget_hours {budget:g}"
        return skipped(f"not measured on this platform{limit}")
    found = f"{plan.hours:.1f} h expected"
    if budget is None or plan.hours <= budget:
        return passed(found)
    epochs = math.floor(100 * training.num_train_epochs * budget / plan.hours) / 100  # rounded up it would not fit
    share = f"--set training.num_train_epochs={epochs:g}"
    whole = f"--set training.time_budget_hours={plan.hours * 1.1:.1f}"
    return warned(f"{found}, training.time_budget_hours is {budget:g}", f"{share}, or {whole}")


def _write(folder: Path) -> str | None:
    """Why `folder` cannot be written, by doing: a file in a new subfolder, synced, moved up by a rename."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".check-") as made:
            path = Path(made) / "file"
            with path.open("wb") as stream:
                stream.write(b"written")
                stream.flush()
                os.fsync(stream.fileno())
            path.rename(folder / f"{Path(made).name}.moved").unlink()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _output(preflight: Preflight) -> Finding:
    folder = resolve(preflight.config.output.dir)
    if reason := _write(folder):
        return failed(
            f"{shown(folder)} cannot be written: {reason}",
            f"sudo chown -R $(id -u) {shown(folder)}, or --set output.dir=FOLDER",
        )
    return passed(f"{shown(folder)}: written, synced, renamed")


def caches() -> dict[str, Path]:
    """Folders that libraries write to, by the variable that moves each."""
    home = Path(os.environ.get("HOME") or "/nonexistent")
    return {
        "HF_HOME": Path(
            os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "huggingface"
        ),
        "TRITON_CACHE_DIR": Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache"),
        "TMPDIR": Path(tempfile.gettempdir()),
    }


def _caches(preflight: Preflight) -> Finding:
    """Only those that this run will write: a base that is here already may lie where nobody can write."""
    model, folders = preflight.config.model, caches()
    if preflight.tokenizer_folder is not None or hub.is_cached(model.name, model.revision):
        del folders["HF_HOME"]
    if preflight.platform.name != "h100":
        del folders["TRITON_CACHE_DIR"]
    wrong = {name: reason for name, folder in folders.items() if (reason := _write(folder))}
    if wrong:
        each = "; ".join(f"{folders[name]} cannot be written: {reason}" for name, reason in wrong.items())
        fresh = "the UID that filled it back into .env, or docker compose down --volumes, which empties it"
        return failed(each, advice(f"export {' '.join(f'{name}=FOLDER' for name in wrong)}", fresh))
    return passed(", ".join(map(str, folders.values())) + f" {'is' if len(folders) == 1 else 'are'} writable")


def _disk(preflight: Preflight) -> Finding:
    config, folder = preflight.config, resolve(preflight.config.output.dir)
    make_folder(folder)
    free_gib, needed_gib = shutil.disk_usage(folder).free / GIB, preflight.plan.disk_gib
    parts = f"{needed_gib:.2f} for checkpoints, adapter and data"
    if preflight.tokenizer_folder is None and not hub.is_cached(config.model.name, config.model.revision):
        cache = _existing(caches()["HF_HOME"])
        if cache.stat().st_dev == folder.stat().st_dev:
            needed_gib, parts = needed_gib + BASE_GIB, f"{parts}, {BASE_GIB} for the base"
        elif shutil.disk_usage(cache).free / GIB < BASE_GIB:
            found = f"{shutil.disk_usage(cache).free / GIB:.1f} GiB free in {cache}, {BASE_GIB} needed for the base"
            return failed(found, "free some, or export HF_HOME=FOLDER on another disk")
    found = f"{free_gib:.1f} GiB free in {shown(folder)}, {needed_gib:.2f} needed ({parts})"
    if free_gib < needed_gib:
        return failed(found, "free some, --set training.save_total_limit=1, or --set output.dir=FOLDER on another disk")
    return passed(found)


def _existing(folder: Path) -> Path:
    """The nearest folder above, or this one, that is there."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _wandb(preflight: Preflight) -> Finding:
    report_to = preflight.config.tracking.report_to
    if report_to != "wandb":
        return skipped(f"tracking.report_to is {report_to}")
    reason = wandb_offline_reason()
    if reason is None:
        return passed("wandb answers, and a key is here")
    later = f"{wandb_sync('adapters/RUN')} sends it later"
    return warned(
        f"wandb will be offline: {reason}; TensorBoard files and metrics.jsonl are written",
        f"{advice('export WANDB_API_KEY=..., or ', f'{KEY_FILE} in .env, or ') if reason == NO_KEY else ''}{later}",
    )


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


def _rehearsal(preflight: Preflight) -> Finding:
    from finetune.model import load
    from finetune.training import rehearsal

    config, platform = preflight.config, preflight.platform
    folder = resolve(config.output.dir) / f".rehearsal-{os.getpid()}"
    prepare_device(platform)
    capacity = capacity_gib(platform)
    with memory_errors_explained(what_would_fit(config, preflight.geometry, capacity)):
        peft_model = load.load_model(config, platform.device)
    tokenizer = load.make_tokenizer(preflight.chat, config.dataset.padding_side)
    found = rehearsal.rehearse(peft_model, tokenizer, preflight.prepared, config, folder, capacity)
    partial = check_budget(config.training, found.schedule, found.pace, elapsed=0)
    chosen = f"checkpointed layers {found.checkpointed.reason}" if found.checkpointed.reason else None
    return passed("; ".join(filter(None, (chosen, found.sentence(datetime.now()), partial))))


_ROWS, _GEOMETRY = ("data.rows",), ("model.geometry",)
PATHS = (
    Check("paths.output", "output.dir can be written, by doing", _output),
    Check("paths.caches", "the libraries' caches can be written, by doing", _caches),
)
CHECKS = (
    Check("plan.steps", "steps, warm-up, evaluations and checkpoints", _steps, needs=_ROWS, level="warn"),
    Check("plan.memory", "free memory against the expected peak", _memory, ("cpu",), _GEOMETRY),
    Check("plan.hours", "expected hours against training.time_budget_hours", _hours, needs=_ROWS, level="warn"),
    Check("paths.disk", "free disk against base, checkpoints and adapter", _disk, needs=_ROWS),
    Check("tracking.wandb", "wandb has a key and answers, or will be offline", _wandb, level="warn", network=True),
    Check("state.run", "what a start would do: a new run, or go on from which checkpoint", _state, needs=_ROWS),
    Check("receipt", "with --receipt: this is the training that the receipt is of", _receipt, needs=_ROWS),
    Check(
        "rehearsal",
        "with --deep: the largest batches, an evaluation, a save and a load",
        _rehearsal,
        needs=_ROWS,
        deep=True,
    ),
)
