"""Reports the progress of downloading and loading a base, taken from the libraries' own progress bars."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm
from transformers.utils import logging

from finetune.wording import Report, duration

GB = 1e9  # as the Hub and the disk makers count


def download_bar(name: str, report: Report) -> type[Any]:
    """Return a tqdm class for huggingface_hub that draws nothing and reports the bytes downloaded, in GB."""

    class Bar(tqdm):  # type: ignore[misc]
        monitor_interval = 0  # no thread of its own

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"file": io.StringIO()})

        def display(self, *_: Any, **__: Any) -> None:
            # Of the Hub's other bars, one counts files and one counts network bytes, whose total is unknown.
            if self.unit == "B" and self.total and not self.desc.startswith("Downloading bytes"):
                report.progress(f"fetching {name}: {self.n / GB:.1f} of {self.total / GB:.1f} GB")

    return Bar


@contextmanager
def layers_reported(name: str, report: Report) -> Iterator[None]:
    """Report each layer that transformers starts to load in the block, with its own bars off."""

    def watched(bar: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if options.get("desc") != "Loading weights":  # as core_model_loading of transformers 5.23 says
            return bar(*args, **options)
        reach = layer_counter(f"loading {name}", [weight for weight, _ in args[0]], report)
        return _each(args[0], reach)

    logging.disable_progress_bar()
    before = logging.set_tqdm_hook(watched)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def _each(items: Iterable[Any], reach: Callable[[str], None]) -> Iterator[Any]:
    for item in items:
        reach(item[0])
        yield item


def layer_counter(what: str, names: Iterable[str], report: Report) -> Callable[[str], None]:
    """Return a function to call with each of `names` (weights or modules); it reports each new layer and the time."""
    started, total, seen = time.monotonic(), len({_layer(name) for name in names} - {None}), set()

    def reach(name: str) -> None:
        number = _layer(name)
        if number is not None and number not in seen:
            seen.add(number)
            report.progress(f"{what}: layer {len(seen)} of {total}, {duration(time.monotonic() - started)}")

    return reach


def _layer(name: str) -> str | None:
    """Return N of a name such as model.layers.N.mlp.up_proj.weight; None if it belongs to no layer."""
    found = re.search(r"\.layers\.(\d+)\.", name)
    return found[1] if found else None
