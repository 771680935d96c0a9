"""Opens what a conversion reads: a file, or through `datasets` a folder or a data set on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.formats.containers import Container, Numbered, recognize
from finetune.data.jsonl import open_lines
from finetune.errors import ConfigError, DataError
from finetune.wording import first_line

if TYPE_CHECKING:
    import datasets

FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz", ".txt")  # a Hub id never ends in one of these
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """Rows that can be read more than once. `what` names the format; row numbers count in `unit`s."""

    what: str
    rows: Callable[[], Numbered]
    first: Any
    unit: str = "line"


def open_source(name: str) -> Source:
    """Open a file, a folder or a Hub id. Raises ConfigError if it does not exist, DataError if it is unreadable."""
    path = Path(name).expanduser()
    on_the_hub = HUB_ID.fullmatch(name) and not path.exists() and path.suffix not in FILES
    if path.is_dir() or on_the_hub:
        return _of_datasets(name, path if path.is_dir() else None)
    open_lines(path, ", or name a folder or a data set of the Hub (owner/name)").close()
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes)", "nothing to convert")
    found: Container = recognize(path)
    unit = "line" if found.kind in ("JSON Lines", "CSV") else "row"
    return Source(found.described, found.rows, found.first, unit)


def _of_datasets(name: str, folder: Path | None) -> Source:
    os.environ.setdefault("USE_TORCH", "0")  # otherwise `datasets` imports torch for nothing, 1 to 2 s
    import datasets

    try:
        found = _load(name, folder)
        split = next(iter(found)) if len(found) == 1 else "train"
        if split not in found:
            raise ConfigError(
                f"{name} has the splits {', '.join(found)}, expected one named train",
                fix="convert its files one by one",
            )
        first = next(iter(found[split]), None)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        where = "not available from the Hub" if folder is None else "`datasets` cannot read this folder"
        load = f"download it first: hf download --repo-type dataset {name} --local-dir FOLDER"
        fix = "name a file in it" if folder else f"name a file, or {load}"
        raise ConfigError(f"{name}: {where}: {_said(error)}", fix=fix) from None
    others = ", ".join(other for other in found if other != split)
    left = f" (ignored: {others})" if others else ""
    what = f"{'a data set of the Hub' if folder is None else 'a folder of `datasets`'}, split {split}{left}"
    return Source(what, lambda: enumerate(found[split], 1), first, "row")


def _said(error: Exception) -> str:
    """The first line of an error of `datasets`, and the second if it lists configurations."""
    choices = [line for line in str(error).splitlines()[1:2] if "configs: " in line]
    return " ".join([first_line(error), *choices])


def _load(name: str, folder: Path | None) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """All splits, streamed unless `save_to_disk` wrote the folder."""
    import datasets

    if folder is not None and any((folder / mark).exists() for mark in ("dataset_dict.json", "state.json")):
        saved = datasets.load_from_disk(str(folder))
        return saved if isinstance(saved, datasets.DatasetDict) else datasets.DatasetDict(train=saved)
    return datasets.load_dataset(name, streaming=True)
