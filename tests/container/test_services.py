"""The services: what is typed, in the image, to its end; signals; and what each thing that is missing is told as."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.error import URLError

import pytest

from finetune.files import share
from support.docker_project import COMMIT, KEY, ROOT, TOKEN, UID, Project
from support.taught import KEEPER, WHO, Taught

pytestmark = pytest.mark.slow
SETTINGS = (
    "model.name=models/tiny", "lora.lora_dropout=0.1", "training.num_train_epochs=3", "dataset.sample_prompts=[]",
)  # fmt: skip
TINY = ("--config", "cpu", "--skip", "device,rehearsal", *(word for text in SETTINGS for word in ("--set", text)))
SAMPLE = ("--set", "dataset.train_file=data/sample/train.jsonl", "--set", "dataset.validation_file=null")


def until(what: str, holds: object, seconds: float = 120) -> None:
    """Wait for `holds()`."""
    assert callable(holds)
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.2)


def steps(folder: Path) -> int:
    """The last step that a run has told of."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    return max((row["step"] for row in rows), default=0)


def adapter(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


# --- plan and validate


def test_plan_says_in_the_image_what_the_same_command_says_natively(project: Project) -> None:
    inside = project.run("plan", *SAMPLE, "--json", no_gpu=False)
    assert inside.returncode == 0, inside.stderr
    line = [sys.executable, str(ROOT / "src" / "train.py"), "--config", "h100", "--dry-run", *SAMPLE, "--json"]
    native = subprocess.run(line, capture_output=True, text=True, check=True)
    ours, theirs = json.loads(inside.stdout), json.loads(native.stdout)
    for plan in (ours, theirs):
        del plan["memory_available_gib"]  # of this moment
    assert ours == theirs
    assert ours["certificate"] == {"rows": 150, "of": 150, "mismatches": 0}


def test_exit_codes_pass_through(project: Project) -> None:
    bad = project.folder / "data" / "processed" / "bad.jsonl"
    bad.write_text('{"messages": []}\n', encoding="utf-8")
    assert project.run("plan", "--set", f"dataset.train_file=data/processed/{bad.name}").returncode == 4
    assert project.run("plan", "--no-such-flag").returncode == 2
    assert project.run("validate", "--only", "gpu.driver").returncode == 3
    assert project.run("validate", "--only", "host").returncode == 0


def test_data_that_is_not_there_is_told_with_how_to_try(project: Project) -> None:
    done = project.run("plan")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-2:] == [
        "config: 1 problem",
        "  data/processed/train.jsonl: No such file or directory; put your JSONL there, or try with "
        "--set dataset.train_file=data/sample/train.jsonl",
    ]


def test_without_a_gpu_runtime_docker_gives_the_message_that_its_page_explains(project: Project) -> None:
    if "nvidia" in subprocess.run(["docker", "info"], capture_output=True, text=True, check=True).stdout:
        pytest.skip("this engine has the NVIDIA runtime")
    done = project.run("validate", no_gpu=False)
    assert done.returncode not in (0, 3)
    message = 'could not select device driver "nvidia" with capabilities: [[gpu]]'
    assert message in done.stderr
    assert message in (ROOT / "docs" / "h100.md").read_text(encoding="utf-8")


def test_validate_without_a_gpu_finds_that_and_says_where_to_look(project: Project) -> None:
    done = project.run("validate", *SAMPLE, "--skip", "model.access", "--json")
    assert done.returncode == 3
    found = {check["id"]: check for check in json.loads(done.stdout)["checks"]}
    assert [name for name, check in found.items() if check["status"] == "fail"] == ["gpu.driver"]
    assert (found["gpu.driver"]["detail"], found["gpu.driver"]["fix"]) == (
        "nvidia-smi is missing or does not answer: no working NVIDIA driver",
        "on the host: ./scripts/check_docker.py",
    )
    passed = {
        "container.shm", "container.init", "libraries.versions", "libraries.imports", "paths.output", "paths.caches",
    }  # fmt: skip
    assert {name for name in passed | {"gpu.compiler"} if found[name]["status"] != "pass"} == set()
    assert found["libraries.versions"]["detail"].endswith("libraries as in requirements/cpu.lock")


# --- a training


def test_the_demo_trains_to_an_adapter_that_belongs_to_the_caller(project: Project) -> None:
    fast = ("--set", "training.max_steps=6", "--set", "dataset.sample_prompts=[]", "--skip", "rehearsal")
    done = project.run("demo", *fast, no_gpu=False, minutes=30)
    assert done.returncode == 0, done.stdout + done.stderr
    run = project.adapters / "demo-cpu"
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["status"], manifest["steps"], manifest["git_commit"]) == ("complete", 6, COMMIT)
    assert adapter(run)
    made = [*run.rglob("*"), *(project.folder / "models" / "demo-135m").iterdir()]
    assert {(path.stat().st_uid, path.stat().st_gid) for path in made} == {(UID, UID)}
    assert "next: docker compose run --rm train-h100 --config cpu" in done.stderr + done.stdout
    checked = project.run("validate", "--config", "cpu")
    assert checked.returncode == 0, checked.stderr


def test_docker_stop_saves_a_second_start_is_refused_and_the_same_command_ends_as_if_nothing_was(
    project: Project,
) -> None:
    whole = project.run("train-h100", *TINY, "--set", "tracking.run_name=whole")
    assert whole.returncode == 0, whole.stderr
    stopped = project.adapters / "stopped"
    command = ("train-h100", *TINY, "--set", "tracking.run_name=stopped")
    container = project.start(*command)
    until("step 3", lambda: steps(stopped) >= 3)

    second = project.run(*command)
    told = re.fullmatch(
        r"adapters/stopped is being written by pid \d+ on \w+, started [0-9-]+ [0-9:]+ \S+; "
        r"wait for it, or stop it with: (docker stop ([0-9a-f]{12}))",
        second.stderr.splitlines()[-1],
    )
    assert told, second.stderr
    assert second.returncode == 6
    assert container.startswith(told[2])
    assert told[2] in subprocess.run(["docker", "ps"], capture_output=True, text=True, check=True).stdout

    subprocess.run(told[1].split(), check=True, capture_output=True)
    ended = subprocess.run(["docker", "wait", container], capture_output=True, text=True, check=True).stdout
    subprocess.run(["docker", "rm", container], capture_output=True, check=True)
    assert ended == "143\n"
    assert not (stopped / "adapter_model.safetensors").exists()
    assert json.loads((stopped / "manifest.json").read_text(encoding="utf-8"))["status"] == "interrupted"
    saved = sorted(path.name for path in (stopped / "checkpoints").glob("checkpoint-*"))
    assert saved

    again = project.run(*command)
    assert again.returncode == 0, again.stderr
    assert saved[-1] in again.stdout
    assert adapter(stopped) == adapter(project.adapters / "whole")
    written = [path for path in project.adapters.rglob("*") if path.is_file()]
    assert not any(mark.encode() in path.read_bytes() for path in written for mark in (TOKEN, KEY))


# --- the chat


def test_the_chat_answers_in_the_image_with_an_adapter_that_was_trained_elsewhere(
    project: Project, taught: Taught
) -> None:
    run, base = project.adapters / "taught", project.folder / "models" / "taught"
    for folder, target in ((taught.run, run), (taught.base, base)):
        shutil.copytree(folder, target)
        share(target)
    asked = ("adapters/taught", "--set", "model.name=models/taught", "--ask", WHO)
    done = project.run("chat", *asked)
    assert (done.returncode, done.stdout) == (0, f"{KEEPER}\n"), done.stderr
    done = project.run("chat", *asked, "--json")
    assert json.loads(done.stdout)["answer"] == KEEPER


# --- what is missing


def test_an_output_folder_of_somebody_else_is_told_with_how_to_get_it(project: Project) -> None:
    project.adapters.chmod(0o555)
    done = project.run("train-h100", *TINY, "--set", "tracking.run_name=refused")
    project.adapters.chmod(0o755)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-2:] == [
        "config: 1 problem",
        "  output.dir: adapters/refused/checkpoints: Permission denied; make it yours (sudo chown -R $(id -u) FOLDER), "
        "or set it to a writable folder",
    ]


def test_another_user_id_is_told_the_same(project: Project) -> None:
    environment = {"UID": str(UID + 1), "GID": str(UID + 1)}
    done = project.compose("run", "--rm", "-T", "validate", "--only", "paths.output", **environment)
    assert done.returncode == 3
    assert "paths.output             adapters cannot be written: Permission denied" in done.stdout
    assert "-> sudo chown -R $(id -u) adapters, or --set output.dir=FOLDER" in done.stdout


def test_a_folder_that_is_not_there_is_not_made_by_docker(project: Project) -> None:
    aside = project.folder / "models.aside"
    (project.folder / "models").rename(aside)
    done = project.run("plan")
    made = (project.folder / "models").exists()
    if not made:
        aside.rename(project.folder / "models")
    assert not made
    assert done.returncode not in (0, 2, 3, 4)
    assert f"bind source path does not exist: {project.folder}/models" in done.stderr


def test_weights_that_belong_to_somebody_else_are_told_with_how_to_share_them(project: Project) -> None:
    weights = project.folder / "models" / "tiny" / "model.safetensors"
    weights.chmod(0o600)
    done = project.run("validate", *TINY[:2], "--set", "model.name=models/tiny", "--only", "model.files", "--json")
    weights.chmod(0o644)
    assert done.returncode == 3
    [found] = json.loads(done.stdout)["checks"]
    assert (found["detail"], found["fix"]) == (
        "models/tiny: model.safetensors cannot be read by this user",
        "sudo chmod -R a+rX models/tiny",
    )


# --- TensorBoard


def test_tensorboard_shows_the_runs_to_this_machine_only(project: Project) -> None:
    short = ("--set", "training.max_steps=2", "--set", "tracking.report_to=tensorboard")
    done = project.run("train-h100", *TINY, "--set", "tracking.run_name=shown", *short)
    assert done.returncode == 0, done.stderr
    done = project.compose("up", "--detach", "tensorboard", no_gpu=False)
    assert done.returncode == 0, done.stderr
    shown = project.compose("port", "tensorboard", "6006").stdout.strip()

    def runs() -> list[str]:
        try:
            with urllib.request.urlopen(f"http://{shown}/data/runs", timeout=5) as answer:
                return list(json.load(answer))
        except (URLError, OSError):
            return []

    try:
        until("TensorBoard's runs", lambda: "shown/tensorboard" in runs())
    finally:
        project.compose("rm", "--stop", "--force", "tensorboard")
    assert shown == "127.0.0.1:6006"
