"""No file that a run leaves, and nothing that it prints, holds a secret; and no checkpoint can run code."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from finetune.files import read_seal, seal
from support.harness import Command, Warm, Whole, differences

MARK = "c0ffee5ec2e7"
PASSWORD = f"{MARK}-password"


def planted(home: Path) -> dict[str, str]:
    """An environment with a secret in each place where the libraries look for one."""
    (home / ".netrc").write_text(f"machine api.wandb.ai login user password {MARK}{'0' * 28}\n")
    (home / "hf-token").write_text(f"hf_{MARK}file")
    proxy = f"http://user:{PASSWORD}@127.0.0.1:9"
    names = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY")
    return {
        "HOME": str(home), "HF_TOKEN": f"hf_{MARK}token", "HUGGING_FACE_HUB_TOKEN": f"hf_{MARK}old",
        "HF_TOKEN_PATH": str(home / "hf-token"), "WANDB_API_KEY": MARK + "1" * 28, "WANDB_MODE": "offline",
        "WANDB_ANONYMOUS": "allow", "NETRC": str(home / ".netrc"), "AWS_SECRET_ACCESS_KEY": f"{MARK}aws",
        **dict.fromkeys(names, proxy),
    }  # fmt: skip


def holds_the_mark(content: bytes) -> bool:
    return any(MARK.encode(encoding) in content for encoding in ("utf-8", "utf-16-le", "utf-16-be"))


def told_in(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*") if path.is_file() and holds_the_mark(path.read_bytes()))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def tracked(whole: Whole, home: Path) -> tuple[Command, subprocess.CompletedProcess[str]]:
    """A run with all trackers, in an environment full of secrets."""
    command = whole.command.at(home / "output", "tracking.report_to=wandb", "training.max_steps=2")
    done = command.really(**planted(home))
    assert done.returncode == 0, done.stderr
    return command, done


def test_a_run_with_wandb_and_tensorboard_writes_no_secret_into_any_byte_of_any_file(
    tracked: tuple[Command, subprocess.CompletedProcess[str]], home: Path
) -> None:
    command, _ = tracked
    assert len(list(command.folder.glob("wandb/offline-run-*/run-*.wandb"))) == 1
    assert len(list(command.folder.glob("tensorboard/events.out.tfevents.*"))) == 1
    assert told_in(home) == sorted(str(home / name) for name in (".netrc", "hf-token"))


def test_a_run_prints_no_secret(tracked: tuple[Command, subprocess.CompletedProcess[str]]) -> None:
    done = tracked[1]
    assert done.stdout
    assert not holds_the_mark((done.stdout + done.stderr).encode())


class RunsCode:
    """As a pickle, it makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", *(pytest.param(name, marks=pytest.mark.slow) for name in ("scheduler.pt", "rng_state.pth"))],
)
def test_a_pickle_that_would_run_code_runs_none_and_is_set_aside_even_if_sealed(
    warm: Warm, whole: Whole, stopped: Command, tmp_path: Path, name: str
) -> None:
    import torch

    command = stopped.elsewhere(tmp_path / "output")
    folder, ran = command.checkpoints / "checkpoint-4", tmp_path / "ran"
    facts = read_seal(folder)
    del facts["files"]
    torch.save(RunsCode(ran), folder / name)
    seal(folder, facts)
    ended = warm(command)
    assert ended.code == 0, ended.text
    reason = f"{name} holds more than tensors and plain values"
    said = f"warning: checkpoint-4 is damaged ({reason}); set aside as damaged-checkpoint-4.1"
    assert said in ended.text.splitlines()
    assert differences(command, whole.result) == []
    assert not ran.exists()
    torch.load(command.checkpoints / "damaged-checkpoint-4.1" / name, weights_only=False)  # it does what it is for
    assert ran.exists()
