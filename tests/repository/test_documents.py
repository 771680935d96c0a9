"""README, docs/architecture.md, AGENTS.md and CONTRIBUTING.md are about this tree, and their steps can be followed."""

from __future__ import annotations

import ast
import io
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

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


# Add a check, as CONTRIBUTING.md says ---------------------------------------------------------------------------------

# By step: the file, what is put there, and before which line.
ADDED = {
    "src/finetune/checks/host.py": [
        (
            "def _swap(preflight: Preflight) -> Finding:\n"
            "    used = preflight.machine.swap_used_gib\n"
            '    found = f"{used:.1f} GiB of swap used"\n'
            '    return warned(found, "free -h") if used > 100 else passed(found)\n\n\n',
            "CHECKS = (\n",
        ),
        ('    Check("host.swap", "little swap is used", _swap, level="warn"),\n', '    Check("container.shm", '),
    ],
    "tests/support/check_faults.py": [
        (
            '    fault("a machine that swaps", "cpu", lambda b: b.has(swap_used_gib=120.0),\n'
            '          warn("host.swap", "120.0 GiB of swap used", "free -h")),\n',
            '    fault("an Intel Mac", "m4", ',
        )
    ],
    "docs/checks.md": [("| `host.swap` | little swap is used | all |\n", "| `container.shm` | ")],
}
CHECKING = "-k swaps or every_check_has_a_fault or stands_in_its_page or needs_only_what_comes_before"


@pytest.fixture(scope="module")
def with_a_new_check(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project to which the steps were done."""
    folder = tmp_path_factory.mktemp("added") / "project"
    for name in ("src", "scripts", "configs", "tests", "data", "requirements", "benchmarks", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for name, additions in ADDED.items():
        text = (folder / name).read_text(encoding="utf-8")
        for added, before in additions:
            assert before in text, (name, before)
            text = text.replace(before, added + before, 1)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def tried(folder: Path, *command: str) -> str:
    line = [sys.executable, *command]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_steps_name_the_files_that_a_new_check_needs() -> None:
    steps = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("**Add a check.**")[1].split("\n\n")[0]
    for name in ("src/finetune/checks/", "tests/support/check_faults.py", "docs/checks.md"):
        assert name in steps


def test_a_check_that_was_added_by_the_steps_is_listed_and_made(with_a_new_check: Path) -> None:
    script = "scripts/validate_environment.py"
    assert "host.swap                little swap is used (h100,m4,cpu; warn)\n" in tried(
        with_a_new_check, script, "--list"
    )
    assert "  pass  host.swap" in tried(with_a_new_check, script, "--config", "h100", "--only", "host.swap")


@pytest.mark.slow
def test_its_row_among_the_faults_is_found_by_the_tests_of_checks(with_a_new_check: Path) -> None:
    pytest_of_checks = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/checks/test_faults.py")
    assert "4 passed" in tried(with_a_new_check, *pytest_of_checks, CHECKING)
