"""compose.yaml, field by field, as Compose itself reads it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from support.docker_project import ROOT

TRAIN = ["as-owner", "python", "src/train.py", "--config", "h100"]
VALIDATE = ["as-owner", "python", "scripts/validate_environment.py", "--config", "h100"]
PROVE = ["as-owner", "python", "scripts/prove.py"]
CHAT = ["as-owner", "python", "scripts/chat.py"]
TENSORBOARD = ["as-owner", "tensorboard", "--logdir", "adapters", "--host", "0.0.0.0", "--port", "6006"]
GPU = {"resources": {"reservations": {"devices": [{"capabilities": ["gpu"], "driver": "nvidia", "device_ids": ["0"]}]}}}
NO_GPU = {"NVIDIA_VISIBLE_DEVICES": "void"}
LIMITS = {"memlock": -1, "stack": 67108864}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("compose") / "project"
    made.mkdir()
    shutil.copy(ROOT / "compose.yaml", made)
    (made / ".env").write_text("UID=4711\nGID=4712\nHF_TOKEN_FILE=/keys/hf\n", encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def read(folder: Path) -> dict[str, Any]:
    return read_by_compose(folder)


def read_by_compose(folder: Path) -> dict[str, Any]:
    """All of compose.yaml as Compose understands it; needs no engine."""
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
    ):
        pytest.skip("no Docker Compose here: docker compose version")
    line = ["docker", "compose", "--profile", "program", "config", "--format", "json"]
    return dict(json.loads(subprocess.run(line, cwd=folder, capture_output=True, text=True, check=True).stdout))


def bind(folder: Path, name: str, read_only: bool) -> dict[str, Any]:
    """A folder of the project; Compose does not print `create_host_path: false`, and prints true."""
    made = {"type": "bind", "source": f"{folder}/{name}", "target": f"/app/{name}", "bind": {}}
    return made | {"read_only": True} if read_only else made


def common(folder: Path) -> dict[str, Any]:
    """What every service has."""
    return {
        "build": {
            "context": str(folder),
            "dockerfile": "docker/Dockerfile",
            "args": {"CUDA": "", "BASE_DIGEST": "", "LOCK": "h100", "FLASH_ATTN": "build", "MAX_JOBS": ""},
        },
        "cap_add": ["SETUID", "SETGID", "KILL"],
        "cap_drop": ["ALL"],
        "command": None,
        "environment": {
            "HF_TOKEN_PATH": "/run/secrets/hf_token",
            "WANDB_API_KEY_FILE": "/run/secrets/wandb_api_key",
            "GIT_COMMIT": "",
        },
        "image": "mistral-7b-qlora:h100",
        "init": True,
        "networks": {"default": None},
        "profiles": ["program"],
        "pull_policy": "never",
        "read_only": True,
        "secrets": [{"source": name, "target": f"/run/secrets/{name}"} for name in ("hf_token", "wandb_api_key")],
        "security_opt": ["no-new-privileges:true"],
        "shm_size": "1073741824",
        "stop_grace_period": "5m0s",
        "tmpfs": ["/tmp"],
        "user": "4711:4712",
        "volumes": [
            bind(folder, "src", read_only=True),
            bind(folder, "scripts", read_only=True),
            bind(folder, "requirements", read_only=True),
            bind(folder, "configs", read_only=True),
            bind(folder, "data", read_only=True),
            bind(folder, "models", read_only=True),
            bind(folder, "adapters", read_only=False),
            {"type": "volume", "source": "cache", "target": "/cache"},
            {"type": "volume", "source": "huggingface", "target": "/cache/huggingface", "volume": {}},
        ],
    }


def test_there_are_seven_services_whose_volumes_are_named_alike_in_every_folder_and_keys_come_from_files(
    read: dict[str, Any],
) -> None:
    assert sorted(read["services"]) == ["chat", "demo", "plan", "prove", "tensorboard", "train-h100", "validate"]
    assert {name: volume["name"] for name, volume in read["volumes"].items()} == {
        "cache": "mistral-7b-qlora_cache",
        "huggingface": "mistral-7b-qlora_huggingface",
    }
    assert {name: secret["file"] for name, secret in read["secrets"].items()} == {
        "hf_token": "/keys/hf",
        "wandb_api_key": "/dev/null",
    }


@pytest.mark.parametrize(
    ("name", "line"), [("train-h100", TRAIN), ("validate", VALIDATE), ("prove", PROVE), ("chat", CHAT)]
)
def test_training_validation_proof_and_chat_have_the_gpu_and_are_else_what_all_are(
    name: str, line: list[str], read: dict[str, Any], folder: Path
) -> None:
    assert read["services"][name] == common(folder) | {
        "entrypoint": line,
        "deploy": {**GPU, "placement": {}},
        "ulimits": LIMITS,
    }


def test_the_plan_has_no_gpu_and_no_network(read: dict[str, Any], folder: Path) -> None:
    wanted = common(folder) | {"entrypoint": [*TRAIN, "--dry-run"], "network_mode": "none"}
    wanted["environment"] |= NO_GPU
    del wanted["networks"]
    assert read["services"]["plan"] == wanted


def test_the_demo_may_make_its_base_model_and_has_no_gpu(read: dict[str, Any], folder: Path) -> None:
    wanted = common(folder) | {"entrypoint": ["as-owner", "scripts/quickstart.sh"]}
    wanted["environment"] |= NO_GPU
    wanted["volumes"][5] = bind(folder, "models", read_only=False)
    assert read["services"]["demo"] == wanted


def test_tensorboard_reads_adapters_only_listens_on_this_machine_only_and_is_what_up_starts(
    read: dict[str, Any], folder: Path
) -> None:
    wanted = common(folder) | {
        "entrypoint": TENSORBOARD,
        "ports": [{"mode": "ingress", "host_ip": "127.0.0.1", "target": 6006, "published": "6006", "protocol": "tcp"}],
        "volumes": [bind(folder, "adapters", read_only=True)],
    }
    wanted["environment"] |= NO_GPU
    del wanted["profiles"], wanted["secrets"]
    assert read["services"]["tensorboard"] == wanted


def test_without_env_every_service_begins_as_root_and_asks_for_nothing(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "compose.yaml", tmp_path)
    services = read_by_compose(tmp_path)["services"]
    assert {service["user"] for service in services.values()} == {"0:0"}


def test_the_recipe_of_env_example_adds_to_env_and_changes_nothing_that_is_set(folder: Path, tmp_path: Path) -> None:
    for name in ("compose.yaml", ".env"):
        shutil.copy(folder / name, tmp_path)
    before = read_by_compose(tmp_path)
    recipe = "cat .env.example >> .env"
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in (".env.example", "docs/h100.md")]
    assert all(recipe in text for text in texts)
    shutil.copy(ROOT / ".env.example", tmp_path)
    subprocess.run(["bash", "-c", recipe], cwd=tmp_path, check=True)
    assert read_by_compose(tmp_path) == before


def test_every_variable_of_compose_is_in_env_example_and_works_when_the_number_sign_is_gone(tmp_path: Path) -> None:
    compose, example = ((ROOT / name).read_text(encoding="utf-8") for name in ("compose.yaml", ".env.example"))
    offered = dict(re.findall(r"^#([A-Z_]+)=(.+)$", example, re.MULTILINE))
    used = set(re.findall(r"\$\{([A-Z_]+)", compose))
    assert set(offered) == used - {"GIT_COMMIT"}  # of one run, not of a folder
    (tmp_path / "compose.yaml").write_text(compose, encoding="utf-8")
    lines = "".join(f"{name}={text}\n" for name, text in offered.items())
    (tmp_path / ".env").write_text(lines, encoding="utf-8")
    read = read_by_compose(tmp_path)
    train = read["services"]["train-h100"]
    args = train["build"]["args"]
    assert args == {name: offered[name] for name in ("CUDA", "BASE_DIGEST", "LOCK", "FLASH_ATTN", "MAX_JOBS")}
    assert train["user"] == f"{offered['UID']}:{offered['GID']}"
    assert train["image"] == offered["IMAGE"]
    assert train["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] == [offered["GPU"]]
    assert (train["volumes"][-1]["type"], train["volumes"][-1]["source"]) == ("bind", offered["HF_CACHE"])
    assert {f"{name.upper()}_FILE": secret["file"] for name, secret in read["secrets"].items()} == {
        name: text for name, text in offered.items() if name.endswith("_FILE")
    }
