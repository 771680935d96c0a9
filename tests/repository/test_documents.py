"""README, docs/architecture.md and AGENTS.md are about this tree."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator

import pytest

from finetune.files import ROOT

PACKAGE = ROOT / "src" / "finetune"
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ("docs/architecture.md", "AGENTS.md")
CHANGES = (
    *("a config key", "the template", "a check", "a check of the Docker host", "the report", "retention"),
    *("a platform fact", "packing", "the memory formula", "a CLI flag", "resume rules", "a tracker", "the LoRA layer"),
)
ELSEWHERE = ("trl/trainer/utils.py", "setup.py")  # files of libraries that our comments name


def block(text: str) -> list[str]:
    """The lines of the indented block that shows src/finetune."""
    (found,) = [lines for lines in re.findall(r"(?:^    .*\n)+", text, re.MULTILINE) if "src/finetune/\n" in lines]
    return [line[4:] for line in found.splitlines()]


def rooms(lines: list[str]) -> list[str]:
    return [line.split()[0] for line in lines if re.match(r"  \w", line)]


def modules(lines: list[str]) -> dict[str, set[str]]:
    """Each folder's modules, from the lines below the one that names it; `report/{page, charts}` are two."""
    found: dict[str, str] = {}
    for line in lines:
        if re.match(r"  \w+/", line):
            found[line.split()[0]] = ""
        elif line.startswith(" " * 10):
            found[[*found][-1]] += f" {line}"
    grouped = r"(\w+)/\{([\w, ]+)\}"
    return {
        room: {f"{folder}/{name}" for folder, names in re.findall(grouped, text) for name in names.split(", ")}
        | {name for name in re.sub(grouped, "", text).split() if not name.endswith("/")}
        for room, text in found.items()
    }


def test_the_two_trees_show_the_same_rooms_and_they_are_those_of_the_package() -> None:
    here = [f"{path.name}{'/' if path.is_dir() else ''}" for path in PACKAGE.iterdir() if path.name[0] != "_"]
    shown = rooms(block(ARCHITECTURE))
    assert sorted(shown) == sorted(here)
    assert rooms(block(README)) == shown


def test_the_architecture_names_every_module() -> None:
    there = {
        f"{folder.name}/": {
            str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.py") if path.name != "__init__.py"
        }
        for folder in PACKAGE.iterdir()
        if folder.is_dir() and folder.name[0] != "_"
    }
    assert modules(block(ARCHITECTURE)) == there


def test_each_usual_change_has_its_files() -> None:
    table = ARCHITECTURE.split("## Where to make a change\n")[1]
    rows = dict(re.findall(r"^\| (.+?) \| (.*`src/.*) \|$", table, re.MULTILINE))
    assert tuple(rows) == CHANGES


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_in_a_document_is_there(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    paths = set(re.findall(r"(?:src|tests|scripts|configs|docs|benchmarks|requirements|docker)/[\w./-]*\w/?", text))
    assert len(paths) > 3
    assert sorted(path for path in paths if not (ROOT / path).exists()) == []


def remarks(source: str) -> Iterator[str]:
    """Comments and docstrings."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    yield from (token.string for token in tokens if token.type == tokenize.COMMENT)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    yield from (ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source)) if isinstance(node, documented))


def test_a_file_that_a_comment_names_is_there() -> None:
    sources = [path for folder in ("src", "scripts", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")]
    known = [f"/{path.relative_to(ROOT)}" for path in sources]
    named = {
        (str(path.relative_to(ROOT)), name)
        for path in sources
        if "tests" not in path.relative_to(ROOT).parts
        for text in remarks(path.read_text(encoding="utf-8"))
        for name in re.findall(r"(?<![\w/.])[\w/]+\.py\b", text)
    }
    missing = [(where, name) for where, name in named if not any(path.endswith(f"/{name}") for path in known)]
    assert len(named) > 10
    assert [it for it in missing if it[1] not in ELSEWHERE] == []
