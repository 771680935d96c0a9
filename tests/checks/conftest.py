"""A bench for each platform, and a Hub that answers with the status that its address begins with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from support.bench import Bench
from support.web import served

ERROR_CODES = {401: "GatedRepo", 403: "GatedRepo", 404: "RevisionNotFound"}


class Answers(BaseHTTPRequestHandler):
    """A HEAD to /403/... gets a 403, with the error code that the Hub sends along."""

    def do_HEAD(self) -> None:
        status = int(self.path.split("/")[1])
        self.send_response(status)
        if status in ERROR_CODES:
            self.send_header("X-Error-Code", ERROR_CODES[status])
        self.end_headers()


@pytest.fixture(scope="session")
def hub_url() -> Iterator[str]:
    with served(Answers) as server:
        yield server


@pytest.fixture
def bench(
    tmp_path: Path, tiny_mistral: Path, hub_url: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Bench]]:
    """Makes the bench of a platform."""
    with ExitStack() as made:

        def make(platform: str) -> Bench:
            new = Bench(platform, tmp_path, tiny_mistral, hub_url, monkeypatch)
            made.enter_context(new.open)
            return new

        yield make
