"""A recorded machine with a config and data on which every check passes or skips, until a test plants a fault."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version

from finetune import checks
from finetune.checks import gpu, host, libraries, preflight
from finetune.checks import paths as paths_module
from finetune.checks.preflight import Preflight
from finetune.checks.runner import Result, exit_code
from finetune.checks.runner import run as run_checks
from finetune.config.load import ROOT, load_config
from finetune.files import GIB, seal
from finetune.machine.inspect import Machine
from finetune.machine.platforms import PLATFORMS
from finetune.plan.memory import peak_gib
from finetune.plan.model_shape import read_geometry
from support.recorded import H100, H100_TORCH, LINUX, LINUX_TORCH, M4, M4_TORCH
from support.stand_ins import by_document, install_flash_attn, install_varlen_attn, small

MACHINES = {"h100": (H100, H100_TORCH), "m4": (M4, M4_TORCH), "cpu": (LINUX, LINUX_TORCH)}
Usage = namedtuple("Usage", "total used free")


class Clock(datetime):
    """Says `time`, whatever the time is."""

    time = datetime(2027, 3, 1, 12, 30, tzinfo=UTC)

    @classmethod
    def now(cls, *_: object) -> datetime:  # type: ignore[override]
        return cls.time


class Bench:
    """Everything a check looks at, for one platform. A fault changes one thing of it before `results`."""

    def __init__(self, platform: str, folder: Path, base: Path, hub_url: str, patch: pytest.MonkeyPatch) -> None:
        self.platform, self.folder, self.base, self.hub_url, self.patch = platform, folder, base, hub_url, patch
        self.machine, self.torch = MACHINES[platform]
        self.receipt: Path | None = None
        self.free_gib = 500.0
        self.open = ExitStack()  # what must live as long as the bench
        self.train_file = folder / "train.jsonl"
        self.write_rows(*conversations())
        self.settings = [
            f"dataset.train_file={self.train_file}",
            "dataset.validation_file=null",
            "dataset.validation_split=0.25",
            f"output.dir={folder}/adapters",
            "training.eval_steps=1",
            "training.save_steps=1",
            *([f"model.name={base}", "training.max_steps=10"] if platform == "cpu" else []),
        ]
        self.places = {str(folder): "/bench", str(base): "/base", hub_url: "http://hub"}
        self._environment()
        self._system()
        self._libraries()
        self._device()

    def _environment(self) -> None:
        for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "XDG_CACHE_HOME", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
            self.patch.delenv(name, raising=False)
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", *watermarks(None, None)):
            self.patch.delenv(name, raising=False)
        for name, value in watermarks("1.0", "1.2").items():
            self.patch.setenv(name, str(value))
        folders = {"HOME": "home", "HF_HOME": "hf", "TRITON_CACHE_DIR": "triton", "PATH": "bin"}
        for name, folder in folders.items():
            (self.folder / folder).mkdir()
            self.patch.setenv(name, str(self.folder / folder))
        self.patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(self.folder / "hf" / "hub"))
        self.patch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(self.folder / "hf" / "token"))
        self.hub_answers(200)
        self.patch.setenv("WANDB_API_KEY", "k" * 40)
        self.patch.setenv("WANDB_BASE_URL", self.hub_url)

    def _system(self) -> None:
        self.patch.setattr(host, "datetime", Clock)
        self.patch.setattr(host.getpass, "getuser", lambda: "trainer")
        compiler = self.folder / "bin" / "gcc"
        compiler.write_text("#!/bin/sh\n")
        compiler.chmod(0o755)
        (self.folder / "Python.h").touch()
        paths = SimpleNamespace(get_path=lambda _: str(self.folder), get_python_version=lambda: "3.11")
        self.patch.setattr(gpu, "sysconfig", paths)
        disk = SimpleNamespace(disk_usage=lambda _: Usage(2**40, 0, self.free_gib * GIB))
        self.patch.setattr(paths_module, "shutil", disk)

    def _libraries(self) -> None:
        """The versions of the platform's lock, as if they were installed here."""
        lock = ROOT / "requirements" / f"{self.platform}.lock"
        self.installed = {name: str(version) for name, version in libraries.locked(lock).items()}
        self.broken: dict[str, str] = {}

        def installed(name: str) -> Version | None:
            return Version(self.installed[name]) if name in self.installed else None

        def import_module(name: str) -> ModuleType:
            if name in self.broken:
                raise ImportError(self.broken[name])
            return importlib.import_module(name)

        self.patch.setattr(libraries, "installed", installed)
        self.patch.setattr(libraries, "importlib", SimpleNamespace(import_module=import_module))

    def _device(self) -> None:
        """The trials run for real, on this machine's CPU; flash-attn and varlen_attn, CUDA's alone, have stand-ins."""
        self.patch.setitem(PLATFORMS, self.platform, replace(PLATFORMS[self.platform], device="cpu"))
        install_flash_attn(self.patch, by_document)
        install_varlen_attn(self.patch)
        for name, _ in PLATFORMS[self.platform].variables:
            self.patch.setenv(name, "")  # which a check sets: so that afterwards it is what it was
            self.patch.delenv(name)
        small(self.patch)

    # What a fault may change ------------------------------------------------------------------------------------------

    def has(self, machine: Machine | None = None, **facts: Any) -> None:
        """Another machine, or other facts of this one."""
        self.machine = replace(machine or self.machine, **facts)

    def torch_says(self, **facts: Any) -> None:
        self.torch = replace(self.torch, **facts)

    def set(self, *settings: str) -> None:
        self.settings += settings

    def write_validation(self, *rows: list[tuple[str, str]]) -> None:
        path = self.folder / "val.jsonl"
        path.write_text("\n".join(map(line_of, rows)), encoding="utf-8")
        self.set(f"dataset.validation_file={path}")

    def write_rows(self, *rows: list[tuple[str, str]], more: str = "") -> None:
        self.train_file.write_text("\n".join([*map(line_of, rows), more]), encoding="utf-8")

    def hub_answers(self, status: int) -> None:
        self.patch.setenv("HF_ENDPOINT", f"{self.hub_url}/{status}")

    def own_base(self) -> Path:
        """A copy of the base model that a fault may spoil."""
        folder = self.folder / "base"
        shutil.copytree(self.base, folder)
        self.set(f"model.name={folder}")
        return folder

    def cached_base(self) -> Path:
        """A snapshot in the Hub's cache, with a config.json and nothing else."""
        revision, name = load_config("h100")[0].model.revision, "models--mistralai--Mistral-7B-Instruct-v0.2"
        folder = self.folder / "hf" / "hub" / name / "snapshots" / str(revision)
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
        return folder

    def checkpoint(self, step: int, optimizer: object = None) -> Path:
        """A whole checkpoint of this very training, the best so far, and the best adapter; `optimizer` is pickled."""
        from finetune.runs.manifest import fingerprint

        now = self.preflight()
        facts = {"fingerprint": fingerprint(now.config, now.prepared)}
        folder = now.config.run_folder / "checkpoints" / f"checkpoint-{step}"
        for place in (folder, folder.with_name("best")):
            place.mkdir(parents=True, exist_ok=True)
            (place / "adapter_model.safetensors").write_bytes(b"weights")
        losses = [{"step": done, "eval_loss": 10 - done} for done in (0, step)]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": losses}))
        torch.save(optimizer, folder / "optimizer.pt")
        seal(folder, facts)
        seal(folder.with_name("best"), facts)
        return folder

    def locked_run(self) -> None:
        """Another process that writes this run's folder; it ends when its stdin closes."""
        lock = self.preflight().config.run_folder / "lock"
        lock.parent.mkdir(parents=True)
        lock.write_text("pid 4711 on gpu-1, started 2027-03-01 10:00 CET\nkill 4711\n")
        held = f"f = open({str(lock)!r}); fcntl.flock(f, fcntl.LOCK_EX)"
        command = [sys.executable, "-S", "-c", f"import fcntl, sys; {held}; print(flush=True); sys.stdin.read()"]
        holder = self.open.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        assert holder.stdout is not None
        holder.stdout.readline()

    # What comes of it -------------------------------------------------------------------------------------------------

    def preflight(self) -> Preflight:
        """As the command makes it, with the recorded machine and torch."""
        self.patch.setattr(preflight, "read_torch", lambda: self.torch)
        config = load_config(self.platform, self.settings)[0]
        return Preflight(config, self.machine, self.receipt)

    def peak_gib(self) -> float:
        """What the run is expected to take of memory."""
        config = load_config(self.platform, self.settings)[0]
        return peak_gib(config, read_geometry(config))

    def results(self, skip: tuple[str, ...] = ()) -> list[Result]:
        """What the command finds, this bench's own folder and port taken out of the texts."""
        skip += () if self.receipt else ("receipt",)
        return [self._told(it) for it in run_checks(checks.select(self.platform, (), skip), self.preflight())]

    def _told(self, result: Result) -> Result:
        return replace(result, detail=self.told(result.detail), fix=self.told(result.fix))

    def told(self, text: str) -> str:
        for place, name in self.places.items():
            text = text.replace(place, name)
        return text


def found(results: list[Result]) -> tuple[list[tuple[str, str, str, str]], int]:
    """(warnings and failures as id, status, detail, fix; the exit code of the command)."""
    return [(it.id, it.status, it.detail, it.fix) for it in results if it.status in ("warn", "fail")], exit_code(
        results
    )


def line_of(row: list[tuple[str, str]]) -> str:
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in row]})


def conversations() -> list[list[tuple[str, str]]]:
    """40 rows, each different."""
    return [[("user", f"What is {n} plus one?"), ("assistant", f"It is {n + 1}. " * (n % 5 + 1))] for n in range(40)]


def watermarks(low: str | None, high: str | None) -> dict[str, str | None]:
    return {"PYTORCH_MPS_LOW_WATERMARK_RATIO": low, "PYTORCH_MPS_HIGH_WATERMARK_RATIO": high}
