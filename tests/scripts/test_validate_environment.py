"""The command that makes every check: what it prints, its JSON, its exit codes, and the specification's functions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from finetune import checks
from finetune.checks.preflight import Preflight
from finetune.checks.runner import Check, Result
from finetune.cli import PYTHON
from finetune.config.load import ROOT, load_config
from finetune.files import write_json
from finetune.runs import receipt
from support.recorded import LINUX, M4

SCRIPT = ROOT / "scripts" / "validate_environment.py"
Done = subprocess.CompletedProcess[str]
Command = Callable[..., Done]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a user with a home, without an account, a tracker or a Hub that could be asked."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "WANDB_", "PYTORCH_"))}
    kept.pop("NO_COLOR", None)
    return {**kept, "HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:1", "USER": "trainer"}


@pytest.fixture
def validate(environment: dict[str, str], tmp_path: Path) -> Command:
    """Runs the command as a person does, from another folder."""

    def running(*arguments: object, **more: str) -> Done:
        command = [sys.executable, str(SCRIPT), *map(str, arguments)]
        options: dict[str, Any] = {"cwd": tmp_path, "env": environment | more, "capture_output": True, "text": True}
        return subprocess.run(command, check=False, **options)

    return running


@pytest.fixture
def case(tiny_mistral: Path, conversations: Path, tmp_path: Path) -> list[str]:
    """Arguments for a small training of a small model, on which there is nothing to find."""
    settings = {
        "model.name": tiny_mistral, "dataset.train_file": conversations, "dataset.validation_split": 0.25,
        "training.num_train_epochs": 10, "output.dir": tmp_path / "adapters",
    }  # fmt: skip
    return ["--config", "cpu", *(part for key, value in settings.items() for part in ("--set", f"{key}={value}"))]


def spoil(path: Path) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write('{"messages": []}\n')


# Everything -----------------------------------------------------------------------------------------------------------


def test_where_nothing_is_wrong_it_ends_with_0_and_says_how_to_train(validate: Command, case: list[str]) -> None:
    done = validate(*case, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert list(document) == ["schema_version", "status", "checks", "environment"]
    assert (document["schema_version"], document["status"]) == (1, "pass")
    assert list(document["environment"]) == ["machine", "versions"]
    assert document["environment"]["versions"].keys() >= {"torch", "transformers", "peft", "trl", "bitsandbytes"}
    found = {row["id"]: row for row in document["checks"]}
    assert list(found) == [it.id for it in checks.select("cpu", (), ("receipt",))]
    assert {row["status"] for row in found.values()} == {"pass", "skip"}
    assert {tuple(row) for row in found.values()} == {("id", "status", "detail", "fix", "seconds")}

    lines = done.stderr.splitlines()
    assert lines[0].startswith("validate ")
    assert lines[0].endswith("configs/training_config_cpu.yaml (--config cpu)")
    assert [line.split()[:2] for line in lines[1:-1]] == [[row["status"], row["id"]] for row in found.values()]
    counts = [sum(row["status"] == status for row in found.values()) for status in ("pass", "skip")]
    tally = f"{counts[0]} passed, 0 warnings, 0 failed, {counts[1]} skipped"
    assert lines[-1] == f"{tally}; next: {PYTHON} src/train.py {' '.join(case)}"
    assert "\033" not in done.stderr
    assert not (Path(case[-1].removeprefix("output.dir=")) / "demo-cpu").exists()  # looked at, not begun


def test_many_things_that_are_wrong_are_all_told_in_one_go(
    validate: Command, case: list[str], conversations: Path, tmp_path: Path
) -> None:
    spoil(conversations)
    base = tmp_path / "base"
    shutil.copytree(case[3].removeprefix("model.name="), base)
    (base / "model.safetensors").unlink()
    done = validate(*case, "--set", f"model.name={base}", "--skip", "libraries,device", HOME="/dev/null/nobody")
    assert done.returncode == 3
    marked = [line.split()[:2] for line in done.stdout.splitlines() if line.startswith(("  FAIL", "  WARN"))]
    assert marked == [["WARN", "host.user"], ["FAIL", "model.files"], ["FAIL", "data.rows"]]
    assert done.stdout.splitlines()[-1].endswith(" --only model.files,data.rows")


@pytest.mark.parametrize("deep", [True, False])
def test_after_deep_comes_one_block_to_paste(deep: bool, validate: Command, case: list[str], tmp_path: Path) -> None:
    done = validate(*case, *["--deep"] * deep, "--only", "host.python,host.user", LOGNAME="mia", USER="mia")
    lines = done.stdout.splitlines()
    python = ".".join(map(str, sys.version_info[:3]))
    assert lines[2] == f"  pass  host.user                mia, HOME {tmp_path}"
    assert lines[3].startswith("2 passed, 0 warnings, 0 failed, 0 skipped; next: ")
    if not deep:
        assert len(lines) == 4
        return
    assert lines[4:6] == ["", "----- paste from here -----"]
    assert [line.split()[0] for line in lines[6:9]] == ["machine", "versions", "config"]
    assert lines[9:] == [f"pass host.python: Python {python}", "pass host.user: USER, HOME ~", "----- to here -----"]
    assert not {"mia", str(tmp_path)} & set(" ".join(lines[5:]).split())
    assert (done.returncode, done.stderr) == (0, "")


# A part of it ---------------------------------------------------------------------------------------------------------


def test_only_and_skip_take_ids_and_groups(validate: Command) -> None:
    done = validate("--config", "h100", "--only", "host", "--skip", "host.clock,host.memory,host.system")
    python = ".".join(map(str, sys.version_info[:3]))
    lines = done.stdout.splitlines()
    assert lines[1] == f"  pass  host.python              Python {python}"
    assert [line.split()[1] for line in lines[1:-1]] == ["host.python", "host.user"]
    assert lines[-1] == f"2 passed, 0 warnings, 0 failed, 0 skipped; next: {PYTHON} src/train.py --config h100"
    assert (done.returncode, done.stderr) == (0, "")


def test_a_bad_row_is_4_with_its_line_and_the_command_to_look_again(
    validate: Command, case: list[str], conversations: Path
) -> None:
    spoil(conversations)
    done = validate(*case, "--only", "data.rows,data.labels")
    assert done.stdout.splitlines()[1:] == [
        "  FAIL  data.rows                data: 1 bad row",
        f'{" " * 35}{conversations}:41: "messages" is an empty list, expected a list of messages',
        "                                 -> Fix them, or leave them out with --set dataset.on_bad_row=drop",
        "  skip  data.labels              needs data.rows",
        "0 passed, 0 warnings, 1 failed, 1 skipped; fix the failed checks, then run: "
        f"{PYTHON} scripts/validate_environment.py "
        f"{' '.join(case)} --only data.rows",
    ]
    assert (done.returncode, done.stderr) == (4, "")


def test_data_that_is_not_there_is_2(validate: Command, case: list[str], conversations: Path) -> None:
    conversations.unlink()
    done = validate(*case, "--only", "data.rows", "--json")
    assert done.returncode == 2
    document = json.loads(done.stdout)
    assert document["status"] == "fail"
    [row] = document["checks"]
    assert row.pop("seconds") >= 0
    assert row == {
        "id": "data.rows",
        "status": "fail",
        "detail": f"{conversations}: No such file or directory",
        "fix": "put your JSONL there, or try with --set dataset.train_file=data/sample/train.jsonl",
    }


def test_a_warning_fails_only_with_strict(validate: Command) -> None:
    done = validate("--config", "h100", "--only", "host.user", HOME="/dev/null/trainer")
    assert done.returncode == 0
    last = done.stdout.splitlines()[-1]
    assert last == f"0 passed, 1 warning, 0 failed, 0 skipped; next: {PYTHON} src/train.py --config h100"
    done = validate("--config", "h100", "--only", "host.user", "--strict", "--json", HOME="/dev/null/trainer")
    assert (done.returncode, json.loads(done.stdout)["status"]) == (3, "fail")
    again = f"fix the failed checks, then run: {PYTHON} scripts/validate_environment.py --config h100 --only host.user"
    assert done.stderr.splitlines()[-1] == f"0 passed, 1 warning, 0 failed, 0 skipped; {again}"


def test_a_setting_with_a_space_is_quoted_where_it_is_to_be_typed_again(validate: Command) -> None:
    done = validate("--config", "h100", "--set", "system_prompt=Be brief.", "--only", "host.python")
    assert done.stdout.splitlines()[-1].endswith(
        f"next: {PYTHON} src/train.py --config h100 --set 'system_prompt=Be brief.'"
    )


# Lists and usage ------------------------------------------------------------------------------------------------------


def test_list_names_every_check_and_makes_none(validate: Command) -> None:
    done = validate("--list")
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [check.id for check in checks.CHECKS]
    assert lines[1] == "host.python              Python 3.11 to 3.13 (h100,m4,cpu; fail)"
    wandb = next(line for line in lines if line.startswith("tracking.wandb"))
    assert wandb.endswith("wandb has a key and answers, or will be offline (h100,m4,cpu; warn; network)")
    assert (done.returncode, done.stderr) == (0, "")


def test_list_is_also_json(validate: Command) -> None:
    rows = json.loads(validate("--list", "--json").stdout)
    assert [row["id"] for row in rows] == [check.id for check in checks.CHECKS]
    assert rows[1] == {
        "id": "host.python", "looks_at": "Python 3.11 to 3.13", "platforms": ["h100", "m4", "cpu"], "needs": [],
        "level": "fail", "network": False, "deep": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["--only", "gpu.drivr"],
            "config: 1 problem\n  --only gpu.drivr: no such check; did you mean gpu.driver?\n"
            f"{PYTHON} scripts/validate_environment.py --list lists them all\n",
        ),
        (
            ["--skip", "gpu", "--skip", "modl", "--set", "training.learning_rte=1"],  # told first
            "config: 1 problem\n  --skip modl: no such check; did you mean model?\n"
            f"{PYTHON} scripts/validate_environment.py --list lists them all\n",
        ),
        (
            ["--set", "training.learning_rte=1"],
            "config: 1 problem\n  --set training.learning_rte=1  training.learning_rte: unknown key; "
            "did you mean training.learning_rate?\n",
        ),
        (
            ["--receipt", "receipt.json"],
            "config: 1 problem\n  --receipt receipt.json: No such file or directory; "
            "name the receipt.json of a run's folder, copied whole\n",
        ),
    ],
)
def test_wrong_usage_is_2_before_anything_is_looked_at(
    arguments: list[str], told: str, validate: Command, tmp_path: Path
) -> None:
    done = validate("--config", "cpu", "--set", f"model.name={tmp_path}", *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", told)


def test_a_receipt_that_agrees_is_0_and_that_of_another_training_is_3(
    validate: Command, case: list[str], tmp_path: Path
) -> None:
    config, _ = load_config("cpu", case[3::2])
    file = tmp_path / "receipt.json"
    write_json(file, receipt.make(config, Preflight(config, LINUX).prepared))
    given = (*case, "--only", "receipt", "--receipt", file)
    done, other = validate(*given), validate(*given, "--set", "lora.r=4")
    assert (done.returncode, other.returncode) == (0, 3), done.stderr
    assert f"the same training as {file}" in done.stdout
    assert "lora.r: 16 -> 4" in other.stdout


# The specification's functions ----------------------------------------------------------------------------------------


@pytest.fixture
def made(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Notes which checks are made, by platform; the one called `bad` fails."""
    noted: dict[str, list[str]] = {"bad": []}

    def run(chosen: Iterable[Check], preflight: Any) -> Iterator[Result]:
        for check in chosen:
            noted.setdefault(preflight.config.platform, []).append(check.id)
            bad = check.id in noted["bad"]
            yield Result(check.id, "fail" if bad else "pass", "found", "fix it" if bad else "", 0.0)

    monkeypatch.setattr(script, "run", run)
    return noted


LIBRARIES = ["libraries.versions", "libraries.imports"]
MAC = [check.id for check in checks.CHECKS if check.id.startswith("mac.")]
GPU = [check.id for check in checks.CHECKS if check.id.startswith("gpu.")]
DEVICE = ["device.qlora", "device.bfloat16", "device.optimizer", "device.recompute"]
KERNELS = ["device.loss", "device.attention"]
REMOTE_KERNELS = ["device.triton", *KERNELS, "device.flash_attention", "device.deterministic"]


@pytest.mark.parametrize(
    ("call", "platform", "ids"),
    [
        (lambda it: it.check_imports_remote(), "h100", [*LIBRARIES, "gpu.torch", "device.flash_attention"]),
        (lambda it: it.check_imports_m4(), "m4", [*LIBRARIES, "mac.torch", "device.qlora"]),
        (lambda it: it.check_gpu("h100"), "h100", [*GPU, *DEVICE, *REMOTE_KERNELS]),
        (lambda it: it.check_gpu("m4"), "m4", [*MAC, *DEVICE, *KERNELS]),
    ],
)
def test_the_specifications_functions_are_selections_from_the_registry(
    call: Callable[[ModuleType], bool], platform: str, ids: list[str], script: ModuleType, made: dict[str, list[str]]
) -> None:
    assert call(script) is True
    assert made == {"bad": [], platform: ids}
    made["bad"].append(ids[-1])
    assert call(script) is False


def test_they_print_a_header_and_each_check(
    script: ModuleType, made: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    made["bad"].append("device.flash_attention")
    script.check_imports_remote()
    assert capsys.readouterr().out == (
        "H100 libraries\n"
        "  pass  libraries.versions       found\n"
        "  pass  libraries.imports        found\n"
        "  pass  gpu.torch                found\n"
        "  FAIL  device.flash_attention   found\n"
        "                                 -> fix it\n"
    )
    script.print_header("a title")
    script.print_check(Result("a", "skip", "not here", "", 0.0))
    assert capsys.readouterr().out == "a title\n  skip  a                        not here\n"


@pytest.mark.parametrize(("machine", "works"), [(M4, True), (LINUX, False)])
def test_an_accelerator_that_is_not_here_does_not_work(
    machine: Any, works: bool, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "read_machine", lambda: machine)
    monkeypatch.setattr(script, "GPU", ("host.system",))
    assert script.check_gpu("m4") is works
