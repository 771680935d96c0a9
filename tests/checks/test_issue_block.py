"""The block that `validate_environment.py --deep` prints to be pasted: whole, and nobody's name or secret in it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from finetune.checks import issue_block
from finetune.checks.runner import Result
from finetune.files import ROOT
from support.bench import Bench

RESULTS = [
    Result("host.system", "pass", "macOS 15.1 on arm64", "", 0.0),
    Result("host.user", "pass", "mia, HOME /Users/mia", "", 0.0),
    Result("model.files", "fail", f"{ROOT}/models/base: one\n  /Volumes/mia/two is missing", "copy it", 0.0),
    Result("model.access", "pass", "https://mia:pass-of-mia@hub.example gives it", "", 0.0),
    Result("data.preview", "pass", "loss on the text in >><<: my secret diary", "", 0.0),
    Result("state.run", "warn", "pid 47 on mias-mac.local", "kill 47", 0.0),
    Result("receipt", "skip", "k-of-wandb \033[31m", "", 0.0),
    Result("rehearsal", "pass", "peak 17.1 of 20.5 GiB, 910.2 s a step, 7.6 h for 30 steps", "", 0.0),
]


@pytest.fixture
def mac(bench: Callable[[str], Bench], monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A Mac of somebody called mia."""
    there = bench("m4")
    there.installed |= {"torch": "2.14.1", "transformers": "5.23.0", "peft": "0.19.0", "trl": "1.16.0"}
    del there.installed["bitsandbytes"]
    monkeypatch.setattr("getpass.getuser", lambda: "mia")
    monkeypatch.setattr("platform.node", lambda: "mias-mac.local")
    monkeypatch.setenv("HOME", "/Users/mia")
    monkeypatch.setenv("WANDB_API_KEY", "k-of-wandb")
    return there


def test_the_block_has_machine_versions_config_and_every_finding_and_no_name_or_secret(mac: Bench) -> None:
    source = "../../Users/mia/qlora/configs/training_config_m4.yaml (--config m4)"
    assert issue_block.block(RESULTS, mac.preflight(), source) == [
        "----- paste from here -----",
        "machine  Darwin 15.1 on arm64; Apple M4; 32.0 GiB of memory, 20.5 free",
        "versions python 3.11.9, torch 2.14.1, transformers 5.23.0, peft 0.19.0, trl 1.16.0, "
        "bitsandbytes not installed",
        "config   ~/qlora/configs/training_config_m4.yaml (--config m4): platform m4, storage expanded, "
        "1 x 16 sequences of 2,048 tokens",
        "pass host.system: macOS 15.1 on arm64",
        "pass host.user: USER, HOME ~",
        "fail model.files: ./models/base: one",
        "  /Volumes/USER/two is missing",
        "pass model.access: https://hub.example gives it",
        "pass data.preview: not shown here",
        "warn state.run: pid 47 on HOST",
        r"skip receipt: *** \x1b[31m",
        "pass rehearsal: peak 17.1 of 20.5 GiB, 910.2 s a step, 7.6 h for 30 steps",
        "----- to here -----",
    ]


@pytest.mark.usefixtures("mac")
def test_what_only_looks_like_a_name_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert issue_block.nameless("/Users/mia2/mia2.txt amiable") == "~/mia2.txt amiable"
    assert issue_block.nameless(f"../..{ROOT}/configs") == "./configs"
    monkeypatch.setenv("HOME", "/home2/mi")
    assert issue_block.nameless("/home2/mi/a /home2/mint/b") == "~/a /home2/mint/b"
    monkeypatch.setenv("HOME", "/")
    assert issue_block.nameless("a / b /c") == "a / b /c"


@pytest.mark.usefixtures("mac")
def test_a_user_without_a_name_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> str:
        raise OSError("no name")

    monkeypatch.setattr("getpass.getuser", nameless)
    assert issue_block.nameless("/Users/mia on mias-mac") == "~ on HOST"
