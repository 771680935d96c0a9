"""The data a run trains on: files -> checked, split and encoded rows, through a cache -> datasets for the trainer.

A stream from end to end: encoded rows come in file order and are written at once, whole; then they are read again from
a memory map, cut and divided. So memory does not grow with the data but for a few numbers a row, and another length or
split encodes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from finetune.config.schema import DEFAULT_VALIDATION_FILE, DatasetConfig
from finetune.data.cache import Cache
from finetune.data.encode import Chunk, Recipe, Statistics
from finetune.data.encoded_file import ROWS, Encoding, Source, recipe_key
from finetune.data.formats import foreign
from finetune.data.formats.containers import iconv
from finetune.data.jsonl import open_lines
from finetune.data.packing import pack
from finetune.data.selection import first_copies, held_out
from finetune.data.store import EncodedFile, Rows, Split, first_pair, from_arrow
from finetune.data.tokenizer import Chat, load_chat
from finetune.errors import ConfigError, DataError
from finetune.files import resolve, sha256
from finetune.wording import counted, lines

LISTED_PROBLEMS = 20
LISTED_DROPPED = 5
SAMPLED_FROM_BYTES = 1_000_000  # below this, comparing every row with mistral-common takes less than a second


@dataclass(frozen=True)
class Prepared:
    """Train and validation rows, ready for the trainer.

    `validation` has dataset.max_validation_rows of the held-out rows; `statistics` counts all of them. `files` and
    `tokens` are what the manifest records of them; `whole` is what the receipt does: `Split.whole` of each split,
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


def prepare(
    dataset: DatasetConfig, recipe: Recipe, packing: bool, cache: Cache, workers: int | None = None
) -> Prepared:
    """Read, check, split and encode the data, or take all that from the cache.

    `workers` None takes as many processes as pay. Raises ConfigError (a file is absent), DataError (bad rows, an empty
    split, a row in train and validation both, a file that changes meanwhile), OutOfResource (disk, memory) and
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
    key = recipe_key(recipe, chat)
    share = None if "validation" in paths else dataset.validation_split
    entries = {}
    for name, path in paths.items():
        source = Source(name, path, files[name]["sha256"], dataset.max_rows if name == "train" else None)
        encoding = Encoding(source, recipe, workers, cache, key)
        folder, facts = cache.entry(encoding.key(), encoding.fill)
        entries[name] = _Entry(EncodedFile(folder / ROWS), facts)
    splits = {"train": Split(), "validation": Split()}
    rows = {name: _divide(name, entry, splits, recipe, dataset, share) for name, entry in entries.items()}
    _refuse_bad_rows(paths, splits, dataset)
    tokens = {name: split.close() for name, split in splits.items()}
    _check_splits(splits, paths, dataset.max_rows)
    train = splits["train"].rows(entries["train"].rows)
    return Prepared(
        train,
        splits["validation"].rows(entries.get("validation", entries["train"]).rows, dataset.max_validation_rows),
        {name: split.statistics for name, split in splits.items()},
        pack(train.lengths.tolist(), recipe.max_seq_length) if packing else None,
        {name: {**entry, "rows": rows[name]} for name, entry in files.items()},
        tokens,
        {name: split.whole() for name, split in splits.items()},
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
    if validation.exists():
        open_lines(validation).close()
        return train, validation, f"validation rows are those of {dataset.validation_file}"
    if dataset.validation_file == DEFAULT_VALIDATION_FILE:
        return train, None, f"{DEFAULT_VALIDATION_FILE} is not there: {share}"
    raise ConfigError(
        f"dataset.validation_file: {validation}: not there", fix="set a file that is, or null for a split"
    )


class _Entry(NamedTuple):
    """What the cache has of one data file."""

    rows: EncodedFile
    facts: dict[str, Any]


def _divide(
    name: str,
    entry: _Entry,
    splits: dict[str, Split],
    recipe: Recipe,
    dataset: DatasetConfig,
    share: float | None,
) -> int:
    """Cut the rows of a file and add each to its split; returns of how many something is kept."""
    learnt = entry.rows.turns() > 0
    wanted_rows = learnt.copy()
    if dataset.on_duplicate == "drop":
        wanted_rows[learnt] = first_copies(entry.rows.column("digests")[learnt])
    held = np.full(len(learnt), name == "validation")
    if name == "train" and share is not None:
        held[wanted_rows] = held_out(entry.rows.column("openings")[wanted_rows], share)
    statistics = splits[name].statistics
    statistics.bad += [(line, text) for line, text in entry.facts["bad"]]
    statistics.other_keys = entry.facts["other_keys"]
    statistics.dropped_without_loss = int((~learnt).sum())
    statistics.dropped_duplicates = int((learnt & ~wanted_rows).sum())
    rows = 0
    for first, batch in zip(entry.rows.starts, entry.rows.batches, strict=False):
        chunk = from_arrow(batch)
        kept = chunk.kept(recipe.max_seq_length)
        if not recipe.truncation:
            kept = np.where(chunk.lengths <= recipe.max_seq_length, kept, 0)
            statistics.bad += _too_long(chunk, recipe.max_seq_length)
        else:
            statistics.dropped_long += int(((chunk.turns > 0) & (kept == 0)).sum())
        statistics.encoded += len(kept)
        statistics.certified += int(chunk.compared.sum())
        here = slice(int(first), int(first) + len(kept))
        wanted, in_validation = wanted_rows[here], held[here]
        splits["train"].add(int(first), chunk, kept, wanted & ~in_validation)
        splits["validation"].add(int(first), chunk, kept, wanted & in_validation)
        rows += int((wanted & (kept > 0)).sum())
    statistics.bad.sort()
    statistics.dropped_bad = len(statistics.bad)
    return rows


def _too_long(chunk: Chunk, limit: int) -> list[tuple[int, str]]:
    long = (chunk.lengths > limit) & (chunk.turns > 0)
    found = zip(chunk.lines[long].tolist(), chunk.lengths[long].tolist(), strict=True)
    why = f"model.max_seq_length is {limit}, and dataset.truncation is false"
    return [(line, f"{length} tokens, {why}") for line, length in found]


def _refuse_bad_rows(paths: dict[str, Path], splits: dict[str, Split], dataset: DatasetConfig) -> None:
    """Raise DataError where no bad row is allowed, or fewer are.

    It lists every bad row as file:line and what was found, up to LISTED_PROBLEMS, and counts the others; the name of a
    known format takes the list's place.
    """
    statistics = {name: splits[name].statistics for name in paths}
    bad = [f"{paths[name]}:{line}: {text}" for name in paths for line, text in statistics[name].bad]
    counts = [split.statistics for split in splits.values()]
    rows = len(bad) + sum(it.rows + it.dropped_long + it.dropped_without_loss for it in counts)
    if not bad or (dataset.on_bad_row == "drop" and len(bad) <= dataset.max_bad_share * rows):
        return
    name = next(name for name in paths if statistics[name].bad)
    line, text = statistics[name].bad[0]
    found = f"data: {counted(len(bad), 'bad row')}"
    named = foreign.named_line(paths[name], name, line)
    if named:
        raise DataError(f"{found}, the first {paths[name]}:{line}: {named[0]}", named[1], between="\n")
    if dataset.on_bad_row == "drop":
        found += f" of {rows:,} ({len(bad) / rows:.0%}), above dataset.max_bad_share ({dataset.max_bad_share:.0%})"
    listing = lines(bad, LISTED_DROPPED if dataset.on_bad_row == "drop" else LISTED_PROBLEMS)
    if text.startswith("not UTF-8"):
        fix = f"Make it UTF-8, {iconv('WINDOWS-1252', paths[name])}"
    elif 2 * len(bad) > rows:
        fix = "Fix them: more than half of the rows are bad. docs/data.md has the formats that can be converted"
    else:
        fix = f"Fix them, or leave them out with {_leaving_out(len(bad) / rows, dataset)}"
    raise DataError(f"{found}\n{listing}", fix, between="\n")


def _leaving_out(share: float, dataset: DatasetConfig) -> str:
    """The settings with which rows are left out of which `share` is bad."""
    settings = ["--set dataset.on_bad_row=drop"] * (dataset.on_bad_row == "fail")
    if share > dataset.max_bad_share:
        settings.append(f"--set dataset.max_bad_share={math.ceil(share * 100) / 100:g}")
    return " ".join(settings)


def _check_splits(splits: dict[str, Split], paths: dict[str, Path], max_rows: int | None) -> None:
    train, validation = splits["train"], splits["validation"]
    if train.statistics.rows == 0:
        too_long, without_loss = train.statistics.dropped_long, train.statistics.dropped_without_loss
        why, advice = "", "add rows"
        if too_long:
            why, advice = f" ({too_long} were longer than model.max_seq_length)", "raise model.max_seq_length"
        elif without_loss:
            why, advice = f" (in {without_loss} no turn carries loss)", "take weight 0 off the answers to be learnt"
        raise DataError(f"data: {paths['train']} leaves no row to train on{why}", advice)
    if validation.statistics.rows == 0:
        where = paths.get("validation", paths["train"])
        more = "add rows" if max_rows is None else f"raise dataset.max_rows above {max_rows}"
        advice = f"name a dataset.validation_file, {more}, or raise dataset.validation_split"
        if len(np.unique(train.kept("openings"))) == 1:
            advice = "all have the same system and first user message and stay together: name a dataset.validation_file"
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
    others = np.isin(validation.kept("openings"), train.kept("openings")) & ~leaks
    validation.statistics.opening_leaks = int(others.sum())
    validation.statistics.first_opening = first_pair(train, validation, "openings", others)
