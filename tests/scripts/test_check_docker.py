"""The command that says whether this Docker host can train, as a person runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from finetune.cli import PYTHON
from finetune.config.load import ROOT
from finetune.machine.docker_host import DockerHost
from support.commands import load_script
from support.docker_hosts import IDS, unreachable
from support.recorded_docker import READY


@pytest.fixture
def script() -> ModuleType:
    return load_script("check_docker")


SCRIPT = ROOT / "scripts" / "check_docker.py"


@pytest.fixture
def shown(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """(exit code, stdout, stderr) of the command on a recorded host."""

    def running(host: DockerHost, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(script, "read_docker_host", lambda: host)
        monkeypatch.setattr(sys, "argv", ["check_docker.py", *arguments])
        code = 0
        try:
            script.main()
        except SystemExit as end:
            assert isinstance(end.code, int)
            code = end.code
        written = capsys.readouterr()
        return code, written.out, written.err

    return running


def test_a_ready_host_is_0_and_the_next_command(shown: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = shown(READY)
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0] == "check_docker: this host, for docker compose run --rm train-h100"
    assert [line.split()[:2] for line in lines[1:-1]] == [["pass", id_] for id_ in IDS]
    assert lines[-1] == "14 passed, 0 warnings, 0 failed, 0 skipped; next: docker compose run --rm validate"


def test_a_failure_is_3_with_what_to_type_under_it(shown: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = shown(replace(READY, image=None))
    assert code == 3
    assert out.splitlines()[-6:] == [
        "  FAIL  docker.image             no image mistral-7b-qlora:h100",
        "                                 -> docker compose build",
        "  skip  docker.source            needs docker.image",
        "  skip  docker.flash_attention   needs docker.image",
        "  pass  docker.disk              412.3 GiB free in /var/lib/docker, "
        "expected to be needed: 40 for the image, 13.5 for the base",
        f"11 passed, 0 warnings, 1 failed, 2 skipped; "
        f"fix the failed checks, then run: {PYTHON} scripts/check_docker.py",
    ]


def test_json_is_one_document_of_the_shape_that_validate_has(shown: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = shown(replace(READY, buildx=None), "--json")
    document = json.loads(out)
    assert code == 0
    assert err.splitlines()[-1].startswith("13 passed, 1 warning, 0 failed, 0 skipped; next: ")
    assert list(document) == ["schema_version", "status", "checks", "environment"]
    assert (document["schema_version"], document["status"]) == (1, "warn")
    assert [row["id"] for row in document["checks"]] == IDS
    assert {tuple(row) for row in document["checks"]} == {("id", "status", "detail", "fix", "seconds")}
    assert document["environment"]["machine"]["driver"] == "550.90.07"
    versions = {"engine": "28.2.2", "api": "1.50", "compose": "2.36.2", "buildx": None}
    assert document["environment"]["versions"] == versions


def test_json_of_a_host_without_docker_fails_and_knows_no_versions(shown: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = shown(unreachable("absent", compose=None, buildx=None), "--json")
    document = json.loads(out)
    assert (code, document["status"]) == (3, "fail")
    assert set(document["environment"]["versions"].values()) == {None}


def test_a_check_that_crashes_is_one_finding_and_names_no_flag(shown: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = shown(replace(READY, compose="two"))
    assert code == 3
    assert "this check crashed: InvalidVersion: Invalid version: 'two'\n" in out
    assert "-> report it\n" in out


def test_wrong_usage_is_2() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--skip", "x"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == "check_docker.py: error: unrecognized arguments: --skip x"


def test_where_docker_is_not_it_ends_with_3_and_no_traceback(tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path), "DOCKER_HOST": f"unix://{tmp_path}/docker.sock"}
    command = [sys.executable, str(SCRIPT), "--json"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (3, False), done.stderr
    by_id = {row["id"]: row for row in json.loads(done.stdout)["checks"]}
    assert by_id["docker.engine"]["detail"] == "Docker is not installed"
    assert by_id["docker.compose"]["detail"] == "docker compose does not answer"
