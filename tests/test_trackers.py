"""TensorBoard and wandb: what the trainer is told, nobody is asked anything, and nothing in them ends a training."""

from __future__ import annotations

import builtins
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
import pytest

from finetune.config import ROOT, Config, load
from finetune.report import Terminal
from finetune.runs import Run
from finetune.trackers import TensorBoard, Wandb, make_trackers

KEYS = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_DIR", "WANDB_SILENT", "TENSORBOARD_LOGGING_DIR")


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
    return load("h100", [f"tracking.report_to={name}", "tracking.project=my-project"])[0]


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
    return f"tracking: wandb is offline ({reason}); later: wandb sync {run.folder}/wandb/offline-run-*\n"


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


def test_wandb_with_a_key_but_no_network_is_offline(nobody: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert made(nobody).text == offline(nobody, "api.wandb.ai does not answer: Network is unreachable")
    assert wandb_environment() == wandb_variables(nobody, "offline")


def test_wandb_that_was_set_offline_stays_so_and_is_not_probed(nobody: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert made(nobody).text == offline(nobody, "WANDB_MODE=offline")


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
        "warning: wandb has failed and is left out from here ([Errno 32] Broken pipe); metrics.jsonl goes on"
    ]
    assert calls == ["log"]


# --- the whole program beside a wandb that fails


class Refusing(BaseHTTPRequestHandler):
    """A wandb server that lets nobody in."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(401)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_args: Any) -> None:
        pass


class Hanging(BaseHTTPRequestHandler):
    """A wandb server that takes every question and answers none."""

    def do_POST(self) -> None:
        time.sleep(60)

    def log_message(self, *_args: Any) -> None:
        pass


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def training(
    base: Path, train_file: Path, output: Path, steps: int, *more: str, **environment: str
) -> subprocess.Popen[str]:
    """A start of train.py that tells wandb; `more` are settings of its own."""
    settings = {
        "model.name": base,
        "dataset.train_file": train_file,
        "output.dir": output,
        "tracking.run_name": "run",
        "tracking.report_to": "wandb",
        "dataset.sample_prompts": "[]",
        "dataset.validation_split": 0.25,
        "model.max_seq_length": 64,
        "training.max_steps": steps,
        "training.eval_steps": steps,
        "training.save_steps": steps,
    }
    lines = [*(f"{key}={value}" for key, value in settings.items()), *more]
    sets = [word for line in lines for word in ("--set", line)]
    line = [sys.executable, str(ROOT / "src" / "train.py"), "--config", "cpu", *sets]
    line += ["--skip", "host,libraries,device,rehearsal"]
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "NETRC": "/nonexistent", **environment}
    return subprocess.Popen(line, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("handler", [Refusing, Hanging])
def test_a_server_that_refuses_or_hangs_is_left_alone_within_seconds(
    tiny_mistral: Path, conversations: Path, tmp_path: Path, handler: type[BaseHTTPRequestHandler]
) -> None:
    with serving(handler) as address:
        process = training(tiny_mistral, conversations, tmp_path, 3, WANDB_API_KEY="k" * 40, WANDB_BASE_URL=address)
        started = time.monotonic()
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    told = [line for line in output.splitlines() if "wandb is offline" in line]
    assert len(told) == 2 and told[0].removeprefix("tracking: ") == told[1].strip()  # when it is found, and at the end
    assert told[1].endswith(f"later: wandb sync {tmp_path}/run/wandb/offline-run-*")
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert list((tmp_path / "run" / "tensorboard").rglob("events.*"))
    assert time.monotonic() - started < 60


@pytest.mark.slow
def test_a_training_outlives_the_death_of_wandbs_own_process(
    tiny_mistral: Path, conversations: Path, tmp_path: Path
) -> None:
    process = training(tiny_mistral, conversations, tmp_path, 60)
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
    assert sum("wandb has failed and is left out from here" in line for line in lines) == 1
    assert json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))["status"] == "complete"
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert sum("grad_norm" in json.loads(line) for line in metrics) == 60
