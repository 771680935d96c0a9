"""TensorBoard and wandb: what the trainer is told, nobody is asked anything, and nothing in them ends a training."""

from __future__ import annotations

import builtins
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
import pytest

from finetune.cli import PYTHON
from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.errors import Stopped
from finetune.files import ROOT
from finetune.runs.folder import Run
from finetune.terminal import Terminal
from finetune.training.trackers import TensorBoard, Wandb, make_trackers
from support.tracked import training
from support.web import served

WANDB = Path(PYTHON).with_name("wandb")
KEYS = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_DIR", "WANDB_SILENT", "TENSORBOARD_LOGGING_DIR")
KNOWN = {"WANDB_API_KEY": "k" * 40, "NETRC": "/nonexistent", "no_proxy": "127.0.0.1"}  # somebody with an account


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """A run of somebody without an account, a network or a keyboard; the environment is put back afterwards."""
    for key in (*KEYS, "WANDB_ERROR_REPORTING", "WANDB_BASE_URL"):
        monkeypatch.setenv(key, "")  # remembered even where it is not set
        monkeypatch.delenv(key)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))

    def asked(*_args: object) -> None:
        raise AssertionError("a prompt")

    def no_network(*_args: object, **_kwargs: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(builtins, "input", asked)
    monkeypatch.setattr("getpass.getpass", asked)
    monkeypatch.setattr(socket, "create_connection", no_network)
    return Run(tmp_path / "run", False, None)


@dataclass
class Said:
    """What `make_trackers` gave, and what it said."""

    trackers: list[type]
    wandb: Wandb | None
    text: str


def tracked_by(name: str) -> Config:
    return load_config("h100", [f"tracking.report_to={name}", "tracking.project=my-project"])[0]


def made(run: Run, name: str = "wandb") -> Said:
    stream = StringIO()
    trackers = make_trackers(tracked_by(name), run, Terminal(stream=stream))
    return Said([type(tracker) for tracker in trackers.all()], trackers.wandb, stream.getvalue())


def wandb_environment() -> dict[str, str | None]:
    return {key: os.environ.get(key) for key in KEYS[1:5]}


def wandb_variables(run: Run, mode: str | None) -> dict[str, str | None]:
    directory = str(run.folder)
    return {"WANDB_MODE": mode, "WANDB_PROJECT": "my-project", "WANDB_DIR": directory, "WANDB_SILENT": "true"}


def offline(run: Run, reason: str) -> str:
    return f"tracking: wandb is offline ({reason}); to upload later: {WANDB} sync {run.folder}/wandb/offline-run-*\n"


def test_no_tracker_sets_nothing_of_wandb(nobody: Run) -> None:
    assert made(nobody, "none") == Said([], None, "")
    assert set(wandb_environment().values()) == {None}


def test_tensorboard_writes_into_the_run(nobody: Run) -> None:
    assert made(nobody, "tensorboard") == Said([TensorBoard], None, "")
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(nobody.folder / "tensorboard")
    assert set(wandb_environment().values()) == {None}


def test_wandb_without_a_key_is_offline_and_asks_nothing(nobody: Run) -> None:
    said = made(nobody)
    assert (said.trackers, said.text) == ([TensorBoard, Wandb], offline(nobody, "no WANDB_API_KEY"))
    assert wandb_environment() == wandb_variables(nobody, "offline")


def test_wandb_with_a_key_and_a_network_is_online(nobody: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    probed = []

    def answers(address: tuple[str, int], timeout: float) -> Any:
        probed.append((address, timeout))
        return StringIO()

    monkeypatch.setattr(socket, "create_connection", answers)
    said = made(nobody)
    assert (said.trackers, said.text) == ([TensorBoard, Wandb], "")
    assert said.wandb is not None and said.wandb.offline is None
    assert wandb_environment() == wandb_variables(nobody, None)
    assert probed == [(("api.wandb.ai", 443), 5)]


def test_what_breaks_in_wandb_is_told_once_and_then_left_out(nobody: Run) -> None:
    stream = StringIO()
    wandb = make_trackers(tracked_by("wandb"), nobody, Terminal(stream=stream)).wandb
    assert wandb is not None
    calls = []

    class Broken:
        run = None

        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            raise BrokenPipeError(32, "Broken pipe")

    wandb._wandb = Broken()
    wandb._initialized = True
    state = type("State", (), {"is_world_process_zero": True, "global_step": 1})()
    for _ in range(3):
        wandb.on_log(None, state, None, logs={"loss": 1.0})
    assert stream.getvalue().splitlines()[1:] == [
        "warning: wandb failed and is off from now on ([Errno 32] Broken pipe); metrics.jsonl is still written"
    ]
    assert calls == ["log"]


class Noted:
    """A wandb that notes how its run was ended; it may fail to."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure, self.exit_codes = failure, list[int]()

    def finish(self, exit_code: int) -> None:
        self.exit_codes.append(exit_code)
        if self.failure:
            raise self.failure


@pytest.mark.parametrize(
    ("error", "exit_codes"),
    [
        (None, [0]),
        (Stopped(143, "stopped"), [143]),
        (ValueError("a bug"), [1]),
        (KeyboardInterrupt(), []),  # the second Ctrl-C waits for nobody
    ],
)
def test_wandb_hears_how_the_start_ended(
    nobody: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException | None, exit_codes: list[int]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers, noted = make_trackers(tracked_by("wandb"), nobody, Terminal(stream=StringIO())), Noted()
    assert trackers.wandb is not None
    trackers.wandb._wandb = noted
    with pytest.raises(type(error)) if error else nullcontext(), trackers.closed():
        if error:
            raise error
    assert noted.exit_codes == exit_codes


def test_a_wandb_that_breaks_at_the_end_is_a_warning(nobody: Run) -> None:
    stream = StringIO()
    wandb = Wandb(nobody, Terminal(stream=stream), {}, None)
    wandb._wandb, wandb.online = Noted(ConnectionResetError("Connection lost")), "run-1"
    wandb.close(0)
    told = "warning: wandb failed and is off from now on (Connection lost); metrics.jsonl is still written\n"
    assert stream.getvalue() == told


# --- the whole program beside a wandb that fails


class Failing(BaseHTTPRequestHandler):
    """A wandb server that fails as `failing` says, and else lets a run begin. It notes the losses that it gets."""

    protocol_version = "HTTP/1.1"
    failing: str | None
    losses: list[float]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.failing == "hangs":
            time.sleep(120)
        elif self.failing == "dies":
            self.close_connection = True
        elif self.failing == "refuses":
            self.answer({}, 401)
        elif self.path == "/graphql":
            self.answer({"data": self.data(json.loads(body))})
        else:
            if self.path.endswith("/file_stream"):
                lines = json.loads(body).get("files", {}).get("wandb-history.jsonl", {"content": []})["content"]
                self.losses.extend(entry["train/loss"] for entry in map(json.loads, lines) if "train/loss" in entry)
            self.answer({})

    do_PUT = do_POST

    def data(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What wandb wants to know: which run has begun, and where its files go."""
        given = asked.get("variables", {})
        if asked["operationName"] == "UpsertBucket":
            project = {"name": "mine", "entity": {"name": "somebody"}}
            return {
                "upsertBucket": {"inserted": True, "bucket": {"id": "1", "name": given["name"], "project": project}}
            }
        if asked["operationName"] == "CreateRunFiles":
            address = f"http://{self.headers['Host']}/file"
            files = [{"name": name, "uploadUrl": address} for name in given["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        return {}

    def answer(self, content: dict[str, Any], status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@contextmanager
def serving(failing: str | None = None) -> Iterator[str]:
    """The address of a Failing server; after the block nobody listens there."""
    Failing.failing, Failing.losses = failing, []
    with served(Failing) as server:
        yield server


@pytest.mark.slow
@pytest.mark.parametrize("failing", ["refuses", "hangs"])
def test_a_server_that_refuses_or_hangs_is_left_alone_within_seconds(
    tiny_mistral: Path, conversations: Path, tmp_path: Path, failing: str
) -> None:
    with serving(failing) as address:
        process = training(tiny_mistral, conversations, tmp_path, 3, WANDB_API_KEY="k" * 40, WANDB_BASE_URL=address)
        started = time.monotonic()
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    told = [line for line in output.splitlines() if "wandb is offline" in line]
    assert len(told) == 2 and told[0] == told[1]  # when it is found, and at the end
    assert told[1].endswith(f"to upload later: {WANDB} sync {tmp_path}/run/wandb/offline-run-*")
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert list((tmp_path / "run" / "tensorboard").rglob("events.*"))
    assert time.monotonic() - started < 60


def losses(run: Path) -> list[float]:
    """Those of metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def synced(line: str) -> list[float]:
    """The losses that a server gets when this is typed."""
    with serving() as address:
        surroundings = {**os.environ, **KNOWN, "WANDB_BASE_URL": address}
        subprocess.run(line.split(), cwd=ROOT, env=surroundings, check=True, timeout=60)
    return Failing.losses


@pytest.mark.slow
def test_a_training_outlives_the_death_of_wandbs_own_process(
    tiny_mistral: Path, conversations: Path, tmp_path: Path
) -> None:
    with serving() as address:
        process = training(tiny_mistral, conversations, tmp_path, 60, WANDB_BASE_URL=address, **KNOWN)
        assert process.stdout is not None
        lines, killed = [], []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("step 5/"):
                for child in psutil.Process(process.pid).children(recursive=True):
                    if "wandb" in " ".join(child.cmdline()):
                        child.kill()
                        killed.append(child.pid)
        assert process.wait(timeout=60) == 0, "".join(lines)
    assert killed
    told = [re.sub(r"\(.*\)", "(REASON)", line) for line in lines if "wandb" in line]
    assert told == ["warning: wandb failed and is off from now on (REASON); metrics.jsonl is still written\n"]
    assert json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))["status"] == "complete"
    assert len(losses(tmp_path / "run")) == 60


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failing", "exit_code", "reason"),
    [
        ("hangs", 143, "no answer for 15 s at the end"),
        ("dies", 0, "no answer for 15 s at the end"),
        ("refuses", 0, "it stopped uploading"),
    ],
)
def test_a_server_that_fails_after_the_start_can_be_sent_everything_later(
    tiny_mistral: Path, conversations: Path, tmp_path: Path, failing: str, exit_code: int, reason: str
) -> None:
    with ExitStack() as server:
        address = server.enter_context(serving())
        process = training(tiny_mistral, conversations, tmp_path, 60, WANDB_BASE_URL=address, **KNOWN)
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith("step 5/"))
        Failing.failing = failing
        if failing == "dies":
            server.close()
        if exit_code == 143:
            process.terminate()
        try:
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == exit_code, output
    sync = f"{WANDB} sync --include-online {next((tmp_path / 'run' / 'wandb').glob('run-*'))}"
    told = [line for line in output.splitlines() if "wandb" in line]
    assert told == [f"tracking: some wandb data was not uploaded ({reason}); to upload it: {sync}"]
    assert synced(sync) == losses(tmp_path / "run")


@pytest.mark.slow
def test_a_server_that_takes_everything_is_not_spoken_of(
    tiny_mistral: Path, conversations: Path, tmp_path: Path
) -> None:
    with serving() as address:
        process = training(tiny_mistral, conversations, tmp_path, 3, WANDB_BASE_URL=address, **KNOWN)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "wandb" not in output
    assert Failing.losses == losses(tmp_path / "run")
