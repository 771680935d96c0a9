"""The rooms of src/finetune and their floors: imports go down only, in no circle, and what is light stays light."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from finetune.files import ROOT
from finetune.machine.platforms import PLATFORMS

PACKAGE = ROOT / "src" / "finetune"
# The rooms, lowest floor first: a file imports from its own room and from those before it.
FLOORS = (
    *("wording", "errors", "files", "cli", "machine", "config", "plan"),
    *("data", "model", "terminal", "runs", "training", "results", "checks", "prove"),
)
MOST_MODULES = 16  # in one folder
TORCH = {"torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "safetensors"}
DATA = {"numpy", "pyarrow", "tokenizers", "sentencepiece", "mistral_common", "datasets"}
PAGES = {"matplotlib", "jinja2"}
HEAVY = {*TORCH, *DATA, *PAGES, "huggingface_hub", "pandas"}
# What a room's files may import when they are imported themselves; rooms that are not named may import anything.
# Inside a function every file may: what is broken is then found by who needs it, and the rest still answers.
REFUSED = dict.fromkeys((*FLOORS[: FLOORS.index("data")], "terminal", "checks"), HEAVY) | {"data": TORCH | PAGES}
ALLOWED = ("checks.numerics.",)  # computes with the libraries; a check imports it when it looks
# Below these nobody may import what is heavy even in a function, but for the files that ask the libraries themselves.
NEVER = ("wording", "errors", "files", "cli", "config", "plan")
KNOWS_DEVICES = ("machine.platforms", "machine.device")
DEVICE_WORDS = re.compile(r"\b(cuda|mps)\b")
DEVICES = {row.device for row in PLATFORMS.values()}
# A path in a command to paste: behind a script of this program, or a command of the shell.
PASTED = re.compile(r"(?:\bcommand\([^{}]*\)\}|\b(?:rm -r|chown -R \$\(id -u\)|chmod u\+r|cat)) \{(\w+)")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def nodes(tree: ast.AST, in_functions: bool) -> Iterator[ast.AST]:
    """Every node that can run: what is below `if TYPE_CHECKING` is left out."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and is_type_checking(child):
            for other in child.orelse:
                yield from nodes(other, in_functions)
        elif in_functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from nodes(child, in_functions)


def imported(tree: ast.AST, in_functions: bool = True) -> Iterator[str]:
    """Dotted names of all imports; `from finetune.plan import fit` is finetune.plan.fit where that is a module."""
    for node in nodes(tree, in_functions):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            for alias in node.names:
                yield f"{module}.{alias.name}" if f"{module}.{alias.name}" in MODULES else module


def device_words(tree: ast.AST) -> Iterator[str]:
    """String literals, docstrings left out, in which a device is named."""
    statements = (node.value for node in ast.walk(tree) if isinstance(node, ast.Expr))
    docstrings = {id(value) for value in statements if isinstance(value, ast.Constant)}
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) and id(node) not in docstrings else None
        if isinstance(text, str) and DEVICE_WORDS.search(text):
            yield text


def told_apart(node: ast.AST) -> list[ast.expr]:
    """Expressions with which `node` decides: of a comparison, a `case`, a subscript, and the keys of a table."""
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        return [value for side in sides for value in getattr(side, "elts", [side])]
    if isinstance(node, ast.MatchValue):
        return [node.value]
    if isinstance(node, ast.Subscript):
        return [node.slice]
    return [key for key in node.keys if key is not None] if isinstance(node, ast.Dict) else []


def platform_decisions(tree: ast.AST, allowed: set[str]) -> Iterator[str]:
    """Code that decides by a literal name of a platform or device, but for names in `allowed` that no `.name` is."""
    for node in ast.walk(tree):
        words = {value.value for value in told_apart(node) if isinstance(value, ast.Constant)} & {*PLATFORMS, *DEVICES}
        of_a_row = any(isinstance(value, ast.Attribute) and value.attr == "name" for value in told_apart(node))
        if words - (set() if of_a_row else allowed):
            yield ast.unparse(node)


def module_name(path: Path) -> str:
    """`plan.fit` for src/finetune/plan/fit.py, `checks` for src/finetune/checks/__init__.py, `train.py` for itself."""
    if PACKAGE not in path.parents:
        return path.name
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


SOURCES = sorted((ROOT / "src").rglob("*.py"))
NAMES = [module_name(path) for path in SOURCES]
MODULES = {f"finetune.{name}" for name in NAMES}


def faults(name: str, source: str) -> list[str]:
    """What is out of order in the module `name` of src/finetune (or beside it), one line each."""
    tree = ast.parse(source)
    room = name.split(".")[0]
    found = []
    refused = set() if name.startswith(ALLOWED) else REFUSED.get(room, set())
    for target in imported(tree, in_functions=room in NEVER):
        if target.split(".")[0] in refused:
            found.append(f"{name} imports {target.split('.')[0]}")
    for target in imported(tree) if room in FLOORS else ():
        package, _, module = target.partition(".")
        other = module.split(".")[0]
        if package == "finetune" and other in FLOORS and FLOORS.index(other) > FLOORS.index(room):
            found.append(f"{name} imports finetune.{module}, which is on a floor above")
    if name not in KNOWS_DEVICES:
        found += [f"{name} names a device: {text!r}" for text in device_words(tree)]
    if name != "machine.platforms":
        decisions = platform_decisions(tree, allowed=DEVICES if name in KNOWS_DEVICES else set())
        found += [f"{name} decides by a platform's name: {code}" for code in decisions]
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle of imports, none where there is no circle."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_module_is_in_a_room_and_every_room_is_there() -> None:
    assert {name.split(".")[0] for name in NAMES} == {*FLOORS, "__init__", "train"}


def test_no_folder_is_crowded() -> None:
    folders = [path.parent for path in SOURCES if path.name != "__init__.py"]
    crowded = {str(folder.relative_to(ROOT)): folders.count(folder) for folder in folders}
    assert {folder: count for folder, count in crowded.items() if count > MOST_MODULES} == {}


def test_no_module_imports_itself_through_others() -> None:
    """Imports inside functions count too: a circle is one, whenever it closes."""
    graph = {}
    for path, name in zip(SOURCES, NAMES, strict=True):
        targets = {target.removeprefix("finetune.") for target in imported(ast.parse(path.read_text(encoding="utf-8")))}
        graph[name] = (targets & {*NAMES}) - {name}
    assert circle(graph) == []


def test_the_search_for_circles_finds_one() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) in (
        ["a", "b", "c", "a"],
        *(["a", "c", "b", "a"], ["b", "c", "a", "b"], ["b", "a", "c", "b"], ["c", "a", "b", "c"], ["c", "b", "a", "c"]),
    )


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_go_down_and_only_platforms_and_device_name_devices(path: Path) -> None:
    assert faults(module_name(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("name", "source", "fault"),
    [
        ("config.load", "import torch", "config.load imports torch"),
        ("plan.plan", "def f():\n    from transformers import AutoConfig", "plan.plan imports transformers"),
        ("terminal", "if TYPE_CHECKING:\n    pass\nelse:\n    import pyarrow", "terminal imports pyarrow"),
        ("checks.gpu", "import torch", "checks.gpu imports torch"),
        ("data.prepare", "def f():\n    from finetune.runs import folder",
            "data.prepare imports finetune.runs.folder, which is on a floor above"),
        ("model.load", "device = 'cuda'", "model.load names a device: 'cuda'"),
        ("train.py", "open_device('mps')", "train.py names a device: 'mps'"),
        *(
            (name, code, f"{name} decides by a platform's name: {code}")
            for name, code in (
                ("checks.host", "platform.name == 'h100'"),
                ("train.py", "device in ('other', 'cpu')"),
                ("plan.memory", "PROGRAM_GIB['h100']"),
                ("machine.device", "platform.name == 'cpu'"),
            )
        ),
        ("checks.host", "match name:\n    case 'h100':\n        pass",
            "checks.host decides by a platform's name: 'h100'"),
    ],
)  # fmt: skip
def test_the_guard_fails_on_a_source_that_is_out_of_order(name: str, source: str, fault: str) -> None:
    assert faults(name, source) == [fault]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("terminal", "import yaml\nfrom finetune.plan import plan\nfrom finetune.errors import UserError"),
        ("model.load", "import torch\nfrom finetune.config.schema import ModelConfig\ntorch.cuda.synchronize()"),
        ("model.load", '"""Runs on cuda and mps."""\ndef f():\n    """On cuda."""\n    # mps\n    return "bumps"'),
        ("machine.platforms", 'device = "cuda" if row.name == "h100" else "cpu"'),
        ("machine.device", "if platform.device == 'cuda': pass\npresent = {'cuda': True, 'mps': False, 'cpu': True}"),
        ("checks.host", "advice = '--config h100'\nplatform: Literal['h100', 'm4', 'cpu']\ntensor.to('cpu')"),
        ("checks.gpu", "def look():\n    from finetune.checks.numerics import linear"),
    ],
)
def test_the_guard_lets_pass_what_is_in_order(name: str, source: str) -> None:
    assert faults(name, source) == []


def brought_by(*names: str) -> set[str]:
    """Which heavy packages a process has once it has imported these modules of finetune."""
    imports = "; ".join(f"import finetune.{name}" for name in names)
    code = f"import sys; {imports}; print(*sorted(set(sys.modules) & {HEAVY!r}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return {*done.stdout.split()}


@pytest.mark.parametrize("room", [room for room in FLOORS if room in REFUSED])
def test_importing_a_room_brings_nothing_that_it_refuses(room: str) -> None:
    """In fact, through all that it imports; the guard above looks at each file alone."""
    names = [name for name in NAMES if name.split(".")[0] == room and not name.startswith(ALLOWED)]
    assert brought_by(*names) & REFUSED[room] == set()


def test_a_report_is_made_without_torch() -> None:
    assert brought_by("results.report.page", "results.report.refresh") & (TORCH | DATA) <= {"numpy"}


def test_a_path_in_a_command_to_paste_is_quoted() -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), call)
        for path in sorted(PACKAGE.rglob("*.py"))
        for call in PASTED.findall(path.read_text(encoding="utf-8"))
    }
    assert len(found) >= 8
    assert {(path, call) for path, call in found if call not in ("quoted", "shlex")} == set()
