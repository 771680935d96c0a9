"""The data a run trains on: files -> checked, split and encoded rows, through a cache -> datasets for the trainer.

A stream from end to end: token arrays come from `encode.chunks` in file order and are written at once, so memory does
not grow with the data but for a few numbers a row.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from finetune.config.schema import DEFAULT_VALIDATION_FILE, DatasetConfig
from finetune.data.encode import Recipe, Statistics, chunks
from finetune.data.jsonl import open_lines
from finetune.data.packing import pack
from finetune.data.store import Rows, SplitWriter, first_pair
from finetune.data.tokenizer import Chat, load_chat
from finetune.errors import CheckFailed, ConfigError, DataError
from finetune.files import make_folder, resolve, sha256, write_json
from finetune.wording import counted, lines

LISTED_PROBLEMS = 20
MOST_KEYS = 100  # different keys beside "messages" that are counted; a file may have a new one in each row
PARALLEL_FROM_BYTES = 4_000_000  # below this, starting worker processes takes longer than the work
SAMPLED_FROM_BYTES = 1_000_000  # below this, comparing every row with mistral-common takes less than a second
MOST_WORKERS = 8  # each holds two tokenizers in some 80 MiB, and one process has to write what they send


@dataclass(frozen=True)
class Prepared:
    """Train and validation rows, ready for the trainer.

    `validation` has dataset.max_validation_rows of the held-out rows; `statistics` counts all of them. `files` and
    `tokens` are what the manifest records of them; `whole` is what the receipt does: `SplitWriter.whole` of each split,
    which does not depend on the length.
    """

    train: Rows
    validation: Rows
    statistics: dict[str, Statistics]
    sequences: list[list[int]] | None
    files: dict[str, dict[str, Any]]
    tokens: dict[str, dict[str, str]]
    whole: dict[str, dict[str, Any]]
    split_reason: str
    chat: Chat


def prepare(dataset: DatasetConfig, recipe: Recipe, packing: bool, cache: Path, workers: int | None = None) -> Prepared:
    """Read, check, split and encode the data, or take all that from the cache below `cache`.

    Raises ConfigError (a file is absent), DataError (bad rows, an empty split, a row in train and validation both) and
    CheckFailed (a row's tokens are not mistral-common's, or not the saved tokenizer's).
    """
    train_path, validation_path, split_reason = _files(dataset)
    if dataset.max_rows is not None:
        split_reason += f"; of {dataset.train_file} only the first {dataset.max_rows} rows are read (dataset.max_rows)"
    paths = {"train": train_path} | ({"validation": validation_path} if validation_path else {})
    files = {name: {"path": str(path), "sha256": sha256(path)} for name, path in paths.items()}
    chat = load_chat(Path(recipe.tokenizer_folder) if recipe.tokenizer_folder else None)
    if recipe.certificate is True and sum(path.stat().st_size for path in paths.values()) < SAMPLED_FROM_BYTES:
        recipe = replace(recipe, certificate="every_row")
    key = _cache_key(files, recipe, dataset, chat)
    folder = cache / key
    if not (folder / "summary.json").is_file():
        make_folder(cache)
        with (cache / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits, and finds what the first one made
            if not (folder / "summary.json").is_file():
                _write_cache(folder, paths, recipe, dataset, workers)
    summary = json.loads((folder / "summary.json").read_text())
    train = Rows(folder / "train.arrow")
    validation = Rows(folder / "validation.arrow", dataset.max_validation_rows)
    return Prepared(
        train,
        validation,
        {name: Statistics.from_json(values) for name, values in summary["statistics"].items()},
        pack(train.lengths.tolist(), recipe.max_seq_length) if packing else None,
        {name: {**entry, "rows": summary["file_rows"][name]} for name, entry in files.items()},
        summary["tokens"],
        summary["whole"],
        split_reason,
        chat,
    )


def _files(dataset: DatasetConfig) -> tuple[Path, Path | None, str]:
    train = resolve(dataset.train_file)
    share = f"{dataset.validation_split:.0%} of the rows, chosen by content, are held out"
    open_lines(train, ", or try with --set dataset.train_file=data/sample/train.jsonl").close()
    if dataset.validation_file is None:
        return train, None, f"no validation file: {share}"
    validation = resolve(dataset.validation_file)
    if validation.is_file():
        return train, validation, f"validation rows are those of {dataset.validation_file}"
    if dataset.validation_file == DEFAULT_VALIDATION_FILE:
        return train, None, f"{DEFAULT_VALIDATION_FILE} is not there: {share}"
    raise ConfigError(
        f"dataset.validation_file: {validation}: not there", fix="set a file that is, or null for a split"
    )


def _cache_key(files: dict[str, dict[str, Any]], recipe: Recipe, dataset: DatasetConfig, chat: Chat) -> str:
    """Content, template, tokenizer, length and this code: whatever decides a token is in the key."""
    here = Path(__file__).parent
    code = [sha256(here / f"{name}.py") for name in ("template", "tokenizer", "jsonl", "encode", "store", "prepare")]
    parts = [
        {name: entry["sha256"] for name, entry in files.items()},
        {**asdict(recipe), "tokenizer_folder": chat.fingerprint},
        [dataset.validation_split, dataset.max_rows, dataset.on_bad_row, code],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def _write_cache(
    folder: Path, paths: dict[str, Path], recipe: Recipe, dataset: DatasetConfig, workers: int | None
) -> None:
    """Fill `folder`, whole or not at all."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # only a killed process can have left it: the lock is ours
    make_folder(partial)
    try:
        writers = {name: SplitWriter(partial / f"{name}.arrow") for name in ("train", "validation")}
        file_rows = {name: _read_file(name, paths, recipe, dataset, writers, workers) for name in paths}
        if dataset.on_bad_row == "fail":
            _refuse_bad_rows(paths, writers)
        tokens = {name: writer.close() for name, writer in writers.items()}
        _check_splits(writers, paths, dataset.max_rows)
        summary = {
            "statistics": {name: asdict(writer.statistics) for name, writer in writers.items()},
            "file_rows": file_rows,
            "tokens": tokens,
            "whole": {name: writer.whole() for name, writer in writers.items()},
        }
        write_json(partial / "summary.json", summary)
        try:
            partial.rename(folder)
        except OSError:
            if not (folder / "summary.json").is_file():  # else another process made the same a moment earlier
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read_file(
    name: str,
    paths: dict[str, Path],
    recipe: Recipe,
    dataset: DatasetConfig,
    writers: dict[str, SplitWriter],
    workers: int | None,
) -> int:
    """Stream one file into the writers; returns how many of its rows were written."""
    path = paths[name]
    if workers is None:
        workers = worker_count() if path.stat().st_size >= PARALLEL_FROM_BYTES else 0
    held_out = 0 if "validation" in paths else round(dataset.validation_split * 2**64)
    statistics = writers[name].statistics
    rows = 0
    for chunk in chunks(path, recipe, workers, dataset.max_rows if name == "train" else None):
        if chunk.mismatch:
            raise CheckFailed(
                f"certificate: {path}:{chunk.mismatch}", "Report this row: no run may start on it.", between="\n"
            )
        for count in ("dropped_long", "encoded", "certified"):
            setattr(statistics, count, getattr(statistics, count) + getattr(chunk.statistics, count))
        statistics.bad += chunk.statistics.bad
        _count_keys(statistics.other_keys, chunk.statistics.other_keys)
        in_validation = chunk.digests < held_out if name == "train" else np.ones(len(chunk.digests), bool)
        writers["train"].write(chunk, ~in_validation)
        writers["validation"].write(chunk, in_validation)
        rows += int((chunk.lengths > 0).sum())
    statistics.dropped_bad = len(statistics.bad)
    return rows


def _count_keys(counts: dict[str, int], more: dict[str, int]) -> None:
    for key, count in more.items():
        if key in counts or len(counts) < MOST_KEYS:
            counts[key] = counts.get(key, 0) + count


def worker_count() -> int:
    """Processes to encode with: the cores this process may use, at most MOST_WORKERS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)


def _refuse_bad_rows(paths: dict[str, Path], writers: dict[str, SplitWriter]) -> None:
    """Raise DataError with every bad row as file:line and what was found, up to LISTED_PROBLEMS, then a count."""
    bad = [f"{paths[name]}:{line}: {text}" for name in paths for line, text in writers[name].statistics.bad]
    if bad:
        fix = "Mend them, or leave them out with --set dataset.on_bad_row=drop"
        found = f"data: {counted(len(bad), 'bad row')}\n{lines(bad, LISTED_PROBLEMS)}"
        raise DataError(found, fix, between="\n")


def _check_splits(writers: dict[str, SplitWriter], paths: dict[str, Path], max_rows: int | None) -> None:
    train, validation = writers["train"], writers["validation"]
    if train.statistics.rows == 0:
        dropped = train.statistics.dropped_long
        why = f" ({dropped} were longer than model.max_seq_length)" if dropped else ""
        advice = "raise model.max_seq_length" if dropped else "add rows"
        raise DataError(f"data: {paths['train']} leaves no row to train on{why}", advice)
    if validation.statistics.rows == 0:
        where = paths.get("validation", paths["train"])
        more = "add rows" if max_rows is None else f"raise dataset.max_rows above {max_rows}"
        advice = f"name a dataset.validation_file, {more}, or raise dataset.validation_split"
        raise DataError(f"data: {where} leaves no row for validation ({train.statistics.rows} to train on)", advice)
    pair = first_pair(train, validation, "digests")
    if pair:
        shared = len(np.intersect1d(train.kept("digests"), validation.kept("digests")))
        count = "1 row stands" if shared == 1 else f"{shared:,} rows stand"
        first = f"{paths['train']}:{pair[0]} is {paths['validation']}:{pair[1]}"
        raise DataError(f"data: {count} in train and validation both, the first: {first}", "remove them from one")
    leaks = np.isin(validation.kept("normalised"), train.kept("normalised"))  # none is exact: that was refused
    validation.statistics.normalised_leaks = int(leaks.sum())
    validation.statistics.first_leak = first_pair(train, validation, "normalised")
