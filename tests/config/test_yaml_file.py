"""YAML as a person means it: numbers, places, what is refused, merging, and `--set`."""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.config.yaml_file import (
    PLAIN,
    deep_merge,
    get_config_value,
    load_yaml,
    override,
    parse,
    read,
    validate_required_fields,
)
from finetune.errors import ConfigError

# What YAML gives a meaning to, so that a fuzzer made of it gets past the first character.
FRAGMENTS = [
    *(
        "a", "b: ", "value: ", "é", "1", "-0", "2e-4", "1_0", "0x", "0xf", "0b", "1:30", ".inf", ".nan", "null", "~",
        "yes",
    ),
    *(": ", ":", "? ", "- ", "[", "]", "{", "}", ", ", "\n", "\n  ", "\r\n", "\t", " ", "'", '"', "\\", "|\n", ">-\n"),
    *("&x ", "*x", "<<: ", "=", "!", "!t ", "!!int ", "!!float ", "!!bool ", "!!null ", "!!timestamp ", "!!binary "),
    *("!!set ", "!!omap ", "!!map ", "!!seq ", "!!str ", "!!python/object:os.system ", "%YAML 1.1\n", "---\n", "...\n"),
    *("#", "@", "`", "\x00", "\x07", "\x85", "\u2028", "\ufeff", "\ud800", "2001-01-01", "2001-99-99", "1:99:99"),
]  # fmt: skip
yaml_like = st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join) | st.text(max_size=60)
fuzz = settings(max_examples=150, deadline=None, database=None, derandomize=True)


def problem(text: str) -> str:
    """The one problem that `text` has."""
    with pytest.raises(ConfigError) as caught:
        parse(text, "f.yaml")
    [line] = caught.value.problems
    return line


def test_a_mapping_comes_with_the_line_of_each_dotted_key() -> None:
    values, places = parse("# notes\nlora:\n  r: 16\n  names: [a, b]\n\nseed: 42\n", "f.yaml")
    assert values == {"lora": {"r": 16, "names": ["a", "b"]}, "seed": 42}
    assert places == {"lora": "f.yaml:2", "lora.r": "f.yaml:3", "lora.names": "f.yaml:4", "seed": "f.yaml:6"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 0.0002), ("2.0e-4", 0.0002), ("2E-4", 0.0002), ("1E3", 1000.0), ("1e+3", 1000.0), ("-1e3", -1000.0),
        ("+1e3", 1000.0), (".5e-3", 0.0005), (".5e3", 500.0), ("5.e-3", 0.005), ("1_000e2", 100000.0),
        ("1_000.5e1", 10005.0), ("012e1", 120.0), ("0.0002", 0.0002), (".inf", math.inf),
    ],
)  # fmt: skip
def test_a_number_in_any_usual_spelling_is_a_float(text: str, value: float) -> None:
    read_value = parse(f"rate: {text}", "f.yaml")[0]["rate"]
    assert (type(read_value), read_value) == (float, value)


@pytest.mark.parametrize(
    "text",
    [
        *("e4", ".e4", "2e", "2e-", "2e4x", "x2e4", "2e4 5", "1.2.3e4", "_1e3", "63a8b081"),
        *("'2e-4'", '"1E3"', "'16'", '"true"', "'null'"),
    ],
)
def test_what_is_quoted_or_only_looks_like_a_number_stays_text(text: str) -> None:
    assert parse(f"name: {text}", "f.yaml")[0] == {"name": text.strip("'\"")}


@pytest.mark.parametrize("text", ["1_" * 10_000 + "!", "1" * 20_000 + "!", "1" * 20_000 + ".x", "-" + "." * 20_000])
def test_a_long_scalar_takes_no_longer_than_its_length(text: str) -> None:
    started = time.process_time()
    assert parse(f"name: {text}", "f.yaml")[0] == {"name": text}
    assert time.process_time() - started < 1


def test_an_empty_file_is_an_empty_mapping() -> None:
    assert [parse(text, "f.yaml") for text in ("", "\n", "# only a comment\n", "\ufeff")] == [({}, {})] * 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("r: 1\nalpha: 2\nr: 3\n", "f.yaml:3: duplicate key 'r' (first on line 1); keep one"),
        ("lora:\n  r: 1\n  r: 1\n", "f.yaml:3: duplicate key 'r' (first on line 2); keep one"),
        ("a:\n  b:\n    c: 1\n    d: 1\n    c: 1\n", "f.yaml:5: duplicate key 'c' (first on line 3); keep one"),
        ("a:\n- b: 1\n- c: 1\n  c: 2\n", "f.yaml:4: duplicate key 'c' (first on line 3); keep one"),
        ("a: 1\n'a': 2\n", "f.yaml:2: duplicate key 'a' (first on line 1); keep one"),
        ("a: {b: 1, b: 2}\n", "f.yaml:1: duplicate key 'b' (first on line 1); keep one"),
        ("lora: {r: 1}\nseed: 1\nlora: {r: 2}\n", "f.yaml:3: duplicate key 'lora' (first on line 1); keep one"),
        ("a: &x [1]\n\nb: [0, *x]\n", f"f.yaml:3: {PLAIN}"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", f"f.yaml:3: {PLAIN}"),
        ("a: *nothing\n", f"f.yaml:1: {PLAIN}"),
        ("a: 1\nb: !ours y\n", f"f.yaml:2: {PLAIN}"),
        ("a:\n\tb: 1\n", "f.yaml:2: found character '\\t' that cannot start any token; indent with spaces"),
        ("a: 1\nb: [1\n", "f.yaml:3: expected ',' or ']', but got '<stream end>'"),
        ("a: 1\nb: 'x\n", "f.yaml:3: found unexpected end of stream"),
        ("a: 1\nb: c: d\n", "f.yaml:2: mapping values are not allowed here; quote text that contains ': '"),
        ("a: 1\n---\nb: 2\n", "f.yaml:2: but found another document"),
        ("- a\n", "f.yaml:1: found a list, expected a mapping of sections"),
        ("16\n", "f.yaml:1: found '16' (text), expected a mapping of sections"),
        ("lora.r\n", "f.yaml:1: found 'lora.r' (text), expected a mapping of sections"),
        ("# notes\n\n- a\n", "f.yaml:3: found a list, expected a mapping of sections"),
        ("x: 1\ny: " + "[" * 25 + "]" * 25, f"f.yaml:2: {PLAIN}"),
    ],
)
def test_what_is_no_plain_mapping_is_refused_with_its_line(text: str, message: str) -> None:
    assert problem(text) == message


# What is wrong is PyYAML's or Python's to word; that it is a ConfigError with the line is ours.
@pytest.mark.parametrize(
    "bad",
    [
        *("x: !!python/name:os.system", "x: !!int ''", "[a]: b", "1: x", "no: z", "<<: {a: 1}", "=: 1", "x: ="),
        *("x: 2001-13-45", "x: 0x_", "x: 0x" + "f" * 5000, "x: a\x00b", "x: \ud800", "x: @y"),
    ],
)
def test_odd_keys_tags_and_values_are_refused_with_their_line(bad: str) -> None:
    assert problem(f"first: 1\n{bad}\n").startswith("f.yaml:2: ")


@fuzz
@given(yaml_like)
def test_any_text_is_a_mapping_with_text_keys_or_a_config_error(text: str) -> None:
    try:
        values, places = parse(text, "f.yaml")
    except ConfigError as error:
        assert all(line.startswith("f.yaml:") for line in error.problems)
        return
    assert all(isinstance(key, str) for key in values)
    assert values.keys() <= places.keys()


def test_a_file_of_windows_is_read_with_its_path_as_place(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes("\ufefflora:\r\n  note: é\r\n".encode())
    assert read(path) == ({"lora": {"note": "é"}}, {"lora": f"{path}:1", "lora.note": f"{path}:2"})
    assert load_yaml(str(path)) == {"lora": {"note": "é"}}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("name: café\n".encode("latin-1"), "not UTF-8 at byte 9; save it as UTF-8"),
        (b"#" * 1_000_001, "1000001 bytes is too large; the limit is 1000000"),
        (None, "No such file or directory; see --config in --help"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(content: bytes | None, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_yaml(path)
    assert caught.value.problems == (f"{path}: {problem}",)


def test_merging_goes_section_by_section_and_replaces_lists() -> None:
    base = {"lora": {"r": 16, "names": ["a", "b"]}, "seed": 42, "note": {"x": 1}}
    over = {"lora": {"names": ["c"], "bias": "none"}, "note": None, "new": {"y": 2}}
    wanted = {"lora": {"r": 16, "names": ["c"], "bias": "none"}, "seed": 42, "note": None, "new": {"y": 2}}
    assert deep_merge(base, over) == wanted
    assert deep_merge({"a": 1}, {"a": {"b": 2}}) == {"a": {"b": 2}}
    assert deep_merge({"a": {"b": {"c": 1, "d": 2}}}, {"a": {"b": {"d": 3}}}) == {"a": {"b": {"c": 1, "d": 3}}}


trees = st.recursive(
    st.integers() | st.none() | st.lists(st.integers(), max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
mappings = st.dictionaries(st.sampled_from("abc"), trees, max_size=3)


@fuzz
@given(mappings, mappings)
def test_merging_leaves_its_inputs_untouched_and_the_second_one_wins(base: Any, over: Any) -> None:
    before = copy.deepcopy((base, over))
    merged = deep_merge(base, over)
    assert (base, over) == before
    assert deep_merge(merged, over) == merged
    assert deep_merge(base, {}) == base
    assert deep_merge({}, over) == over


def test_a_value_is_found_at_its_dotted_path() -> None:
    config = {"lora": {"r": 16, "dropout": None}, "seed": 0}
    assert get_config_value(config, "lora.r") == 16
    assert get_config_value(config, "lora") == {"r": 16, "dropout": None}
    assert get_config_value(config, "lora.dropout", 0.1) is None
    assert get_config_value(config, "seed", 1) == 0


@pytest.mark.parametrize("path", ["lora.rank", "nothing", "nothing.r", "lora.r.x", "seed.x", "", ".", "lora.", ".r"])
def test_where_there_is_no_value_the_default_is_returned(path: str) -> None:
    assert get_config_value({"lora": {"r": 16}, "seed": 0}, path, "default") == "default"


def test_all_missing_fields_are_named_at_once() -> None:
    config = {"lora": {"r": 16, "alpha": None}, "model": 3}
    validate_required_fields(config, ["lora.r", "lora.alpha"])
    with pytest.raises(ConfigError) as caught:
        validate_required_fields(config, ["lora.bias", "lora.r", "model.name", "seed"])
    assert str(caught.value) == (
        "config: 3 problems\n"
        "  lora.bias: missing; add it to the config file\n"
        "  model.name: missing; add it to the config file\n"
        "  seed: missing; add it to the config file"
    )


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("lora.r=8", {"lora": {"r": 8}}),
        ("training.learning_rate=2e-4", {"training": {"learning_rate": 0.0002}}),
        ("training.bf16=true", {"training": {"bf16": True}}),
        ("training.early_stopping_patience=null", {"training": {"early_stopping_patience": None}}),
        ("dataset.validation_file=", {"dataset": {"validation_file": None}}),
        ("seed=1", {"seed": 1}),
        (" lora.r = 8 ", {"lora": {"r": 8}}),
        ("name='8'", {"name": "8"}),
        ("name=a=b,c", {"name": "a=b,c"}),
        ("name=two words", {"name": "two words"}),
        ("names=[a, b]", {"names": ["a", "b"]}),
        ("names=[a,b]", {"names": ["a", "b"]}),
        ("lora={r: 8, bias: none}", {"lora": {"r": 8, "bias": "none"}}),
        ("name='a: b'", {"name": "a: b"}),
        ("path=../data/x.jsonl", {"path": "../data/x.jsonl"}),
        ("lora.r=8 # twice", {"lora": {"r": 8}}),
    ],
)
def test_a_setting_is_a_dotted_key_and_a_yaml_value(setting: str, values: dict[str, Any]) -> None:
    assert override(setting)[0] == values


def test_every_key_of_a_section_that_is_set_has_the_setting_as_its_place() -> None:
    setting = "lora={r: 8, more: {x: 1}}"
    assert override(setting)[1] == dict.fromkeys(["lora", "lora.r", "lora.more", "lora.more.x"], f"--set {setting}")


LONG = ".".join("a" * 2000)


@pytest.mark.parametrize("setting", ["lora.r", "", "=8", "lora.=8", "lora..r=8", " =8", "lora.r:8", f"{LONG}=1"])
def test_a_setting_in_the_wrong_form_is_refused_with_an_example(setting: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override(setting)
    wanted = "expected dotted.key=value, for example --set training.max_steps=50"
    assert caught.value.problems == (f"--set {setting}: {wanted}",)


@pytest.mark.parametrize(
    "value", ["[1", "a: b", "*x", "!!bool x", "{a: 1, a: 2}", "1\nseed: 2", "1\n---\n2", "@x", "\x00"]
)
def test_a_setting_whose_value_is_not_one_yaml_value_is_refused(value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override(f"lora.r={value}")
    [line] = caught.value.problems
    assert line.startswith(f"--set lora.r={value}:")


keys = st.lists(st.sampled_from(["a", "b", "value", " ", "é"]), max_size=4).map(".".join)


@fuzz
@given(st.builds("{}={}".format, keys, yaml_like) | st.text(max_size=20))
def test_any_setting_is_a_mapping_or_a_config_error(argument: str) -> None:
    try:
        values, _ = override(argument)
    except ConfigError as error:
        assert all(line.startswith("--set ") for line in error.problems)
        return
    assert isinstance(values, dict)
