"""The command that names the accelerator: on recorded machines, on this one, and with a torch that is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest

from finetune.cli import PYTHON
from finetune.config.load import ROOT
from finetune.errors import CheckFailed
from finetune.machine.device import Torch
from finetune.machine.inspect import Machine
from support.recorded import (
    EIGHT,
    GH200,
    H100,
    H100_TORCH,
    LINUX_TORCH,
    M2_32,
    M4_16,
    M4_TORCH,
    ROSETTA,
    T4,
)

SCRIPT = ROOT / "scripts" / "check_gpu.py"


@pytest.fixture
def shown(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    """(stdout, stderr) of the command on a recorded machine with this torch."""

    def running(machine: Machine, torch: Torch, *arguments: str) -> tuple[str, str]:
        monkeypatch.setattr(script, "read_machine", lambda: machine)
        monkeypatch.setattr(script, "read_torch", lambda: torch)
        monkeypatch.setattr(sys, "argv", ["check_gpu.py", *arguments])
        script.main()
        written = capsys.readouterr()
        return written.out, written.err

    return running


OTHER = ", an NVIDIA GPU but not an H100: hours and memory differ"


@pytest.mark.parametrize(
    ("machine", "torch", "wanted"),
    [
        (EIGHT, H100_TORCH, "accelerator: NVIDIA H100 80GB HBM3 (the first of 8)\n  79.6 GiB of GPU memory, 79.1 free\n"
            "config: configs/training_config_h100.yaml (found NVIDIA H100 80GB HBM3)\nPyTorch: 2.10.0+cu128 for CUDA "
            "12.8 sees the GPU\n"),
        (T4, LINUX_TORCH, f"accelerator: Tesla T4{OTHER}\n  15.0 GiB of GPU memory, 14.7 free\nconfig: "
            "configs/training_config_h100.yaml (found Tesla T4)\nPyTorch: 2.13.0+cpu without CUDA sees no GPU\n"),
        (GH200, Torch("2.10.0+cu128", built_for="12.8"), f"accelerator: NVIDIA GH200 480GB{OTHER}\n  573.0 GiB of "
            "memory, 500.0 free\nconfig: configs/training_config_h100.yaml (found NVIDIA GH200 480GB)\nPyTorch: "
            "2.10.0+cu128 for CUDA 12.8 sees no GPU\n"),
        (M4_16, Torch("2.14.1", mps_built=True), "accelerator: Apple M4\n  16.0 GiB of unified memory, 9.0 free\n"
            "config: configs/training_config_m4.yaml (found Apple silicon with 16 GiB of unified memory)\nPyTorch: "
            "2.14.1 is built with MPS but cannot use it\n"),
        (M2_32, M4_TORCH, "accelerator: Apple M2 Max, Apple silicon but not an M4: hours and memory differ\n"
            "  32.0 GiB of unified memory, 20.5 free\nconfig: configs/training_config_m4.yaml (found Apple silicon "
            "with 32 GiB of unified memory)\nPyTorch: 2.14.1 sees the Mac's GPU\n"),
        (ROSETTA, Torch("2.2.2"), "accelerator: none: CPU only\n  32.0 GiB of memory, 20.5 free\nconfig: "
            "configs/training_config_cpu.yaml (found Apple silicon, but this Python is an Intel build under "
            "Rosetta)\nPyTorch: 2.2.2 without CUDA sees no GPU\n"),
    ],
)  # fmt: skip
def test_it_names_the_accelerator_its_memory_its_config_and_what_torch_sees(
    machine: Machine, torch: Torch, wanted: str, shown: Callable[..., tuple[str, str]]
) -> None:
    assert shown(machine, torch) == (wanted, "")


def test_json_has_the_same_as_one_document_and_the_text_goes_to_stderr(shown: Callable[..., tuple[str, str]]) -> None:
    text, _ = shown(H100, H100_TORCH)
    out, err = shown(H100, H100_TORCH, "--json")
    assert err == text
    assert json.loads(out) == {
        "schema_version": 1,
        "accelerator": "NVIDIA H100 80GB HBM3",
        "config": "configs/training_config_h100.yaml",
        "machine": json.loads(json.dumps(asdict(H100))),
        "torch": json.loads(json.dumps(asdict(H100_TORCH))),
    }


# As a person runs it --------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path) -> dict[str, str]:
    """An environment whose PATH is one folder, and that looks for Python modules in another first."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "modules").mkdir()
    return {**os.environ, "PATH": str(tmp_path / "bin"), "PYTHONPATH": str(tmp_path / "modules")}


def run(environment: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, str(SCRIPT)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac has an accelerator")
def test_a_machine_without_an_accelerator_is_no_error(here: dict[str, str]) -> None:
    done = run(here)
    assert (done.returncode, done.stderr) == (0, "")
    first, memory, config, torch = done.stdout.splitlines()
    assert first == "accelerator: none: CPU only"
    assert memory.startswith("  ")
    assert config.startswith("config: configs/training_config_cpu.yaml (found no NVIDIA driver and no Apple silicon")
    assert torch.startswith("PyTorch: ")


def test_a_broken_torch_is_told_after_what_is_known_without_it(here: dict[str, str], tmp_path: Path) -> None:
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.write_text("#!/bin/sh\n[ $# = 2 ] && echo 'NVIDIA H100 80GB HBM3, 81000, 81559, 550.90.07, GPU-1, [N/A]'\n")
    smi.chmod(0o755)
    (tmp_path / "modules" / "torch.py").write_text('raise ImportError("libcudart.so.12: cannot open\\nand more")\n')
    done = run(here)
    assert (done.returncode, done.stdout, done.stderr) == (
        3,
        "accelerator: NVIDIA H100 80GB HBM3\n"
        "  79.6 GiB of GPU memory, 79.1 free\n"
        "config: configs/training_config_h100.yaml (found NVIDIA H100 80GB HBM3)\n",
        "torch cannot be imported: libcudart.so.12: cannot open; "
        f"type: {PYTHON} -m pip install --require-hashes -r requirements/h100.lock\n",
    )


def test_a_python_without_the_libraries_is_told_in_two_lines(here: dict[str, str]) -> None:
    done = run(here, "-S")
    assert (done.returncode, done.stdout, done.stderr) == (
        3,
        "",
        f"not installed for {sys.executable}: packaging, psutil, yaml\n"
        "type: scripts/make_venv.sh, then run this with .venv/bin/python\n",
    )


# The specification's functions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "gib"), [(2**30, 1.0), (0, 0.0), (85_899_345_920, 80.0), (2**29, 0.5)])
def test_bytes_to_gb_counts_gib(script: ModuleType, size: int, gib: float) -> None:
    assert script.bytes_to_gb(size) == gib


def test_check_pytorch_import_tells_what_torch_reaches_or_that_it_is_broken(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    assert script.check_pytorch_import().version == torch.__version__
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckFailed, match=r"^torch cannot be imported: "):
        script.check_pytorch_import()
