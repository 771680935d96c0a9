"""A plain mapping into a tree of frozen dataclasses, gathering every problem on the way."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from finetune.wording import show


@dataclass(frozen=True)
class Bounds:
    """Closed bounds of a number; `above` is an open lower bound."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf

    def complaint(self, value: float) -> str | None:
        """What is wrong with `value`, or None. NaN fits no bounds."""
        if self.least <= value <= self.most and value > self.above:
            return None
        parts = [
            f"more than {self.above:g}" if self.above > -math.inf else "",
            f"at least {self.least:g}" if self.least > -math.inf else "",
            f"at most {self.most:g}" if self.most < math.inf else "",
        ]
        return "wanted " + " and ".join(part for part in parts if part)


@dataclass
class Problems:
    """Collects problems, each with the place its key stands in."""

    places: dict[str, str]
    found: list[str] = dataclasses.field(default_factory=list)

    def add(self, path: str, text: str) -> None:
        """One more problem at the dotted `path`."""
        place = self.places.get(path, "")
        self.found.append(f"{place}  {path}: {text}" if place else f"{path}: {text}")


def build(kind: type, value: Any, path: str, problems: Problems, everywhere: Iterable[str] = ()) -> Any:
    """An instance of dataclass `kind` from the mapping `value`.

    `everywhere` lists the dotted paths of the whole tree, for "did you mean". Where anything was wrong, `problems`
    holds it and the returned tree must not be used.
    """
    if not isinstance(value, dict):
        problems.add(path, f"found {show(value)}, wanted a section with keys below it")
        return None
    hints = typing.get_type_hints(kind, include_extras=True)
    prefix = f"{path}." if path else ""
    for key in (key for key in value if key not in hints):
        problems.add(f"{prefix}{key}", "unknown key" + did_you_mean(f"{prefix}{key}", everywhere))
    built = {}
    for name, hint in hints.items():
        if name not in value:
            problems.add(f"{prefix}{name}", "missing; the base config holds every key")
            continue
        if dataclasses.is_dataclass(hint):
            built[name] = build(typing.cast(type, hint), value[name], f"{prefix}{name}", problems, everywhere)
        else:
            built[name] = _scalar(hint, value[name], f"{prefix}{name}", problems)
    return kind(**built) if len(built) == len(hints) else None


def paths(kind: type, prefix: str = "") -> list[str]:
    """Every dotted path of a tree of dataclasses, sections included."""
    found = []
    for name, hint in typing.get_type_hints(kind).items():
        found.append(f"{prefix}{name}")
        if dataclasses.is_dataclass(hint):
            found += paths(typing.cast(type, hint), f"{prefix}{name}.")
    return found


def did_you_mean(path: str, everywhere: Iterable[str]) -> str:
    """`; did you mean ...?` for an unknown dotted path, or nothing.

    A known synonym wins; then the nearest spelling of the last part, in the same section first.
    """
    everywhere = list(everywhere)
    leaf = path.rsplit(".", 1)[-1]
    if path in everywhere:
        return f"; dots are for --set: write {leaf}: below {path.removesuffix(leaf)[:-1]}:"
    synonym = _SYNONYMS.get(leaf)
    section = path.removesuffix(leaf)
    leaves = {
        known.rsplit(".", 1)[-1]: known for known in sorted(everywhere, key=lambda known: known.startswith(section))
    }
    close = [leaves[name] for name in difflib.get_close_matches(leaf, leaves, 1, 0.6)]
    near = [synonym] if synonym in everywhere else close
    return f"; did you mean {near[0]}?" if near else ""


# What other trainers call the same thing.
_SYNONYMS = {
    "rank": "lora.r",
    "alpha": "lora.lora_alpha",
    "dropout": "lora.lora_dropout",
    "sequence_len": "model.max_seq_length",
    "max_length": "model.max_seq_length",
    "micro_batch_size": "training.per_device_train_batch_size",
    "epochs": "training.num_train_epochs",
    "num_epochs": "training.num_train_epochs",
    "lr": "training.learning_rate",
    "optimizer": "training.optim",
    "val_set_size": "dataset.validation_split",
    "output_dir": "output.dir",
}


def _scalar(hint: Any, value: Any, path: str, problems: Problems) -> Any:
    """`value` as `hint` wants it; an integer is accepted for a float, never a truth value for a number."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        converted = _scalar(arguments[0], value, path, problems)
        if isinstance(converted, (int, float)) and (complaint := arguments[1].complaint(converted)):
            problems.add(path, f"found {show(value)}, {complaint}")
        return converted
    if origin in (types.UnionType, typing.Union):
        return _one_of_two(arguments, value, path, problems)
    if origin is typing.Literal:
        return _one_of(arguments, value, path, problems)
    if origin is tuple:
        if isinstance(value, list) and all(isinstance(item, str) and item for item in value):
            return tuple(value)
        problems.add(path, f"found {show(value)}, wanted a list of texts")
        return ()
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is hint and value != "":
        return value
    wanted = {
        str: "text that is not empty" if value == "" else "text",
        bool: "true or false",
        int: "a whole number",
        float: "a number",
    }[hint]
    problems.add(path, f"found {show(value)}, wanted {wanted}")
    return None


def _one_of_two(arguments: tuple[Any, ...], value: Any, path: str, problems: Problems) -> Any:
    """What may be null, or a name in a number's place."""
    first, second = arguments
    if second is types.NoneType:
        return None if value is None else _scalar(first, value, path, problems)
    if type(value) is int:
        return _scalar(second, value, path, problems)
    return _one_of(typing.get_args(first), value, path, problems, " | a whole number")


def _one_of(choices: tuple[Any, ...], value: Any, path: str, problems: Problems, more: str = "") -> Any:
    if value in choices and type(value) in {type(choice) for choice in choices}:
        return value
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    problems.add(path, f"found {show(value)}, wanted {' | '.join(map(str, choices))}{more}{hint}")
    return None
