"""A clone without `.env`: what users type, word for word, as three users; whose the files are, and what root keeps."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from support.docker_project import IMAGE, UID, Project, copied

pytestmark = pytest.mark.slow
NO_DATA = (
    "  data/processed/train.jsonl: No such file or directory; put your JSONL there, or try with "
    "--set dataset.train_file=data/sample/train.jsonl"
)
SHORT = (
    "--config cpu --skip device,rehearsal --set model.name=models/tiny --set training.max_steps=2 "
    "--set dataset.sample_prompts=[] --set tracking.run_name=short"
)
PRIVILEGES = """
import os, re
status = open("/proc/self/status").read()
print(os.getuid(), os.getgid(), os.getgroups(), *re.findall(r"(?:Cap...|NoNewPrivs):\\s*(\\S+)", status))
"""
NONE = "0" * 16
REMOVE = "docker compose --profile program down --volumes"  # without the profile Compose leaves the volume


def given_to(clone: Project, user: int) -> None:
    """The clone as `user` has made it."""
    if os.getuid():
        pytest.skip("only root may become another user")
    subprocess.run(["chown", "-R", f"{user}:{user}", str(clone.folder)], check=True)


@pytest.mark.parametrize("user", [0, 1000, 12345])
def test_what_the_readme_says_works_as_it_is_typed(user: int, clone: Project) -> None:
    given_to(clone, user)
    for line in ("docker compose ps", "docker compose down"):
        done = clone.typed(line, user)
        assert (done.returncode, done.stdout.splitlines()[1:]) == (0, []), done.stderr
    for service in ("plan", "train-h100"):
        done = clone.typed(f"docker compose run {service}", user)
        assert (done.returncode, done.stderr.splitlines()[-1]) == (2, NO_DATA)
    done = clone.typed("docker compose run validate", user)
    assert done.returncode == 3, done.stderr
    assert "paths.output             adapters: written, synced, renamed" in done.stdout
    done = clone.typed(f"docker compose run --rm train-h100 {SHORT}", user)
    assert done.returncode == 0, done.stderr
    made = list((clone.adapters / "short").rglob("*"))
    assert len(made) > 5
    assert {(path.stat().st_uid, path.stat().st_gid) for path in made} == {(user, user)}
    left = clone.typed("docker compose ps --all --quiet", user).stdout.split()
    assert len(left) == 3  # those without --rm, which `down` leaves alone
    subprocess.run(["docker", "rm", *left], check=True, capture_output=True)
    done = clone.typed("docker compose run --rm --env HF_HOME=/app/nowhere validate --only paths.caches --json", user)
    assert json.loads(done.stdout)["checks"][0]["fix"] == (
        "correct HF_CACHE in .env if it is set; else make that user the owner of adapters again, "
        f"or {REMOVE}, which also removes the downloaded base model"
    )
    line = ["docker", "volume", "ls", "--quiet", "--filter", f"name={clone.name}_"]
    assert subprocess.run(line, check=True, capture_output=True).stdout
    assert clone.typed(REMOVE, user).returncode == 0
    assert not subprocess.run(line, check=True, capture_output=True).stdout


def test_an_edited_source_runs_without_a_new_build(clone: Project) -> None:
    for name in ("src/train.py", "scripts/validate_environment.py"):
        (clone.folder / name).write_text(f"print('{name}, edited')\n", encoding="utf-8")
    assert clone.typed("docker compose run --rm plan", 0).stdout == "src/train.py, edited\n"
    assert clone.typed("docker compose run --rm validate", 0).stdout == "scripts/validate_environment.py, edited\n"


def test_a_download_begun_by_another_user_is_found_before_the_run(clone: Project) -> None:
    given_to(clone, 1000)
    blobs = "/cache/huggingface/hub/models--mistralai--Mistral-7B-Instruct-v0.2/blobs"
    assert clone.typed(f"docker compose run --rm --user 1234 --entrypoint mkdir plan -p {blobs}", 1000).returncode == 0
    done = clone.typed("docker compose run --rm validate --only paths.caches --json", 1000)
    [check] = json.loads(done.stdout)["checks"]
    assert (done.returncode, check["detail"]) == (
        3, "/cache/huggingface/hub cannot be written: it belongs to uid 1234",
    )  # fmt: skip


def test_two_clones_on_a_host_share_the_cache_and_leave_each_others_runs_alone(clone: Project) -> None:
    with tempfile.TemporaryDirectory(prefix="clone-") as parent:
        Path(parent).chmod(0o755)
        other = Project(copied(Path(parent) / clone.folder.name), clone.name)
        shutil.copytree(clone.folder / "models" / "tiny", other.folder / "models" / "tiny")
        running = clone.typed("docker compose run --detach --entrypoint 'as-owner sleep' plan 300", 0).stdout.strip()
        touched = clone.typed("docker compose run --rm --entrypoint touch plan /cache/huggingface/shared", 0)
        assert touched.returncode == 0, touched.stderr
        assert other.typed("docker compose run --rm --entrypoint ls plan /cache/huggingface", 0).stdout == "shared\n"
        done = other.typed(f"docker compose run --rm train-h100 {SHORT}", 0)
        assert done.returncode == 0, done.stderr
        other.typed("docker compose down", 0)
        state = ["docker", "inspect", "--format", "{{.State.Running}}", running]
        assert subprocess.run(state, capture_output=True, text=True, check=True).stdout == "true\n"
        subprocess.run(["docker", "rm", "--force", running], capture_output=True, check=True)
        assert [path.name for path in clone.adapters.iterdir()] == [".gitkeep"]
        assert (other.adapters / "short" / "report.html").is_file()


@pytest.mark.parametrize("owner", [0, UID])
def test_the_program_has_no_capability_and_no_way_to_get_one(owner: int, project: Project) -> None:
    """Its bounding set, which only a gain of privileges could make use of, is what the container began with.

    Privileges are not gained although the second container lacks the engine's own no-new-privileges.
    """
    rights = ["--user", "0", "--cap-drop", "ALL", *("--cap-add=SETUID", "--cap-add=SETGID", "--cap-add=KILL")]
    bind = f"{project.adapters}:/app/adapters"
    line = ["docker", "run", "--rm", *rights, "--volume", bind, "--entrypoint", "as-owner", IMAGE]
    os.chown(project.adapters, owner, owner)
    found = project.python(PRIVILEGES).stdout
    other = subprocess.run([*line, "python", "-c", PRIVILEGES], capture_output=True, text=True, check=True).stdout
    os.chown(project.adapters, UID, UID)
    assert other == found
    groups = "[0]" if owner == 0 else "[]"
    inherited, permitted, effective, ambient = (NONE,) * 4
    beginning = f"{1 << 5 | 1 << 6 | 1 << 7:016x}"  # KILL, SETGID, SETUID
    assert found.strip() == f"{owner} {owner} {groups} {inherited} {permitted} {effective} {beginning} {ambient} 1"


def test_a_uid_that_is_given_is_the_containers_from_the_start(project: Project) -> None:
    code = "import os; print(os.getuid(), os.getgid(), os.stat('/proc/1').st_uid)"
    assert project.python(code).stdout == f"{UID} {UID} 0\n"
    assert project.python(code, UID="12345", GID="54321").stdout == "12345 54321 12345\n"
    assert project.python(code, UID="12345").stdout == "12345 12345 12345\n"


@pytest.mark.parametrize("owner", [0, 65534])
def test_adapters_that_root_may_not_write_are_refused_with_what_to_type(owner: int, project: Project) -> None:
    """As on a share with root_squash, where root has no more rights than its mode gives."""
    os.chown(project.adapters, owner, owner)
    project.adapters.chmod(0o555)
    done, shown = project.run("plan"), project.run("tensorboard", "--version")
    project.adapters.chmod(0o755)
    os.chown(project.adapters, UID, UID)
    assert done.returncode == 2
    assert done.stderr == (
        f"adapters belongs to user {owner} in this container, and root cannot write it (its mode, or a network share "
        "with root_squash)\n"
        '  to make it yours, type:         sudo chown -R "$(id -u):$(id -g)" adapters\n'
        "  or, if you can write it, type:  (echo; id -u | sed s/^/UID=/; id -g | sed s/^/GID=/) >> .env\n"
    )
    assert shown.returncode == 0  # it is given adapters to read
    assert re.fullmatch(r"[\d.]+\n", shown.stdout)
