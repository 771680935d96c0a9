"""From a plain mapping to a typed tree: each wrong value has its own words, and all are told at once."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Le, MinLen
from pydantic import Strict, ValidationError

from finetune import wording
from finetune.config import problems, schema
from finetune.config.problems import Problems
from finetune.config.schema import Count, Text, Texts


class Section(schema.Section):
    """One key of each kind."""

    count: Count
    share: Annotated[float, Ge(0), Le(0.5)]
    rate: Annotated[float, Gt(0), Le(1)]
    size: Annotated[int, Ge(16), Le(32768)]
    any_number: float
    flag: bool
    name: Text
    note: Text | None
    patience: Count | None
    mode: Literal["packed", "expanded"]
    layers: Literal["all", "auto"] | Annotated[int, Ge(0)]
    names: Texts
    files: Annotated[
        Text | Annotated[tuple[Text | schema.TrainFile, ...], Strict(False), MinLen(1)],
        schema.Expected("a path or a list"),
    ]


class Lora(schema.Section):
    """Real names, for the synonyms."""

    r: int


class Tree(schema.Section):
    """Two sections and a key beside them."""

    section: Section
    lora: Lora
    seed: int


GOOD: dict[str, Any] = {
    "section": {"count": 1, "share": 0.5, "rate": 1, "size": 16, "any_number": -3, "flag": False, "name": "x",
        "note": None, "patience": None, "mode": "packed", "layers": "all", "names": ["a", "b"],
        "files": "a"},
    "lora": {"r": 8},
    "seed": 42,
}  # fmt: skip


def built(section: dict[str, Any], places: dict[str, str] | None = None, **above: Any) -> tuple[Any, list[str]]:
    """The tree of GOOD with these changes, and the problems."""
    faults = Problems(places or {})
    value = {**GOOD, "section": {**GOOD["section"], **section}, **above}
    return problems.validated(Tree, value, faults), faults.found


def test_a_good_mapping_becomes_a_frozen_tree() -> None:
    tree, found = built({})
    assert found == []
    assert tree.model_dump() == GOOD | {"section": GOOD["section"] | {"names": ("a", "b")}}
    with pytest.raises(ValidationError):
        tree.section.count = 2


@pytest.mark.parametrize("key", ["share", "rate", "any_number"])
def test_a_whole_number_is_accepted_for_a_number_and_becomes_one(key: str) -> None:
    tree, found = built({key: 1 if key == "rate" else 0})
    assert found == []
    assert type(getattr(tree.section, key)) is float


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("count", "1", "found '1' (text), expected a whole number"),
        ("count", True, "found True (true/false), expected a whole number"),
        ("share", "2e-4", "found '2e-4' (text), expected a number"),
        ("flag", 1, "found 1 (whole number), expected true or false"),
        ("note", 7, "found 7 (whole number), expected text"),
        ("note", "\ud800", "found '\\ud800' (text), expected text without half of a surrogate pair"),
        ("patience", "5", "found '5' (text), expected a whole number"),
        ("names", "a", "found 'a' (text), expected a list of texts"),
        ("names", ["a", 1], "found ['a', 1] (list), expected a list of texts"),
        ("count", 0, "found 0 (whole number), expected at least 1"),
        ("share", 0.6, "found 0.6 (number), expected at least 0 and at most 0.5"),
        ("rate", 0, "found 0 (whole number), expected more than 0 and at most 1"),
        ("rate", math.nan, "found nan (number), expected more than 0 and at most 1"),
        ("size", 40000, "found 40000 (whole number), expected at least 16 and at most 32768"),
        ("mode", "pakced", "found 'pakced' (text), expected packed | expanded; did you mean packed?"),
        ("mode", "fast", "found 'fast' (text), expected packed | expanded"),
        ("layers", "al", "found 'al' (text), expected all | auto | a whole number; did you mean all?"),
        ("layers", True, "found True (true/false), expected all | auto | a whole number"),
        ("layers", -1, "found -1 (whole number), expected at least 0"),
        ("name", "", "found '' (text), expected text that is not empty"),
        ("files", 3, "found 3 (whole number), expected a path or a list"),
        ("files", [], "found [] (list), expected a path or a list"),
        ("files", ["a", 3], "found 3 (whole number), expected a path or a list"),
        ("files", ["a", {"weight": 2}], "found {'weight': 2} (section), expected a path or a list"),
        *(
            ("files", [wrong], f"found {wrong} (section), expected a path or a list")
            for wrong in ({"path": "b", "weight": 0}, {"path": "b", "weight": 101}, {"path": "b", "wieght": 2})
        ),
    ],
)
def test_a_wrong_value_is_quoted_with_its_kind_and_what_was_wanted(key: str, value: Any, message: str) -> None:
    assert built({key: value})[1] == [f"section.{key}: {message}"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("layers", value) for value in ("all", "auto", 0, 24)),
        *(("mode", value) for value in ("packed", "expanded")),
        *((key, value) for key, value in (("note", None), ("note", "x"), ("patience", None), ("patience", 1))),
        *(("names", value) for value in ((), ("b", "a", "b"))),
    ],
)
def test_each_kind_of_right_value_is_accepted_as_it_is(key: str, value: Any) -> None:
    tree, found = built({key: list(value) if isinstance(value, tuple) else value})
    assert (getattr(tree.section, key), found) == (value, [])


@pytest.mark.parametrize(
    ("section", "above", "message"),
    [
        ({"cuont": 1}, {}, "section.cuont: unknown key; did you mean section.count?"),
        ({"r": 1}, {}, "section.r: unknown key; did you mean lora.r?"),
        ({"rank": 1}, {}, "section.rank: unknown key; did you mean lora.r?"),
        ({}, {"rank": 1}, "rank: unknown key; did you mean lora.r?"),
        ({}, {"count": 1}, "count: unknown key; did you mean section.count?"),
        ({}, {"sed": 1}, "sed: unknown key; did you mean seed?"),
        ({"zzzzzz": 1}, {}, "section.zzzzzz: unknown key"),
        ({}, {"lora.r": 1}, "lora.r: unknown key; dots are for --set: write r: below lora:"),
    ],
)
def test_an_unknown_key_comes_with_the_likeliest_known_one(
    section: dict[str, Any], above: dict[str, Any], message: str
) -> None:
    assert built(section, **above)[1] == [message]


def test_a_missing_key_and_a_section_that_is_none_are_named() -> None:
    faults = Problems({})
    assert problems.validated(Tree, {"lora": 5}, faults) is None
    assert faults.found == [
        "section: missing; every key must be there",
        "lora: found 5 (whole number), expected a section with keys below it",
        "seed: missing; every key must be there",
    ]


def test_a_dotted_key_and_the_key_that_it_means_are_told_apart() -> None:
    assert built({}, lora={"r": "x"}, **{"lora.r": 1})[1] == [
        "lora.r: found 'x' (text), expected a whole number",
        "lora.r: unknown key; dots are for --set: write r: below lora:",
    ]


def test_all_problems_are_found_at_once_each_with_its_place() -> None:
    places = {"section.count": "f.yaml:3", "section.mode": "--set section.mode=x", "sed": "f.yaml:9"}
    _, found = built({"count": "many", "mode": "x", "flag": None}, places, sed=1)
    assert sorted(found) == [
        "--set section.mode=x  section.mode: found 'x' (text), expected packed | expanded",
        "f.yaml:3  section.count: found 'many' (text), expected a whole number",
        "f.yaml:9  sed: unknown key; did you mean seed?",
        "section.flag: found null, expected true or false",
    ]


def test_the_keys_of_a_tree_are_in_its_order_sections_included() -> None:
    in_section = [f"section.{name}" for name in Section.model_fields]
    assert list(schema.keys(Tree)) == ["section", *in_section, "lora", "lora.r", "seed"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "null"),
        (True, "True (true/false)"),
        ("a\x1b[31m\nb", r"'a\x1b[31m\nb' (text)"),
        ("x" * 100, "'" + "x" * 56 + "... (text)"),
    ],
)
def test_a_value_is_shown_short_and_without_control_characters(value: Any, shown: str) -> None:
    assert wording.show(value) == shown
