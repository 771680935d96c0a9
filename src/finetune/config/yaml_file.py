"""Reads YAML safely: keeps line numbers, refuses duplicate keys, reads `2e-4` as a number, limits the size."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from finetune.errors import ConfigError
from finetune.wording import first_line, show

MAX_BYTES = 1_000_000
MAX_DEPTH = 20
MAX_INTEGER = 2**63 - 1
FIXES = {  # by what PyYAML says
    "found character '\\t' that cannot start any token": "; indent with spaces",
    "mapping values are not allowed here": "; quote text that contains ': '",
}
PLAIN = f"aliases (*name), tags (!name) and more than {MAX_DEPTH} levels are not supported"

# YAML 1.1 wants a dot in a float, so PyYAML reads 2e-4 as text. This is the YAML 1.2 form.
_FLOAT = re.compile(r"[-+]?(?:\d[\d_]*(?:\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses what a config does not need, and reads `2e-4` as a float."""

    depth = 0

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.duplicates: list[tuple[int, str]] = []

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or event.tag is not None or self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=PLAIN, problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and abs(value) > MAX_INTEGER:
                raise ValueError(f"a whole number over {MAX_INTEGER}")
        except ValueError as error:  # such as an invalid date
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from None
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag != "tag:yaml.org,2002:str":
                what = f"{key.value} is not text; quote it" if isinstance(key, yaml.ScalarNode) else "expected text"
                raise yaml.MarkedYAMLError(problem=f"key: {what}", problem_mark=key.start_mark)
            if key.value in seen:
                first = seen[key.value]
                self.duplicates.append((line, f"duplicate key {key.value!r} (first on line {first}); keep one"))
            seen.setdefault(key.value, line)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse(text: str, where: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The mapping in `text`, and the place of each dotted key ("file:line").

    Raises ConfigError if it is not YAML, not a mapping, or nested too deep.
    """
    try:
        return _mapping(_Loader(text), where)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        problem = error.problem or error.context or ""
        raise ConfigError(f"{where}{line}: {problem}{FIXES.get(problem, '')}") from None
    except yaml.reader.ReaderError as error:
        number = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{where}:{number}: not YAML: {first_line(error)}") from None


def _mapping(loader: _Loader, where: str) -> tuple[dict[str, Any], dict[str, str]]:
    node = loader.get_single_node()
    if node is None:
        return {}, {}
    if not isinstance(node, yaml.MappingNode):
        found = show(node.value) if isinstance(node, yaml.ScalarNode) else "a list"
        raise ConfigError(f"{where}:{node.start_mark.line + 1}: found {found}, expected a mapping of sections")
    places = dict(_places(node, where, ""))
    tree = loader.construct_document(node)
    if loader.duplicates:
        raise ConfigError(*(f"{where}:{line}: {problem}" for line, problem in sorted(loader.duplicates)))
    return tree, places


def _places(node: yaml.MappingNode, where: str, prefix: str) -> Iterable[tuple[str, str]]:
    for key, value in node.value:
        path = f"{prefix}{key.value}"
        yield path, f"{where}:{key.start_mark.line + 1}"
        if isinstance(value, yaml.MappingNode):
            yield from _places(value, where, f"{path}.")


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Like `parse`, from a file. Raises ConfigError if it is not UTF-8 or larger than MAX_BYTES."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: {path.stat().st_size} bytes is too large; the limit is {MAX_BYTES}")
        return parse(path.read_text(encoding="utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; see --config in --help") from None


class _Dumper(yaml.SafeDumper):
    """Quotes text such as '2e-4', which `parse` would read as a number."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def dump(tree: Any) -> str:
    """YAML that `parse` reads back as the same values; keeps the order of keys."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def load_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError with file:line."""
    return read(path)[0]


def comments(path: str | os.PathLike[str]) -> dict[str, str]:
    """The comment on the line of each dotted key that has one."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    found = {key: lines[int(place.rpartition(":")[2]) - 1].partition(" # ")[2] for key, place in read(path)[1].items()}
    return {key: comment for key, comment in found.items() if comment}


def deep_merge(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """`base` updated with `override`, section by section; lists are replaced. Neither input is changed."""
    merged = dict(base)
    for key, value in override.items():
        below = merged.get(key)
        merged[key] = deep_merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def get_config_value(config: dict[str, Any], path: str, default: Any = None) -> Any:
    """The value at a dotted `path` such as "lora.r", or `default`."""
    value: Any = config
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            return default
        value = value[key]
    return value


def validate_required_fields(config: dict[str, Any], fields: Iterable[str]) -> None:
    """Raise one ConfigError that names every dotted path of `fields` that `config` lacks."""
    absent = object()
    missing = [field for field in fields if get_config_value(config, field, absent) is absent]
    if missing:
        raise ConfigError(*(f"{field}: missing; add it to the config file" for field in missing))


def override(setting: str) -> tuple[dict[str, Any], dict[str, str]]:
    """A `--set dotted.key=yaml_value` argument as a mapping, and the argument as the place of each key in it."""
    path, equals, text = setting.partition("=")
    keys, argument = path.strip().split("."), f"--set {setting}"
    if not equals or not all(keys) or len(keys) > MAX_DEPTH:
        raise ConfigError(f"{argument}: expected dotted.key=value, for example --set training.max_steps=50")
    tree, places = parse(f"value: {text}", argument)
    if tree.keys() != {"value"}:
        raise ConfigError(f"{argument}: expected one value")
    value = tree["value"]
    for key in reversed(keys):
        value = {key: value}
    return value, {".".join([*keys, *below.split(".")[1:]]): argument for below in places}
