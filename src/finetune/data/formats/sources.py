"""Where a conversion reads from: a file, or through `datasets` a folder or a data set of the Hugging Face Hub."""

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

FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz", ".txt")  # never the end of a Hub id
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """Rows that can be read more than once. `what` is what was recognized, `first` the first row, `unit` of numbers."""

    what: str
    rows: Callable[[], Numbered]
    first: Any
    unit: str = "line"


def open_source(name: str) -> Source:
    """A file, a folder or a Hub id. Raises ConfigError where there is none, DataError where it cannot be read."""
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
    os.environ.setdefault("USE_TORCH", "0")  # `datasets` would import it, for a second or two and nothing
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
        where = "no data set that the Hub gives" if folder is None else "no folder that `datasets` can read"
        load = f"download it first: hf download --repo-type dataset {name} --local-dir FOLDER"
        fix = "name a file in it" if folder else f"name a file, or {load}"
        raise ConfigError(f"{name}: {where}: {_said(error)}", fix=fix) from None
    others = ", ".join(other for other in found if other != split)
    left = f" (left out: {others})" if others else ""
    what = f"{'a data set of the Hub' if folder is None else 'a folder of `datasets`'}, split {split}{left}"
    return Source(what, lambda: enumerate(found[split], 1), first, "row")


def _said(error: Exception) -> str:
    """What `datasets` says: the first line, and the second where that has the names of the configurations."""
    choices = [line for line in str(error).splitlines()[1:2] if "configs: " in line]
    return " ".join([first_line(error), *choices])


def _load(name: str, folder: Path | None) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """Every split, as a stream where it is not a folder of `save_to_disk`."""
    import datasets

    if folder is not None and any((folder / mark).exists() for mark in ("dataset_dict.json", "state.json")):
        saved = datasets.load_from_disk(str(folder))
        return saved if isinstance(saved, datasets.DatasetDict) else datasets.DatasetDict(train=saved)
    return datasets.load_dataset(name, streaming=True)
