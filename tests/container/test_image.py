"""The image: what is in it and what is not, that any user may run it, and that nothing of it can be written."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from uuid import uuid4

import pytest

from support.docker_project import IMAGE, KEY, PRIVATE, ROOT, TOKEN, UID, Project

pytestmark = pytest.mark.slow
LARGEST_GIB = 3.0  # of the CPU's; what is above torch, transformers and the system would be a mistake


def docker(*words: str) -> str:
    return subprocess.run(["docker", *words], capture_output=True, text=True, check=True).stdout


def build(folder: Path, stage: str, *words: str, **arguments: str) -> subprocess.CompletedProcess[str]:
    """One stage of the project's image; `arguments` are build arguments."""
    given = [word for name, text in arguments.items() for word in ("--build-arg", f"{name}={text}")]
    line = ["docker", "buildx", "build", "--target", stage, *given, *words, "--file", "docker/Dockerfile", "."]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)


def make_base(cuda: str, instruction: str = "") -> None:
    """What `CUDA=cuda` finds on this machine as its base image: the usual one, and after one more `instruction`."""
    text = f"FROM nvidia/cuda:12.1.1-base-ubuntu22.04\n{instruction}\n"
    line = ["docker", "build", "--quiet", "--tag", f"{cuda}-base-ubuntu22.04", "-"]
    subprocess.run(line, input=text, capture_output=True, text=True, check=True)


@pytest.fixture(scope="module")
def inspected(project: Project) -> dict[str, object]:
    assert project.folder.is_dir()  # whose image it is
    return dict(json.loads(docker("image", "inspect", IMAGE))[0])


def test_the_image_says_what_it_is_and_starts_the_training_as_nobody_special(inspected: dict[str, object]) -> None:
    config = inspected["Config"]
    assert isinstance(config, dict)
    assert (config["User"], config["WorkingDir"]) == ("1000:1000", "/app")
    assert (config["Entrypoint"], config["Cmd"]) == (["as-owner", "python", "src/train.py"], None)
    labels = {
        key: text for key, text in config["Labels"].items() if not key.startswith(("com.docker.compose.", "stand-in"))
    }
    assert labels == {
        "org.opencontainers.image.title": "mistral-7b-qlora",
        "org.opencontainers.image.description": "QLoRA fine-tuning of Mistral-7B-Instruct-v0.2",
        "org.opencontainers.image.version": "0.1.0",
        "org.opencontainers.image.revision": "",  # of a published image only
        "org.opencontainers.image.licenses": "Apache-2.0",
        "org.opencontainers.image.base.name": "nvidia/cuda:12.1.1-base-ubuntu22.04",
        "org.opencontainers.image.base.digest": "",  # only if BASE_DIGEST chose it
        "lock": "cpu",
        "flash-attn": "skip",
    }
    environment = dict(line.split("=", 1) for line in config["Env"])
    assert environment["PATH"].startswith("/opt/venv/bin:")
    assert {name: text for name, text in environment.items() if "/cache" in text or name in ("IMAGE_LOCK", "USER")} == {
        "IMAGE_LOCK": "cpu",
        "USER": "trainer",
        "HOME": "/cache/home",
        "XDG_CACHE_HOME": "/cache/home/.cache",
        "HF_HOME": "/cache/huggingface",
        "TRITON_CACHE_DIR": "/cache/triton",
        "TORCHINDUCTOR_CACHE_DIR": "/cache/inductor",
    }


def test_its_size_is_bounded(inspected: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    size = int(str(inspected["Size"])) / 2**30
    with capsys.disabled():
        print(f" {IMAGE}: {size:.2f} GiB ", end="")
    assert 1.0 < size < LARGEST_GIB


def test_it_holds_the_project_and_no_tool_of_the_build(project: Project) -> None:
    """Where the base image is a stand-in, CUDA's compiler is in no stage, so this says nothing of it."""
    done = project.compose(
        "run", "--rm", "-T", "--no-deps", "--entrypoint", "as-owner bash", "train-h100", "-c",
        "ls -A /app; echo; command -v nvcc pytest uv ruff; find /app /opt/venv /opt/python /cache /root -name '*.whl'",
    )  # fmt: skip
    project_files, _, found = done.stdout.partition("\n\n")
    assert project_files.split() == [
        *("LICENSE", "adapters", "configs", "data", "models", "requirements", "scripts", "src"),
    ]
    assert found == ""  # neither a tool that only the build needs, nor a wheel


def test_triton_and_extensions_find_a_compiler_and_pythons_headers(project: Project) -> None:
    code = (
        "import subprocess, sysconfig; include = sysconfig.get_path('include'); "
        "subprocess.run(['gcc', '-shared', '-fPIC', '-I', include, '-x', 'c', '-', '-o', '/tmp/extension.so'], "
        "input=b'#include <Python.h>', check=True); print('compiled')"
    )
    assert project.python(code).stdout == "compiled\n"


def test_any_user_id_has_a_name_and_a_home_and_is_not_process_1(project: Project) -> None:
    code = "import getpass, os; print(getpass.getuser(), os.getuid(), os.getpid() != 1, os.environ['HOME'])"
    assert project.python(code).stdout.split() == ["trainer", str(UID), "True", "/cache/home"]


def test_nothing_can_be_written_but_adapters_the_cache_and_tmp(project: Project) -> None:
    code = """
import os
for folder in ("/", "/app", "/app/src", "/app/configs", "/app/data", "/app/models", "/opt/venv", "/run/secrets",
               "/app/adapters", "/cache", "/cache/home", "/cache/huggingface", "/tmp"):
    try:
        open(f"{folder}/.written", "w").close()
        os.remove(f"{folder}/.written")
        print(folder)
    except OSError as error:
        assert error.errno in (13, 30), error
"""
    assert project.python(code).stdout.split() == [
        "/app/adapters", "/cache", "/cache/home", "/cache/huggingface", "/tmp",
    ]  # fmt: skip


def test_no_key_and_no_data_of_yours_stands_in_any_layer_or_word_of_the_image_or_of_a_container(
    project: Project,
) -> None:
    marks = (TOKEN.encode(), KEY.encode(), PRIVATE.encode())
    said = docker("image", "history", "--no-trunc", IMAGE) + docker("image", "inspect", IMAGE)
    said += project.compose("config").stdout
    saved = subprocess.Popen(["docker", "save", IMAGE], stdout=subprocess.PIPE)
    assert saved.stdout is not None
    rest = b""
    while chunk := saved.stdout.read(2**24):
        assert not any(mark in rest + chunk for mark in marks)
        rest = chunk[-64:]
    assert saved.wait() == 0
    name = f"{project.name}-asleep"
    project.compose("run", "--rm", "--detach", "--name", name, "--entrypoint", "sleep", "train-h100", "60")
    said += docker("container", "inspect", name)
    inside = docker("exec", name, "cat", "/run/secrets/hf_token", "/run/secrets/wandb_api_key")
    docker("kill", name)
    assert inside == TOKEN + KEY
    assert not any(mark.decode() in said for mark in marks)


def test_the_libraries_find_both_keys_in_their_files(project: Project) -> None:
    code = (
        "import sys; sys.path.insert(0, 'src'); import os; from huggingface_hub import get_token; "
        "from finetune.training.wandb_access import wandb_offline_reason; wandb_offline_reason(); "
        "print(get_token(), os.environ['WANDB_API_KEY'])"
    )
    assert project.python(code).stdout.split() == [TOKEN, KEY]


def test_a_kept_wheel_is_taken_without_a_compiler_or_torch_and_can_be_handed_on(
    project: Project, tmp_path: Path
) -> None:
    name = "flash_attn-2.8.3.post2-2.10.0torch.sm90-cp311-cp311-linux_x86_64.whl"
    wheel = project.folder / "docker" / "wheels" / name
    kept = f"kept {uuid4()}"  # else an engine that has run this test before takes its own layer instead
    wheel.write_text(kept, encoding="utf-8")
    page = (ROOT / "docs" / "h100.md").read_text(encoding="utf-8")
    line = "docker buildx build --target flash-attn-wheel --output docker/wheels --file docker/Dockerfile ."
    assert f"    {line}\n" in page
    words = line.replace("--output docker/wheels", f"--output {tmp_path}").split()
    done = subprocess.run(words, cwd=project.folder, capture_output=True, text=True, check=False)
    wheel.unlink()
    assert done.returncode == 0, done.stderr
    assert f"flash-attn: using docker/wheels/{name}" in done.stderr
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == {name: kept}


@pytest.mark.parametrize(
    ("lock", "flash_attn", "problem"),
    [
        ("h100", "build", "{cuda}-devel-ubuntu22.04"),
        ("h100", "skip", None),
        ("cpu", "skip", None),
        ("cpu", "build", "flash-attn cannot be built with LOCK=cpu, whose torch has no CUDA; set FLASH_ATTN=skip"),
    ],
)
def test_the_compilers_image_is_pulled_only_where_flash_attn_is_compiled(
    lock: str, flash_attn: str, problem: str | None, project: Project
) -> None:
    """Of the CUDA named here only the -base image is there."""
    cuda = f"{project.name}-cuda:1"
    make_base(cuda)
    done = build(project.folder, "flash-attn", CUDA=cuda, LOCK=lock, FLASH_ATTN=flash_attn)
    docker("rmi", f"{cuda}-base-ubuntu22.04")
    assert (done.returncode != 0) == bool(problem), done.stderr
    assert (problem or "").format(cuda=cuda) in done.stderr


def test_another_registry_is_one_variable_of_compose(project: Project) -> None:
    done = project.compose("build", "plan", CUDA="nowhere.invalid/cuda:1")
    assert done.returncode != 0
    assert re.search(r"nowhere\.invalid/(cuda:|v2/cuda/manifests/)1-base-ubuntu22\.04", done.stderr), done.stderr


def test_a_digest_chooses_the_base_image_and_no_other_is_taken(project: Project) -> None:
    digest = f"sha256:{'0' * 64}"
    done = build(project.folder, "system", BASE_DIGEST=digest)
    assert done.returncode != 0
    assert f"nvidia/cuda:12.1.1-base-ubuntu22.04@{digest}" in done.stderr


def test_nvidias_package_lists_are_not_asked(project: Project) -> None:
    cuda = f"{project.name}-lists:1"
    lists = "/etc/apt/sources.list.d"
    make_base(cuda, f"RUN for name in cuda-ubuntu2204-x86_64 nvidia-ml; do echo broken >{lists}/$name.list; done")
    done = build(project.folder, "system", CUDA=cuda)
    docker("rmi", f"{cuda}-base-ubuntu22.04")
    assert done.returncode == 0, done.stderr


def test_a_line_of_the_h100s_lock_without_its_hash_is_refused(project: Project) -> None:
    lock = project.folder / "requirements" / "h100.lock"
    whole = lock.read_bytes()
    lock.write_text("six==1.17.0\n", encoding="utf-8")
    done = build(project.folder, "dependencies")
    lock.write_bytes(whole)
    assert done.returncode != 0
    assert "In `--require-hashes` mode, all requirements must have a hash" in done.stderr


def test_the_tests_pass_in_the_image(project: Project) -> None:
    done = build(project.folder, "tested", "--progress", "plain", LOCK="cpu", FLASH_ATTN="skip")
    assert done.returncode == 0, done.stderr


def test_what_the_tests_in_the_image_need_is_what_the_dev_lock_has(project: Project) -> None:
    done = build(project.folder, "tests", "--tag", f"{project.name}-tests:1")
    assert done.returncode == 0, done.stderr
    listed = docker("run", "--rm", f"{project.name}-tests:1", "bash", "-c", "cd /opt/tests; echo *.dist-info").split()
    docker("rmi", f"{project.name}-tests:1")
    installed = {name.removesuffix(".dist-info").replace("_", "-").replace("-", "==", 1) for name in listed}
    lock = (ROOT / "requirements" / "dev.lock").read_text(encoding="utf-8")
    assert len(installed) > 3
    assert installed - set(lock.splitlines()) == set()


def test_what_the_dockerfile_pins_is_what_the_lock_pins() -> None:
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    lock = (ROOT / "requirements" / "dev.lock").read_text(encoding="utf-8")
    version = dockerfile.partition("ARG UV_VERSION=")[2].split()[0]
    assert f"\nuv=={version}\n" in lock
    assert "# syntax=" not in dockerfile
