"""A config key and a check are added to a copy of the project as CONTRIBUTING.md says: nothing else has to know."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.files import ROOT

STEPS = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTION = STEPS.split("**Add a config key.**")[1].split("\n\n**")[0]
LINE = "  label_noise: 0.25                # share of labels replaced at random; no cost\n"
ABOVE = "  seed: 42 "
# By file that the steps name: what is put there, and before which text.
KEY = {
    "src/finetune/config/schema.py": [("    label_noise: Share\n", "    seed: ")],
    "configs/training_config.yaml": [(LINE, ABOVE)],
    "configs/training_config_h100.yaml": [(LINE, ABOVE)],
    "configs/training_config_m4.yaml": [(LINE, ABOVE)],
    "tests/repository/test_shipped_configs.py": [('    "training.label_noise": 0.25,\n', '    "training.seed": ')],
}
# The same for a check.
CHECK = {
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
# With data that has no rows, what resume and receipt say of two configs that differ in the new key.
COMPARED = """
import json
from types import SimpleNamespace
from finetune.config.load import load_config
from finetune.runs import manifest, receipt, resume
chat = SimpleNamespace(fingerprint="")
prepared = SimpleNamespace(tokens={}, whole={}, files={}, statistics={}, sequences=[], chat=chat)
then, now = (load_config("h100", settings)[0] for settings in ([], ["training.label_noise=0.5"]))
changes = resume.differences(manifest.fingerprint(then, prepared), manifest.fingerprint(now, prepared))
print(json.dumps([[*changes], receipt.differences(receipt.make(now, prepared), receipt.make(then, prepared))]))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy in which all steps were done, the command that they name included."""
    folder = tmp_path_factory.mktemp("added") / "project"
    for name in ("src", "scripts", "configs", "tests", "data", "requirements", "benchmarks", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for name, additions in [*KEY.items(), *CHECK.items()]:
        text = (folder / name).read_text(encoding="utf-8")
        for added, before in additions:
            assert before in text, (name, before)
            text = text.replace(before, added + before, 1)
        (folder / name).write_text(text, encoding="utf-8")
    command, target = re.findall(r"`\.venv/bin/python (scripts/\S+ --schema) > (\S+)`", SECTION)[0]
    (folder / target).write_text(tried(folder, *command.split()), encoding="utf-8")
    return folder


def tried(folder: Path, *command: str) -> str:
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_steps_name_each_file_that_a_new_key_needs_and_no_file_that_is_not_there() -> None:
    named = set(re.findall(r"`((?:src|configs|tests)/[\w/.]+)`", SECTION))
    only_for_a_rule = {"src/finetune/config/rules.py", "tests/config/test_rules.py"}
    assert named == {*KEY, *only_for_a_rule}
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_new_key_is_accepted_with_its_type_and_bounds(project: Path) -> None:
    loader = "scripts/config_loader.py"
    assert tried(project, loader, "h100", "--get", "training.label_noise") == "0.25\n"
    command = [sys.executable, loader, "h100", "--set", "training.label_noise=2"]
    refused = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    found = "training.label_noise: found 2 (whole number), expected at least 0 and at most 1"
    assert refused.stderr == f"config: 1 problem\n  --set training.label_noise=2  {found}\n"


def test_editors_get_it_with_the_comment_of_the_base(project: Path) -> None:
    schema = json.loads((project / "configs" / "schema.json").read_text(encoding="utf-8"))
    key = schema["$defs"]["TrainingConfig"]["properties"]["label_noise"]
    assert key["description"] == "share of labels replaced at random; no cost"
    assert (key["type"], key["minimum"], key["maximum"]) == ("number", 0, 1)


def test_without_marks_it_may_not_change_on_resume_and_must_agree_in_a_receipt(project: Path) -> None:
    program = project / "compared.py"
    program.write_text(f"import sys\nsys.path.insert(0, 'src')\n{COMPARED}", encoding="utf-8")
    changes, (must_agree, by_design) = json.loads(tried(project, "compared.py"))
    assert changes == ["config.training.label_noise: 0.25 -> 0.5"]
    assert must_agree == ["training.label_noise: 0.25 -> 0.5"]
    assert by_design == []


@pytest.mark.slow
def test_the_tests_of_configs_pass_with_it(project: Path) -> None:
    files = ("tests/repository/test_shipped_configs.py", "tests/scripts/test_config_loader.py", "tests/config")
    tried(project, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files)


def test_the_steps_name_the_files_that_a_new_check_needs() -> None:
    steps = STEPS.split("**Add a check.**")[1].split("\n\n")[0]
    for name in ("src/finetune/checks/", "tests/support/check_faults.py", "docs/checks.md"):
        assert name in steps


def test_a_check_that_was_added_by_the_steps_is_listed_and_made(project: Path) -> None:
    script = "scripts/validate_environment.py"
    assert "host.swap                little swap is used (h100,m4,cpu; warn)\n" in tried(project, script, "--list")
    assert "  pass  host.swap" in tried(project, script, "--config", "h100", "--only", "host.swap")


@pytest.mark.slow
def test_its_row_among_the_faults_is_found_by_the_tests_of_checks(project: Path) -> None:
    chosen = "swaps or every_check_has_a_fault or stands_in_its_page or needs_only_what_comes_before"
    pytest_of_checks = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/checks/test_faults.py")
    assert "4 passed" in tried(project, *pytest_of_checks, "-k", chosen)
