"""Checks of what a run writes to: output folder, caches, disk and tracker."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from finetune.checks.preflight import Preflight
from finetune.checks.runner import Check, Finding, failed, passed, skipped, warned
from finetune.cli import advice
from finetune.files import GIB, make_folder, nearest_folder, quoted, resolve, shown
from finetune.machine.platforms import quantized_on
from finetune.model import hub, packed_base
from finetune.plan.memory import memory_parts
from finetune.runs.folder import find_run
from finetune.training.wandb_access import KEY_FILE, NO_KEY, wandb_offline_reason, wandb_sync

BASE_GIB = 13.5  # three safetensors files, 14.5 GB together


def _write(folder: Path) -> str | None:
    """Write a file in a new subfolder, sync it and move it up; return why that fails, or None."""
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
    reason = _write(folder)
    if reason:
        fix = f"sudo chown -R $(id -u) {quoted(folder)}, or --set output.dir=FOLDER"
        return failed(f"{shown(folder)} cannot be written: {reason}", fix)
    return passed(f"{shown(folder)}: written, synced, renamed")


def caches() -> dict[str, Path]:
    """Return the folders that libraries write to, by the variable that sets each."""
    home = Path(os.environ.get("HOME") or "/nonexistent")
    return {
        "HF_HOME": Path(
            os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "huggingface"
        ),
        "TRITON_CACHE_DIR": Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache"),
        **{name: Path(os.environ[name]) for name in ("TORCHINDUCTOR_CACHE_DIR",) if name in os.environ},
        "TMPDIR": Path(tempfile.gettempdir()),
    }


GROWING = {"HF_HOME": ("hub", "xet"), "TORCHINDUCTOR_CACHE_DIR": ("",)}  # caches that add files to existing folders


def _closed(name: str, folder: Path, base: str) -> Path | None:
    """Return a folder in a cache that this user cannot write; folders of bases other than `base` are ignored."""
    for top in (folder / inside for inside in GROWING.get(name, ()) if (folder / inside).is_dir()):
        for parent, names, _ in os.walk(top):
            names[:] = [name for name in names if "--" not in name or name == base]  # the Hub's: models--OWNER--NAME
            for path in (Path(parent), *(Path(parent, name) for name in names)):
                if not os.access(path, os.W_OK | os.X_OK):
                    return path
    return None


def _caches(preflight: Preflight) -> Finding:
    """Check only caches that this run writes: a cached base may be on a read-only disk."""
    model, folders = preflight.config.model, caches()
    if preflight.tokenizer_folder is not None or hub.is_cached(model.name, model.revision):
        del folders["HF_HOME"]
    if not preflight.platform.nvidia:
        for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
            folders.pop(name, None)
    base = f"models--{model.name.replace('/', '--')}"
    wrong = {
        name: f"{folder} cannot be written: {reason}" for name, folder in folders.items() if (reason := _write(folder))
    }
    for name in folders.keys() - wrong.keys():
        if closed := _closed(name, folders[name], base):
            wrong[name] = f"{closed} cannot be written: it belongs to uid {closed.stat().st_uid}"
    if wrong:
        removed = "docker compose --profile program down --volumes, which also removes the downloaded base model"
        fresh = f"correct HF_CACHE in .env if it is set; else make that user the owner of adapters again, or {removed}"
        each = "; ".join(wrong[name] for name in folders if name in wrong)
        return failed(each, advice(f"export {' '.join(f'{name}=FOLDER' for name in folders if name in wrong)}", fresh))
    return passed(", ".join(map(str, folders.values())) + f" {'is' if len(folders) == 1 else 'are'} writable")


def _disk(preflight: Preflight) -> Finding:
    config, folder = preflight.config, resolve(preflight.config.output.dir)
    make_folder(folder)
    free_gib, needed_gib = shutil.disk_usage(folder).free / GIB, preflight.plan.disk_gib
    parts = f"{needed_gib:.2f} for checkpoints, adapter and data"
    packed_gib = _packed_gib(preflight, folder / ".cache")
    if packed_gib:
        needed_gib, parts = needed_gib + packed_gib, f"{parts}, {packed_gib:.2f} for the packed base"
    if preflight.tokenizer_folder is None and not hub.is_cached(config.model.name, config.model.revision):
        cache = nearest_folder(caches()["HF_HOME"])
        if cache.stat().st_dev == folder.stat().st_dev:
            needed_gib, parts = needed_gib + BASE_GIB, f"{parts}, {BASE_GIB} for the base"
        elif shutil.disk_usage(cache).free / GIB < BASE_GIB:
            found = f"{shutil.disk_usage(cache).free / GIB:.1f} GiB free in {cache}, {BASE_GIB} needed for the base"
            return failed(found, "free some, or export HF_HOME=FOLDER on another disk")
    found = f"{free_gib:.1f} GiB free in {shown(folder)}, {needed_gib:.2f} needed ({parts})"
    if free_gib < needed_gib:
        return failed(found, "free some, --set training.save_total_limit=1, or --set output.dir=FOLDER on another disk")
    return passed(found)


def _packed_gib(preflight: Preflight, cache: Path) -> float:
    """Return the size of the packed base that the first load will save; 0 if it saves none or has saved it."""
    config, device = preflight.config, preflight.platform.device
    if quantized_on(device) == device:
        return 0
    if packed_base.cache_in(cache).folder_of(packed_base.key(config.model, config.quantization)).is_dir():
        return 0
    return memory_parts(config.changed("quantization", storage="packed"), preflight.geometry)["weights"]


def _wandb(preflight: Preflight) -> Finding:
    report_to = preflight.config.tracking.report_to
    if report_to != "wandb":
        return skipped(f"tracking.report_to is {report_to}")
    reason = wandb_offline_reason()
    if reason is None:
        return passed("wandb answers, and there is a key")
    later = f"{wandb_sync('adapters/RUN')} sends it later"
    return warned(
        f"wandb will be offline: {reason}; TensorBoard files and metrics.jsonl are written",
        f"{advice('export WANDB_API_KEY=..., or ', f'{KEY_FILE} in .env, or ') if reason == NO_KEY else ''}{later}",
    )


def _copy(preflight: Preflight) -> Finding:
    from finetune.runs import copies

    output = preflight.config.output
    target = copies.target_of(output)
    if target is None:
        return skipped("output.copy_to is null")
    run = find_run(preflight.config, fresh=False)[0]
    problem = _unwritable(target.path) if isinstance(target, copies.Folder) else None
    if problem:
        return failed(*problem)
    there = target.check(run.name) if isinstance(target, copies.Repository) else target.manifest(run.name)
    if not copies.same_run(run, there):
        fix = f"{target.back(run)}, which resumes that one, or --set tracking.run_name=NAME"
        return failed(f"{target.place(run.name)} contains another run", fix)
    if isinstance(target, copies.Repository):
        return passed(f"{target.id} is private, and this token can write to it")
    if not target.other_disk:
        found = f"{shown(target.path)} is on the same disk as output.dir, so the copy is lost with it"
        return warned(found, "--set output.copy_to=FOLDER on another disk, or hf://OWNER/NAME")
    return passed(f"{shown(target.path)}: written, synced, renamed")


def _unwritable(folder: Path) -> tuple[str, str] | None:
    """Return why a run cannot be copied to `folder`, and what to type; None if it can."""
    if not folder.is_dir():
        return f"{shown(folder)} does not exist", f"mount the disk, or mkdir -p {quoted(folder)}"
    reason = _write(folder)
    if reason is None:
        return None
    fix = f"sudo chown $(id -u) {quoted(folder)}, or --set output.copy_to=FOLDER"
    return f"{shown(folder)} cannot be written: {reason}", fix


_ROWS = ("data.rows",)
BEFORE_DATA = (  # the data is cached in output.dir
    Check("paths.output", "output.dir is writable, tested with a real write", _output),
    Check("paths.caches", "the libraries' caches are writable, tested with a real write", _caches),
)
CHECKS = (
    Check("paths.disk", "free disk against base, checkpoints and adapter", _disk, needs=_ROWS),
    Check("paths.copy", "output.copy_to can be written", _copy, network=True),
    Check("tracking.wandb", "wandb has a key and answers, or will be offline", _wandb, level="warn", network=True),
)
