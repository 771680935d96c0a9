"""The base's weights without loading them: files that are not whole, the Hub's cache, and what the Hub answers."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from finetune.config.base_model import MISTRAL
from finetune.errors import CheckFailed, ConfigError
from finetune.model import hub
from support.web import served

REVISION = "0123456789abcdef0123456789abcdef01234567"


# Weights in a folder --------------------------------------------------------------------------------------------------


def shard(path: Path) -> bytes:
    """A real safetensors file with metadata and two tensors."""
    save_file({"a": torch.zeros(3), "b": torch.zeros(2, 2)}, path, metadata={"format": "pt"})
    return path.read_bytes()


def test_each_shard_in_the_index_is_checked_once(tmp_path: Path) -> None:
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    weight_map = {f"layer.{number}": names[number % 3] for number in range(9)}
    (tmp_path / hub.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert hub.missing_weights(tmp_path) == [f"{name} is missing" for name in names]
    for name in names:
        shard(tmp_path / name)
    assert hub.missing_weights(tmp_path) == []


@pytest.mark.parametrize("change", [-1, -28, 1])
def test_a_file_whose_size_differs_from_its_header_reports_both(change: int, tmp_path: Path) -> None:
    path = tmp_path / hub.SINGLE
    content = shard(path)
    path.write_bytes(content[:change] if change < 0 else content + b"x")
    sizes = f"has {len(content) + change:,} bytes, its header says {len(content):,}"
    assert hub.missing_weights(tmp_path) == [f"{hub.SINGLE} {sizes}"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        b"\0" * 8,
        b"\xff" * 64,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4f",
        b"<!DOCTYPE html>",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{}",
        (8).to_bytes(8, "little") + b'{"a": 1}',
        (9).to_bytes(8, "little") + b'{"a": {}}',
        (26).to_bytes(8, "little") + b'{"a":{"data_offsets":[0]}}',
    ],
)
def test_a_file_that_is_not_safetensors_is_reported(content: bytes, tmp_path: Path) -> None:
    (tmp_path / hub.SINGLE).write_bytes(content)
    assert hub.missing_weights(tmp_path) == [f"{hub.SINGLE} is not a safetensors file"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 1}', '{"weight_map": ["a"]}', "\xff"])
def test_an_unreadable_index_is_reported(text: str, tmp_path: Path) -> None:
    (tmp_path / hub.INDEX).write_bytes(text.encode("latin-1"))
    assert hub.missing_weights(tmp_path) == [f"{hub.INDEX} cannot be read"]


# The Hub's cache ------------------------------------------------------------------------------------------------------


def test_the_digest_depends_on_the_weights_and_not_on_their_folder(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    values = torch.arange(6_000_000, dtype=torch.float32)  # 24 MB, of which 4 are read
    save_file({"first": values[:100].clone(), "second": values}, here / "model.safetensors")
    shutil.copytree(here, there)
    (there / "config.json").write_text("{}")
    assert hub.weights_digest(there) == hub.weights_digest(here)
    save_file({"first": values[:100].clone(), "second": values * 1.01}, there / "model.safetensors")
    assert hub.weights_digest(there) != hub.weights_digest(here)
    save_file({"first": values[:100].clone() + 1, "second": values}, there / "model.safetensors")
    assert hub.weights_digest(there) != hub.weights_digest(here)
    (there / "model.safetensors").rename(there / "other.safetensors")
    shutil.copy(here / "model.safetensors", there)
    assert hub.weights_digest(there) != hub.weights_digest(here)


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache would hold REVISION of Mistral; the cache is empty."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path / f"models--{MISTRAL.replace('/', '--')}" / "snapshots" / REVISION


def test_a_revision_is_cached_if_its_config_and_all_weights_are(snapshot: Path) -> None:
    assert (hub.cached_folder(MISTRAL, REVISION), hub.is_cached(MISTRAL, REVISION)) == (None, False)
    snapshot.mkdir(parents=True)
    assert hub.cached_folder(MISTRAL, REVISION) is None
    (snapshot / "config.json").touch()
    assert (hub.cached_folder(MISTRAL, REVISION), hub.is_cached(MISTRAL, REVISION)) == (snapshot, False)
    shard(snapshot / hub.SINGLE)
    assert hub.is_cached(MISTRAL, REVISION)
    assert not hub.is_cached(MISTRAL, REVISION[::-1])


def test_a_revision_whose_config_the_hub_did_not_have_is_not_cached(snapshot: Path) -> None:
    missing = snapshot.parents[1] / ".no_exist" / REVISION
    missing.mkdir(parents=True)
    (missing / "config.json").touch()
    assert hub.cached_folder(MISTRAL, REVISION) is None


# What the Hub answers -------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """Answers as the first part of the path says, and notes who asked for what."""

    asked: list[tuple[str, str, str | None]]

    def do_HEAD(self) -> None:
        type(self).asked.append((self.command, self.path, self.headers["Authorization"]))
        kind = self.path.split("/")[1]
        if kind in ("moved", "elsewhere"):
            self.send_response(307)
            host = "" if kind == "moved" else f"http://localhost:{self.server.server_address[1]}"
            self.send_header("Location", host + self.path.replace(f"/{kind}/", "/200/"))
        else:
            self.send_response(int(kind))
        if kind == "403":
            self.send_header("X-Error-Code", "GatedRepo")
        self.end_headers()

    do_GET = do_HEAD


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    Hub.asked = []
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    with served(Hub) as server:
        yield server


@pytest.mark.parametrize(
    ("kind", "status", "text"),
    [
        ("200", 200, "ok"),
        ("moved", 200, "ok"),
        ("403", 403, "GatedRepo"),
        ("429", 429, "Too Many Requests"),
    ],
)
def test_the_hubs_answer_is_its_status_and_reason(
    kind: str, status: int, text: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{address}/{kind}/")
    assert hub.why_not_reachable(MISTRAL, REVISION) == (status, text)


@pytest.mark.parametrize(
    ("revision", "asked_for"),
    [(REVISION, REVISION), (None, "main"), ("refs/pr/1", "refs%2Fpr%2F1")],
)
def test_without_a_token_one_small_file_of_the_revision_is_requested(
    revision: str | None, asked_for: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{address}/200")
    hub.why_not_reachable(MISTRAL, revision)
    assert Hub.asked == [("HEAD", f"/200/{MISTRAL}/resolve/{asked_for}/config.json", None)]


def test_the_token_goes_to_the_hub_and_not_to_another_host(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{address}/elsewhere")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert hub.why_not_reachable(MISTRAL, REVISION) == (200, "ok")
    assert [authorization for _, _, authorization in Hub.asked] == ["Bearer hf_secret"]


def test_a_silent_hub_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.2)
    started = time.perf_counter()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert hub.why_not_reachable(MISTRAL, REVISION) == (None, "timed out")
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [
        ("http://127.0.0.1:1", "refused"),
        ("no-scheme", "missing an 'http://' or 'https://' protocol"),
        ("http://[::1", "Invalid port"),
    ],
)
def test_an_unreachable_address_is_reported_with_its_reason(
    endpoint: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    status, text = hub.why_not_reachable(MISTRAL, REVISION)
    assert status is None
    assert reason in text


def test_without_a_mirror_it_is_the_hub_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, ""):
        monkeypatch.delenv("HF_ENDPOINT", raising=False)
        if value is not None:
            monkeypatch.setenv("HF_ENDPOINT", value)
        assert hub.endpoint() == "https://huggingface.co"


def test_an_unreadable_token_is_not_reported_as_a_network_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: (tmp_path / "absent").read_text(encoding="utf-8"))
    with pytest.raises(ConfigError) as caught:
        hub.why_not_reachable("mistralai/Mistral-7B-Instruct-v0.2", None)
    assert caught.value.problems == (
        f"the Hub's token cannot be read: {tmp_path}/absent: No such file or directory; export HF_TOKEN=hf_...",
    )


# A repository for copies ----------------------------------------------------------------------------------------------

COPIES = "me/copies"


class Repositories(BaseHTTPRequestHandler):
    """A Hub with me/copies, private or not, which the token may write or not; with no other repository.

    It has one file: run/manifest.json.
    """

    private, writable, breaks = True, True, False  # `breaks`: the connection ends when a file is requested

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        asked = self.path.split("?")[0]
        if asked.startswith(f"/{COPIES}/resolve/main/"):
            if self.breaks:
                self.close_connection = True
                return
            there = asked.endswith("/main/run/manifest.json")
            self._answer(200, {"status": "complete"}) if there else self._answer(404, {}, "EntryNotFound")
        elif not asked.startswith(f"/api/models/{COPIES}"):
            self._answer(404, {"error": "Repository not found"}, "RepoNotFound")
        elif "auth-check" in asked:
            self._answer(200, {}) if self.writable else self._answer(403, {"error": "Forbidden: this token only reads"})
        else:
            self._answer(200, {"id": COPIES, "private": self.private})

    def _answer(self, status: int, content: dict[str, object], code: str = "") -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", "c0ffee")
        self.send_header("ETag", '"e7a9"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def repositories(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with served(Repositories) as server:
        monkeypatch.setenv("HF_ENDPOINT", server)
        yield


ABSENT = (
    "me/absent does not exist on the Hub, or this token cannot see it",
    f"hf repos create me/absent --private, or {hub.GIVE_TOKEN}",
)
PUBLIC = (
    "me/copies is public, and a run contains paths, sample answers and hashes of your data",
    "hf repos settings me/copies --private",
)
UNWRITABLE = "me/copies cannot be written: ", f"{hub.GIVE_TOKEN}, of a token that may write"


@pytest.mark.parametrize(
    ("name", "settings", "found", "fix"),
    [
        (COPIES, {"private": False}, *PUBLIC),
        (COPIES, {"writable": False}, *UNWRITABLE),
        (COPIES, {"breaks": True}, *UNWRITABLE),
        ("me/absent", {}, *ABSENT),
    ],
)
@pytest.mark.usefixtures("repositories")
def test_a_repository_for_copies_is_private_and_this_token_may_write_it(
    name: str, settings: dict[str, bool], found: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for setting, value in settings.items():
        monkeypatch.setattr(Repositories, setting, value)
    with pytest.raises(CheckFailed) as caught:
        hub.read_for_copies(name, "run/manifest.json")
    assert caught.value.found.startswith(found)
    assert caught.value.fix == fix


@pytest.mark.usefixtures("repositories")
@pytest.mark.parametrize("read", [hub.read_file, hub.read_for_copies])
def test_a_file_of_a_repository_is_read_where_it_is_there(read: Callable[[str, str], bytes | None]) -> None:
    assert read(COPIES, "run/manifest.json") == b'{"status": "complete"}'
    assert read(COPIES, "run-2/manifest.json") is None


def test_a_hub_that_does_not_answer_is_no_place_for_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(CheckFailed, match=r"^me/copies cannot be written: .*refused"):
        hub.read_for_copies(COPIES, "run/manifest.json")
