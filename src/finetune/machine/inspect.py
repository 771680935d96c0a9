"""Reads facts about this machine from the operating system and the NVIDIA driver, without torch.

All are fields of one `Machine`, so that tests can use recorded ones.
"""

from __future__ import annotations

import os
import platform as host
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from finetune.files import GIB

ANSWER_SECONDS = 20
CGROUP, SHM = Path("/sys/fs/cgroup"), Path("/dev/shm")


@dataclass(frozen=True)
class GpuProcess:
    """A program that uses memory of an NVIDIA GPU; `memory_gib` is None if the driver does not report it."""

    pid: int
    name: str
    memory_gib: float | None


@dataclass(frozen=True)
class Machine:
    """One machine. Memory in GiB; OS and architecture as `uname` reports them.

    `gpus` are the names of all NVIDIA GPUs, the other `gpu_` fields are of the first. `memory_limit_gib` is this
    container's, or None. `release` is the kernel's, or macOS's version. Only a Mac has `chip`, `gpu_cores` (None if
    unknown), `translated` (this Python is an Intel build under Rosetta), `low_power` (the pmset setting that is on,
    powermode on a Pro or Max; empty if off) and `pressure` (1 normal, 2 warning, 4 critical).
    """

    system: str
    architecture: str
    gpus: tuple[str, ...]
    gpu_free_gib: float | None
    memory_gib: float
    memory_free_gib: float
    gpu_memory_gib: float | None = None
    gpu_processes: tuple[GpuProcess, ...] = ()
    driver: str | None = None
    release: str = ""
    python: str = host.python_version()
    swap_used_gib: float = 0.0
    container: bool = False
    memory_limit_gib: float | None = None
    shm_gib: float | None = None
    process_1: bool = False
    chip: str = ""
    gpu_cores: int | None = None
    translated: bool = False
    low_power: str = ""
    pressure: int = 1

    @property
    def apple_silicon(self) -> bool:
        """Whether it is a Mac with a GPU that this Python can use."""
        return self.system == "Darwin" and self.architecture == "arm64"

    @property
    def described(self) -> str:
        """Operating system, release and architecture in words."""
        return f"{'macOS' if self.system == 'Darwin' else self.system} {self.release} on {self.architecture}"


def read_machine() -> Machine:
    """Read the facts about this machine; those about NVIDIA GPUs come from nvidia-smi."""
    memory = psutil.virtual_memory()
    limit_gib = _memory_limit_gib()
    mac = host.system() == "Darwin"
    free_gib = (_mac_free_share() * memory.total if mac else memory.available) / GIB
    return Machine(
        system=host.system(),
        architecture=host.machine(),
        memory_gib=memory.total / GIB,
        memory_free_gib=free_gib if limit_gib is None else min(free_gib, limit_gib),
        release=host.mac_ver()[0] if mac else host.release(),
        swap_used_gib=psutil.swap_memory().used / GIB,
        container=Path("/.dockerenv").exists() or Path("/run/.containerenv").exists(),
        memory_limit_gib=limit_gib,
        shm_gib=shutil.disk_usage(SHM).total / GIB if SHM.is_dir() else None,
        process_1=os.getpid() == 1,
        **_gpu_facts(),
        **(_mac_facts() if mac else {}),
    )


def _answer(*command: str) -> str:
    """Return what a system tool prints, or "" if it is missing, fails or hangs."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=ANSWER_SECONDS, check=True
        ).stdout.strip()
    except (subprocess.SubprocessError, OSError):
        return ""


def _gpu_facts() -> dict[str, Any]:
    """Return the GPU fields of Machine, from nvidia-smi; memory that it does not report ([N/A]) is None.

    For a GPU split into instances (MIG) it reports the memory of all together, so that is None, too.
    """
    fields = "name,memory.free,memory.total,driver_version,uuid,mig.mode.current"
    table = _answer("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    row = r"^(.+), *([0-9]+|\[.+\]), *([0-9]+|\[.+\]), *([0-9.]+), *(GPU-[0-9a-f-]+), *(.+)$"
    found = re.findall(row, table, re.MULTILINE)
    driver = found[0][3] if found else None
    rows = _visible(found, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not rows:
        return {"gpus": (), "gpu_free_gib": None, "driver": driver}
    _, free_mib, total_mib, _, uuid, mig = rows[0]
    if mig == "Enabled":
        free_mib = total_mib = "[N/A]"
    # Training uses only the first GPU, so only its programs count.
    fields = "pid,process_name,used_memory"
    apps = _answer("nvidia-smi", f"--id={uuid}", f"--query-compute-apps={fields}", "--format=csv,noheader,nounits")
    found = re.findall(r"^([0-9]+), *(.+), *([0-9]+|\[.+\])$", apps, re.MULTILINE)
    return {
        "gpus": tuple(row[0] for row in rows),
        "gpu_free_gib": _mib_to_gib(free_mib),
        "gpu_memory_gib": _mib_to_gib(total_mib),
        "gpu_processes": tuple(GpuProcess(int(pid), name, _mib_to_gib(mib)) for pid, name, mib in found),
        "driver": driver,
    }


def _visible(rows: list[tuple[str, ...]], variable: str | None) -> list[tuple[str, ...]]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES selects, in its order, up to the first unknown name, like CUDA."""
    if variable is None:
        return rows
    chosen: list[tuple[str, ...]] = []
    for name in map(str.strip, variable.split(",")):
        named = [row for index, row in enumerate(rows) if name == str(index) or (name and row[4].startswith(name))]
        if name.startswith("MIG-"):  # an instance, whose name does not identify its GPU
            named = [row for row in rows if row[5] == "Enabled"]
        if not named:
            break
        chosen.append(named[0])
    return chosen


def _mib_to_gib(text: str) -> float | None:
    return float(text) / 1024 if text.isdigit() else None


def _memory_limit_gib() -> float | None:
    """Return the memory limit of this container, from cgroup 2 or 1, or None."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        path = CGROUP / name
        text = path.read_text().strip() if path.is_file() else "max"
        if text != "max" and float(text) < 2**60:  # cgroup 1 writes "none" as a number near 2**63
            return float(text) / GIB
    return None


def _mac_free_share() -> float:
    """Return the available share of a Mac's memory, 0 to 1, from the level that macOS itself uses.

    psutil's `available` excludes pages of recently read files, such as 14.5 GB of weights, which macOS drops if needed.
    """
    level = _answer("sysctl", "-n", "kern.memorystatus_level")
    if level.isdigit():
        return int(level) / 100
    memory = psutil.virtual_memory()
    return float(memory.available / memory.total)


def _mac_facts() -> dict[str, Any]:
    """Return the Mac's fields of Machine, from sysctl, ioreg and pmset."""
    pressure = _answer("sysctl", "-n", "kern.memorystatus_vm_pressure_level")
    cores = re.search(r'"gpu-core-count" = (\d+)', _answer("ioreg", "-rc", "AGXAccelerator", "-d1"))
    return {
        "chip": _answer("sysctl", "-n", "machdep.cpu.brand_string"),
        "gpu_cores": int(cores[1]) if cores else None,
        "translated": _answer("sysctl", "-n", "sysctl.proc_translated") == "1",
        "low_power": next(iter(re.findall(r"\b((?:low)?powermode)\s+1\b", _answer("pmset", "-g"))), ""),
        "pressure": int(pressure) if pressure.isdigit() else 1,
    }
