"""Prepare a run's data: files -> validated, encoded rows in the cache -> splits of truncated rows.

Everything is streamed: rows are encoded in file order and written complete, then read through a memory map, truncated
and split. So memory grows only by a few numbers per row, and another length or split encodes nothing again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from finetune.config.schema import DEFAULT_VALIDATION_FILE, DatasetConfig
from finetune.data.cache import Cache
from finetune.data.encode import Chunk, Recipe
from finetune.data.encoded_file import ROWS, Encoding, Source, count_keys, recipe_key
from finetune.data.formats import foreign
from finetune.data.formats.containers import iconv
from finetune.data.jsonl import open_lines
from finetune.data.packing import pack
from finetune.data.selection import Selection, select
from finetune.data.split import Split, Statistics, count_leaks, first_pair
from finetune.data.store import EncodedFile, EncodedFiles, Place, Rows, from_arrow
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

    `validation` has at most dataset.max_validation_rows rows; `statistics` counts all. The manifest records `files`
    and `tokens`; the receipt records `whole` (`Split.whole` of each split), which does not depend on max_seq_length.
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


class DataFile(NamedTuple):
    """A data file: its name in the manifest, its split, and how often its rows are used."""

    name: str
    split: str
    path: Path
    weight: float = 1


class _Entry(NamedTuple):
    """A data file and its entry in the cache."""

    file: DataFile
    sha256: str
    rows: EncodedFile
    facts: dict[str, Any]


def prepare(
    dataset: DatasetConfig, recipe: Recipe, packing: bool, cache: Cache, workers: int | None = None
) -> Prepared:
    """Validate, encode and split the data; take what the cache has from there.

    `workers` None chooses the number of processes. Raises ConfigError (a missing file), DataError (bad rows, an empty
    split, a row in both train and validation, a file that changes while it is read), OutOfResource (disk, memory) and
    CheckFailed (a row's tokens differ from mistral-common's or the saved tokenizer's).
    """
    files, split_reason = _files(dataset)
    if dataset.rows_read:
        split_reason += f"; {dataset.rows_read} (dataset.max_rows)"
    chat = load_chat(Path(recipe.tokenizer_folder) if recipe.tokenizer_folder else None)
    if recipe.certificate is True and sum(file.path.stat().st_size for file in files) < SAMPLED_FROM_BYTES:
        recipe = replace(recipe, certificate="every_row")
    keeping_all = replace(cache, kept=max(cache.kept, len(files)))
    key = recipe_key(recipe, chat)
    entries = []
    for file in files:
        digest, max_rows = sha256(file.path), dataset.max_rows if file.split == "train" else None
        encoding = Encoding(Source(file.split, file.path, digest, max_rows), recipe, workers, keeping_all, key)
        folder, facts = keeping_all.entry(encoding.key(), encoding.fill)
        entries.append(_Entry(file, digest, EncodedFile(folder / ROWS, str(file.path)), facts))
    splits, rows = _make_splits(entries, recipe, dataset)
    _refuse_bad_rows(entries, splits, dataset)
    tokens = {name: split.close() for name, split in splits.items()}
    _check_splits(splits, entries, dataset.max_rows)
    train = splits["train"].rows()
    return Prepared(
        train,
        splits["validation"].rows(dataset.max_validation_rows),
        {name: split.statistics for name, split in splits.items()},
        pack(train.lengths.tolist(), recipe.max_seq_length) if packing else None,
        {entry.file.name: _recorded(entry, count) for entry, count in zip(entries, rows, strict=True)},
        tokens,
        {name: split.whole() for name, split in splits.items()},
        split_reason,
        chat,
    )


def _files(dataset: DatasetConfig) -> tuple[list[DataFile], str]:
    """The training files in order, then the validation file if there is one; and how validation rows are chosen."""
    train = []
    for number, file in enumerate(dataset.train_files, 1):
        path = resolve(file.path)
        open_lines(path, ", or try with --set dataset.train_file=data/sample/train.jsonl").close()
        train.append(DataFile("train" if number == 1 else f"train {number}", "train", path, file.weight))
    share = f"{dataset.validation_split:.0%} of the rows, chosen by content, are held out"
    if dataset.validation_file is None:
        return train, f"no validation file: {share}"
    validation = resolve(dataset.validation_file)
    if validation.exists():
        open_lines(validation).close()
        reason = f"validation rows are those of {dataset.validation_file}"
        return [*train, DataFile("validation", "validation", validation)], reason
    if dataset.validation_file == DEFAULT_VALIDATION_FILE:
        return train, f"no {DEFAULT_VALIDATION_FILE}: {share}"
    raise ConfigError(
        f"dataset.validation_file: no file {validation}", fix="name an existing file, or null for a split"
    )


def _recorded(entry: _Entry, rows: int) -> dict[str, Any]:
    """What the manifest records of a file, `rows` of which are used."""
    weight = {} if entry.file.weight == 1 else {"weight": entry.file.weight}
    return {"path": str(entry.file.path), "sha256": entry.sha256, **weight, "rows": rows}


def _make_splits(entries: list[_Entry], recipe: Recipe, dataset: DatasetConfig) -> tuple[dict[str, Split], list[int]]:
    """The splits, and how many rows of each file are used."""
    train = [entry for entry in entries if entry.file.split == "train"]
    given = entries[len(train) :]  # the validation file, or none
    files, drop = EncodedFiles([entry.rows for entry in train]), dataset.on_duplicate == "drop"
    held_out = EncodedFiles([entry.rows for entry in given]) if given else files
    splits = {"train": Split(files), "validation": Split(held_out)}
    weights = [entry.file.weight for entry in train]
    chosen = select(files, weights, 0 if given else dataset.validation_split, drop)
    starts = files.starts.tolist()
    rows = [
        _add_file(entry, start, chosen.of(slice(start, end)), splits, recipe)
        for entry, start, end in zip(train, starts, starts[1:], strict=False)
    ]
    for entry in given:
        of_given = select(held_out, [1], 0, drop)
        rows.append(_add_file(entry, 0, of_given._replace(held_out=of_given.times > 0), splits, recipe))
    return splits, rows


def _add_file(entry: _Entry, first: int, chosen: Selection, splits: dict[str, Split], recipe: Recipe) -> int:
    """Truncate the rows of a file and add the chosen ones to the splits; return how many rows are used.

    `first` is the number of its first row among those of all its split's files. Repeats follow after all rows.
    """
    statistics, rows = splits[entry.file.split].statistics, 0
    bad = [(line, text) for line, text in entry.facts["bad"]]
    for start, chunk, kept in _truncated(entry.rows, recipe):
        here = chosen.of(slice(start, start + len(kept)))
        if recipe.truncation:
            statistics.dropped_long += int(((chunk.turns > 0) & (kept == 0)).sum())
        else:
            bad += _too_long(chunk, recipe.max_seq_length)
        statistics.certified += int(chunk.compared.sum())
        splits["train"].add(first + start, chunk, kept, (here.times > 0) & ~here.held_out)
        splits["validation"].add(first + start, chunk, kept, here.held_out)
        rows += int(((here.times > 0) & (kept > 0)).sum())
    for turn in range(1, int(chosen.times.max(initial=0))):
        for start, chunk, kept in _truncated(entry.rows, recipe):
            here = chosen.of(slice(start, start + len(kept)))
            splits["train"].add(first + start, chunk, kept, (here.times > turn) & ~here.held_out)
    statistics.encoded += len(chosen.times)
    statistics.dropped_without_loss += int((~chosen.learned).sum())
    statistics.dropped_duplicates += int(chosen.copies.sum())
    statistics.left_out += int((chosen.learned & ~chosen.copies & (chosen.times == 0)).sum())
    statistics.bad += [(Place(entry.rows.source, line), text) for line, text in sorted(bad)]
    statistics.dropped_bad = len(statistics.bad)
    count_keys(statistics.other_keys, entry.facts["other_keys"])
    return rows


def _truncated(rows: EncodedFile, recipe: Recipe) -> Iterator[tuple[int, Chunk, np.ndarray]]:
    """Yield (number of its first row, chunk, how many tokens of each row are kept) for each chunk of a file."""
    for start, batch in zip(rows.starts.tolist(), rows.batches, strict=False):
        chunk = from_arrow(batch)
        kept = chunk.kept(recipe.max_seq_length)
        yield start, chunk, kept if recipe.truncation else np.where(chunk.lengths <= recipe.max_seq_length, kept, 0)


def _too_long(chunk: Chunk, limit: int) -> list[tuple[int, str]]:
    long = (chunk.lengths > limit) & (chunk.turns > 0)
    found = zip(chunk.lines[long].tolist(), chunk.lengths[long].tolist(), strict=True)
    why = f"model.max_seq_length is {limit}, and dataset.truncation is false"
    return [(line, f"{length} tokens, {why}") for line, length in found]


def _refuse_bad_rows(entries: list[_Entry], splits: dict[str, Split], dataset: DatasetConfig) -> None:
    """Raise DataError if there are more bad rows than dataset.on_bad_row and dataset.max_bad_share allow.

    It lists bad rows as file:line and problem, up to LISTED_PROBLEMS, and counts the others; if they are in a known
    format, it names that instead.
    """
    bad = [row for split in splits.values() for row in split.statistics.bad]
    rows = sum(len(entry.facts["bad"]) for entry in entries) + sum(it.statistics.encoded for it in splits.values())
    drop = dataset.on_bad_row == "drop"
    if not bad or (drop and len(bad) <= dataset.max_bad_share * rows):
        return
    first, text = bad[0]
    entry = next(entry for entry in entries if entry.rows.source == first.file)
    path, split = entry.file.path, entry.file.split
    refused = foreign.some_rows(path, [line for line, _ in entry.facts["bad"][:LISTED_PROBLEMS]])
    found = f"data: {counted(len(bad), 'bad row')}"
    for line, row in refused.items():
        named = foreign.named_row(row, path, split)
        if named:
            which = "the first" if line == first.line else "for example"
            raise DataError(f"{found}, {which} {first._replace(line=line)}: {named[0]}", named[1], between="\n")
    if len(bad) == rows > 1 and text.startswith("not JSON") and all(row is None for row in refused.values()):
        found += f", none of the first {len(refused)} is JSON; {first}: {text}"
        write = 'Write each conversation on one line, as {"messages": [...]}'
        raise DataError(found, f"{write}; docs/data.md has the formats that can be converted", between="\n")
    if drop:
        found += f" of {rows:,} ({len(bad) / rows:.0%}), above dataset.max_bad_share ({dataset.max_bad_share:.0%})"
    listing = lines([f"{place}: {text}" for place, text in bad], LISTED_DROPPED if drop else LISTED_PROBLEMS)
    convert = foreign.conversion(list(refused.values()), path, split, 2 * len(bad) > rows)
    if text.startswith("not UTF-8"):
        fix = f"Make it UTF-8, {iconv('WINDOWS-1252', path)}"
    elif 2 * len(bad) > rows:
        fix = (
            convert
            or "Fix them: more than half of the rows are bad. docs/data.md has the formats that can be converted"
        )
    else:
        fix = f"{convert}\nOr" if convert else "Fix them, or"
        fix += f" leave them out with {_leaving_out(len(bad) / rows, dataset)}"
    raise DataError(f"{found}\n{listing}", fix, between="\n")


def _leaving_out(share: float, dataset: DatasetConfig) -> str:
    """The settings that allow leaving out a `share` of bad rows."""
    settings = ["--set dataset.on_bad_row=drop"] * (dataset.on_bad_row == "fail")
    if share > dataset.max_bad_share:
        settings.append(f"--set dataset.max_bad_share={math.ceil(share * 100) / 100:g}")
    return " ".join(settings)


def _check_splits(splits: dict[str, Split], entries: list[_Entry], max_rows: int | None) -> None:
    train, validation = splits["train"], splits["validation"]
    paths = [str(entry.file.path) for entry in entries if entry.file.split == "train"]
    where = paths[0] if len(paths) == 1 else "dataset.train_file"
    if train.statistics.rows == 0:
        too_long, without_loss = train.statistics.dropped_long, train.statistics.dropped_without_loss
        why, advice = "", "add rows"
        if too_long:
            why, advice = f" ({too_long} were longer than model.max_seq_length)", "raise model.max_seq_length"
        elif without_loss:
            why, advice = f" (in {without_loss} no turn carries loss)", "remove weight 0 from the answers to train on"
        raise DataError(f"data: {where} leaves no row to train on{why}", advice)
    if validation.statistics.rows == 0:
        where = str(entries[-1].file.path) if entries[-1].file.split == "validation" else where
        more = "add rows" if max_rows is None else f"raise dataset.max_rows above {max_rows}"
        advice = f"name a dataset.validation_file, {more}, or raise dataset.validation_split"
        if len(np.unique(train.kept("openings"))) == 1:
            advice = "all have the same system and first user message and stay together: name a dataset.validation_file"
        raise DataError(f"data: {where} leaves no row for validation ({train.statistics.rows} to train on)", advice)
    pair = first_pair(train, validation, "digests")
    if pair:
        shared = len(np.intersect1d(train.kept("digests"), validation.kept("digests")))
        count = "1 row is" if shared == 1 else f"{shared:,} rows are"
        first = f"{pair[0]} is {pair[1]}"
        raise DataError(f"data: {count} in both train and validation, the first: {first}", "remove them from one")
    count_leaks(train, validation)
