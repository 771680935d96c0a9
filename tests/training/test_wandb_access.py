"""Why wandb could not log online: its mode, its key, its server; found without asking wandb itself."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from finetune.training.wandb_access import wandb_offline_reason

KEY = "k" * 40


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Somebody without an account, whose wandb server would be a port where nothing listens."""
    proxies = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_API_KEY_FILE", "NETRC", *proxies):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")


def netrc(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_a_mode_that_was_set_is_the_reason_and_nothing_is_probed(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("probed"))
    assert wandb_offline_reason() == f"WANDB_MODE={mode}"


def test_without_a_key_nothing_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("probed"))
    assert wandb_offline_reason() == "no WANDB_API_KEY"


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"])
def test_a_key_in_the_environment_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, KEY)
    assert str(wandb_offline_reason()).startswith("127.0.0.1 does not answer: ")


@pytest.mark.parametrize("named", [True, False])
def test_a_key_that_wandb_login_has_left_counts_for_its_own_server(
    named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ("my-netrc" if named else ".netrc")
    if named:
        monkeypatch.setenv("NETRC", str(path))
    for text in ("machine", f"machine api.wandb.ai login user password {KEY}\n"):  # cannot be read, or is of another
        netrc(path, text)
        assert wandb_offline_reason() == "no WANDB_API_KEY"
    netrc(path, f"machine 127.0.0.1 login user password {KEY}\n")
    assert str(wandb_offline_reason()).startswith("127.0.0.1 does not answer: ")


def test_a_server_that_answers_is_reason_enough_to_be_online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert wandb_offline_reason() is None


@pytest.mark.parametrize(
    ("address", "asked"),
    [
        ("", ("api.wandb.ai", 443)),
        ("https://wandb.example/team", ("wandb.example", 443)),
        ("http://wandb.example", ("wandb.example", 80)),
        ("https://wandb.example:8443", ("wandb.example", 8443)),
    ],
)
def test_the_server_is_probed_at_its_port_for_five_seconds(
    address: str, asked: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(server: tuple[str, int], timeout: float) -> None:
        probed.append((server, timeout))
        raise OSError("Network is unreachable")

    probed: list[tuple[tuple[str, int], float]] = []
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", address)
    monkeypatch.setattr(socket, "create_connection", unreachable)
    assert wandb_offline_reason() == f"{asked[0]} does not answer: Network is unreachable"
    assert probed == [(asked, 5)]


@pytest.mark.parametrize("address", ["https://wandb.example:port", "wandb.example"])
def test_an_address_that_is_none_is_a_reason_and_no_crash(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", address)
    assert "does not answer: " in str(wandb_offline_reason())


def test_where_a_proxy_leads_to_the_server_the_proxy_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    asked = []

    def answers(address: tuple[str, int], **_timeout: float) -> socket.socket:
        asked.append(address)
        return socket.socket()

    monkeypatch.setattr(socket, "create_connection", answers)
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    assert wandb_offline_reason() is None
    monkeypatch.setenv("no_proxy", "wandb.example")
    assert wandb_offline_reason() is None
    assert asked == [("proxy.example", 3128), ("wandb.example", 443)]


@pytest.mark.parametrize("already", ["", "another"])
def test_a_key_in_the_file_that_a_container_is_given_counts_where_none_is_set(
    already: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n", encoding="utf-8")
    monkeypatch.setenv("WANDB_API_KEY", already)
    monkeypatch.setenv("WANDB_API_KEY_FILE", str(tmp_path / "key"))
    assert str(wandb_offline_reason()).startswith("127.0.0.1 does not answer: ")
    assert os.environ["WANDB_API_KEY"] == (already or KEY)  # where wandb itself looks


def test_an_empty_key_file_is_no_key_and_one_that_is_not_there_is_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY_FILE", "/dev/null")  # what compose.yaml gives where .env names none
    assert wandb_offline_reason() == "no WANDB_API_KEY"
    monkeypatch.setenv("WANDB_API_KEY_FILE", str(tmp_path / "key"))
    assert wandb_offline_reason() == f"WANDB_API_KEY_FILE {tmp_path}/key: No such file or directory"
