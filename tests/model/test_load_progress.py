"""Bytes of a download and layers of a load, as transformers' and huggingface_hub's own code reports them."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from finetune.config.schema import Config
from finetune.model import load_progress
from finetune.model.load import load_base
from finetune.model.load_progress import download_bar, layers_reported
from finetune.wording import Report
from support.web import served

SIZE = 3_000_000


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is reported, the time always 3 s."""
    monkeypatch.setattr(load_progress, "duration", lambda _: "3 s")
    return []


def test_a_base_reports_each_layer_as_it_is_loaded_and_as_it_is_expanded(config: Config, lines: list[str]) -> None:
    expanded = config.changed("quantization", storage="expanded").quantization
    load_base(config.model, expanded, "cpu", Report(progress=lines.append))
    assert lines == [
        f"loading {config.model.name}: layer 1 of 2, 3 s",
        f"loading {config.model.name}: layer 2 of 2, 3 s",
        "expanding NF4: layer 1 of 2, 3 s",
        "expanding NF4: layer 2 of 2, 3 s",
    ]


def test_transformers_bars_are_its_own_again_after_a_load(tiny_mistral: Path, lines: list[str]) -> None:
    with layers_reported("the base", Report(progress=lines.append)):
        AutoModelForCausalLM.from_pretrained(tiny_mistral)
    assert len(lines) == 2
    AutoModelForCausalLM.from_pretrained(tiny_mistral)
    assert len(lines) == 2
    assert logging.set_tqdm_hook(None) is None


class Files(SimpleHTTPRequestHandler):
    """Any path is a file of SIZE zeros, in five pieces."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(SIZE))
        self.end_headers()
        for _ in range(5):
            self.wfile.write(bytes(SIZE // 5))


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with served(Files) as server:
        yield f"{server}/model.safetensors"


def test_the_hubs_own_download_reports_bytes_of_all_and_draws_nothing(
    address: str, tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub.file_download import http_get

    monkeypatch.setattr(load_progress, "GB", 1e6)
    logging.disable_progress_bar()  # the Hub's bars too
    with (tmp_path / "file").open("wb") as stream:
        bar = download_bar("the base", Report(progress=lines.append))
        http_get(address, stream, expected_size=SIZE, displayed_filename="model.safetensors", tqdm_class=bar)
    assert (tmp_path / "file").stat().st_size == SIZE
    assert lines[0] == "fetching the base: 0.0 of 3.0 GB"
    assert lines[-1] == "fetching the base: 3.0 of 3.0 GB"
    assert capfd.readouterr() == ("", "")


def test_bars_that_count_no_bytes_on_disk_are_left_out(lines: list[str]) -> None:
    """As huggingface_hub's snapshot_download 2.4 makes them: files, what the network carried, and what was written."""
    bar = download_bar("the base", Report(progress=lines.append))
    list(bar([1, 2, 3], desc="Fetching 3 files", total=3))
    with bar(desc="Downloading bytes", total=9, unit="B") as carried:
        carried.update(9)
    with bar(desc="Reconstructing (incomplete total...)", total=0, unit="B") as written:
        written.total += 14_500_000_000
        written.refresh()
    assert set(lines) == {"fetching the base: 0.0 of 14.5 GB"}
