"""Turns pydantic's validation errors into our own messages, all at once."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from finetune.config.schema import Expected, keys
from finetune.config.suggest import unknown
from finetune.config.yaml_file import get_config_value
from finetune.wording import show

Model = TypeVar("Model", bound=BaseModel)

EXPECTED = {
    "model_type": "a section with keys below it",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "string_unicode": "text without half of a surrogate pair",
    "tuple_type": "a list of texts",
}
BOUNDS = {"gt": "more than", "ge": "at least", "le": "at most"}


@dataclass
class Problems:
    """Problems of a config, each with the file and line of its key."""

    places: dict[str, str]
    found: list[str] = dataclasses.field(default_factory=list)

    def add(self, path: str, text: str) -> None:
        """Add a problem of the key at the dotted `path`."""
        place = self.places.get(path, "")
        self.found.append(f"{place}  {path}: {text}" if place else f"{path}: {text}")


def validated(model: type[Model], value: Any, problems: Problems) -> Model | None:
    """An instance of `model`, or None if it is invalid; then adds each error to `problems`."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        known = keys(model)
        faults: dict[tuple[str, ...], list[ErrorDetails]] = {}
        for fault in error.errors(include_url=False):
            faults.setdefault(_names(fault, known), []).append(fault)
        for names, found in faults.items():
            path = ".".join(names)
            problems.add(path, _sentence(path, found, known, get_config_value(value, path, value)))
        return None


def _names(fault: ErrorDetails, known: dict[str, FieldInfo]) -> tuple[str, ...]:
    """Section and key of an error, without what pydantic adds below a key (a union's member, a list's index)."""
    names = tuple(str(part) for part in fault["loc"])
    paths = (names[: length + 1] for length in range(len(names)))
    return next((path for path in paths if _is_leaf(known.get(".".join(path)))), names)


def _is_leaf(field: FieldInfo | None) -> bool:
    """Whether this is a key rather than a section."""
    if field is None:
        return False
    return not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel))


def _sentence(path: str, faults: list[ErrorDetails], known: dict[str, FieldInfo], value: Any) -> str:
    kinds = [fault["type"] for fault in faults]
    if kinds[0] == "extra_forbidden":
        return unknown(path, known)
    if kinds[0] == "missing":
        return "missing; every key must be there"
    described = next((part for part in known[path].metadata if isinstance(part, Expected)), None)
    if described is not None:
        index = next((name for fault in faults for name in fault["loc"] if isinstance(name, int)), None)
        return f"found {show(value if index is None else value[index])}, expected {described}"
    if kinds[-1].startswith(("greater_than", "less_than")):
        expected = _bounds(known[path])
    elif kinds[0] == "literal_error":
        expected = _choices(known[path], value)
    else:
        in_list = any(isinstance(name, int) for name in faults[0]["loc"])
        expected = EXPECTED["tuple_type" if in_list else kinds[0]]
    return f"found {show(value)}, expected {expected}"


def _bounds(field: FieldInfo) -> str:
    """All bounds of a number, not only the violated one."""
    bounds = [(words, getattr(part, name, None)) for part in _parts(field) for name, words in BOUNDS.items()]
    return " and ".join(f"{words} {bound:g}" for words, bound in bounds if bound is not None)


def _choices(field: FieldInfo, value: Any) -> str:
    """The allowed names, whether a number is allowed too, and the name nearest to `value`."""
    parts = [*_parts(field)]
    names = [part for part in parts if isinstance(part, str)]
    near = difflib.get_close_matches(str(value), names, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return " | ".join([*names, *(["a whole number"] if int in parts else [])]) + hint


def _parts(field: FieldInfo) -> Iterator[Any]:
    """All parts of a key's type, at any depth: types, bounds, choices, marks."""
    yield from field.metadata
    inner = [field.annotation]
    while inner:
        part = inner.pop(0)
        yield part
        inner += typing.get_args(part)
