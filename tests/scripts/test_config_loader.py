"""The command that prints the resolved config."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import yaml

from finetune.config import yaml_file
from finetune.config.load import load_config
from finetune.files import ROOT

SCRIPT = ROOT / "scripts" / "config_loader.py"
Run = Callable[..., tuple[int, str, str]]
FILES = sorted((ROOT / "configs").glob("*.yaml"))
SCHEMA = json.loads((ROOT / "configs" / "schema.json").read_text(encoding="utf-8"))


def jsonschema_errors(tree: dict[str, Any]) -> list[str]:
    """The dotted path of each place that an editor marks."""
    errors = jsonschema.Draft202012Validator(SCHEMA).iter_errors(tree)
    return [".".join(map(str, error.absolute_path)) for error in errors]


def local(tmp_path: Path) -> tuple[str, str]:
    """Settings that put a folder in place of the demo model, which may not be made yet."""
    return "--set", f"model.name={tmp_path}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_shipped_config_is_printed_and_reads_back_the_same(run: Run, path: Path, tmp_path: Path) -> None:
    expected = load_config(str(path), [f"model.name={tmp_path}"])[0]
    code, out, err = run(str(path), *local(tmp_path))
    assert (code, err) == (0, "")
    printed = tmp_path / "printed.yaml"
    printed.write_text(out, encoding="utf-8")
    assert load_config(str(printed))[0] == expected
    code, out, err = run(str(path), *local(tmp_path), "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == expected.as_dict()


def test_a_platforms_name_is_as_good_as_its_file(run: Run) -> None:
    assert run("h100") == run(str(ROOT / "configs" / "training_config_h100.yaml"))
    assert yaml_file.parse(run("h100")[1], "stdout")[0]["platform"] == "h100"


@pytest.mark.parametrize("text", ["2e-4", "null", "yes", "0x10", "a: b", "é", " x "])
def test_text_that_looks_like_something_else_is_still_text_when_read_back(run: Run, text: str) -> None:
    setting = f"tracking.project={json.dumps(text)}"
    _, out, _ = run("h100", "--set", setting)
    assert yaml_file.parse(out, "stdout")[0]["tracking"]["project"] == text
    assert run("h100", "--set", setting, "--get", "tracking.project")[1] == f"{text}\n"


@pytest.mark.parametrize(
    ("key", "as_yaml", "as_json"),
    [
        ("training.learning_rate", "0.0002\n", "0.0002\n"),
        ("training.bf16", "true\n", "true\n"),
        ("system_prompt", "null\n", "null\n"),
        ("tracking.run_name", "mistral-7b-qlora-h100\n", '"mistral-7b-qlora-h100"\n'),
        (
            "output",
            "dir: adapters\ncopy_to: null\ncopy_checkpoints: false\n",
            '{\n  "dir": "adapters",\n  "copy_to": null,\n  "copy_checkpoints": false\n}\n',
        ),
    ],
)
def test_one_value_is_printed_bare_or_as_json(run: Run, key: str, as_yaml: str, as_json: str) -> None:
    assert run("h100", "--get", key) == (0, as_yaml, "")
    assert run("h100", "--get", key, "--json") == (0, as_json, "")


@pytest.mark.parametrize(
    ("key", "ending"),
    [
        ("lora.rr", "; did you mean lora.r?"),
        ("learning_rate", "; did you mean training.learning_rate?"),
        ("zzzzzz", ""),
    ],
)
def test_an_unknown_key_is_exit_2_with_the_likeliest_known_one(run: Run, key: str, ending: str) -> None:
    assert run("h100", "--get", key) == (2, "", f"config: 1 problem\n  --get {key}: unknown key{ending}\n")


def test_a_config_error_is_exit_2_with_its_text_on_stderr(run: Run) -> None:
    text = "config: 1 problem\n  --config h200: no such file; type a path or one of: h100, m4, cpu\n"
    assert run("h200", "--json") == (2, "", text)
    code, out, err = run("h100", "--set", "lora.r=many")
    assert (code, out) == (2, "")
    assert err == "config: 1 problem\n  --set lora.r=many  lora.r: found 'many' (text), expected a whole number\n"


@pytest.mark.parametrize("arguments", [[], ["h100", "--sett", "x=1"]])
def test_wrong_usage_is_exit_2(run: Run, arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("usage: ")


def test_the_schema_for_editors_is_the_one_that_is_checked_in(run: Run) -> None:
    """Where it is not: .venv/bin/python scripts/config_loader.py --schema > configs/schema.json."""
    assert run("--schema") == (0, (ROOT / "configs" / "schema.json").read_text(encoding="utf-8"), "")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_an_editor_finds_the_schema_and_accepts_every_shipped_config(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == "# yaml-language-server: $schema=schema.json"
    assert jsonschema_errors(yaml_file.load_yaml(path)) == []


@pytest.mark.parametrize(
    ("tree", "where"),
    [
        ({"lora": {"rank": 8}}, "lora"),
        ({"training": {"learning_rate": 2}}, "training.learning_rate"),
        ({"training": {"optim": "adam"}}, "training.optim"),
        ({"seed": 1}, ""),
    ],
)
def test_an_editor_marks_what_the_program_refuses(tree: dict[str, Any], where: str) -> None:
    assert jsonschema_errors(tree) == [where]


def test_every_key_has_a_description_in_the_schema() -> None:
    properties = [part["properties"] for part in (SCHEMA, *SCHEMA["$defs"].values())]
    described = {name: value for part in properties for name, value in part.items() if "$ref" not in value}
    assert [name for name, value in described.items() if not value.get("description")] == []
    assert described["learning_rate"]["description"] == (
        "2e-4 is usual for LoRA on a 7B model; lower it if the loss jumps"
    )


def test_the_four_functions_of_the_specification_are_the_packages_own(script: ModuleType) -> None:
    names = ["load_yaml", "deep_merge", "validate_required_fields", "get_config_value"]
    assert sorted(script.__all__) == sorted(names)
    assert [getattr(script, name) for name in names] == [getattr(yaml_file, name) for name in names]


def test_it_works_from_any_directory(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"model: {{name: {tmp_path}}}\nlora: {{r: 4}}\n", encoding="utf-8")
    command = [sys.executable, str(SCRIPT), "mine.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert yaml.safe_load(done.stdout)["lora"]["r"] == 4
    wrong = subprocess.run([*command, "--get", "x"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stdout) == (2, "")
