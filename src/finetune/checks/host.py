"""Checks of the machine: operating system, Python, memory, user, clock, and the container's settings."""

from __future__ import annotations

import getpass
import os
from datetime import UTC, datetime
from pathlib import Path

from finetune.checks.preflight import Preflight
from finetune.checks.runner import Check, Finding, failed, passed, skipped, warned
from finetune.machine.inspect import Machine
from finetune.wording import clock

OLDEST_DRIVER = 525  # the first that runs CUDA 12
DRIVER = "sudo apt install nvidia-driver-570-server, then restart"
MADE = datetime(2026, 11, 1, tzinfo=UTC)  # this program's release; an earlier clock is wrong
SHM_GIB = 0.25  # Docker's default is 0.0625


def nvidia_driver(machine: Machine, absent: str, old: str) -> Finding:
    """Check that the NVIDIA driver works and runs CUDA 12; `absent` and `old` are the fixes if it is missing or old."""
    if machine.driver is None:
        return failed("nvidia-smi is missing or does not answer: no working NVIDIA driver", absent)
    if int(machine.driver.split(".")[0]) < OLDEST_DRIVER:
        return failed(f"driver {machine.driver}; CUDA 12 needs {OLDEST_DRIVER} or newer", old)
    return passed(f"driver {machine.driver}")


def _system(preflight: Preflight) -> Finding:
    if preflight.platform.nvidia:
        return _linux(preflight.machine)
    if preflight.platform.unified_memory:
        return _mac(preflight.machine)
    return passed(preflight.machine.described)


def _linux(machine: Machine) -> Finding:
    found = machine.described
    if machine.system != "Linux":
        return failed(f"{found}; the h100 config needs Linux", "--config m4 on a Mac, or rent a Linux machine")
    if machine.architecture != "x86_64":
        return warned(f"{found}; requirements/h100.lock was resolved for x86_64", "rent an x86_64 machine")
    return passed(found)


def _mac(machine: Machine) -> Finding:
    found = machine.described
    if machine.translated:
        again = "rm -r .venv; PYTHON=/opt/homebrew/bin/python3.11 scripts/make_venv.sh"
        return failed(f"{found}: this Python is an Intel build, run by Rosetta, which has no GPU", again)
    if not machine.apple_silicon:
        otherwise = "--config cpu for the demo, --config h100 to train"
        return failed(f"{found}; the m4 config needs Apple silicon", otherwise)
    release, update = int(machine.release.split(".")[0] or 0), "softwareupdate --install --all --restart"
    if release < 14:
        return failed(f"{found}; PyTorch's bfloat16 needs macOS 14", update)
    if release < 15:
        return warned(f"{found}; macOS 15 or later is expected", update)
    return passed(found)


def _python(preflight: Preflight) -> Finding:
    found = preflight.machine.python
    if not (3, 11) <= tuple(map(int, found.split(".")[:2])) <= (3, 13):
        again = "rm -r .venv; PYTHON=/path/to/python3.11 scripts/make_venv.sh"
        return failed(f"Python {found}, expected 3.11 to 3.13", again)
    return passed(f"Python {found}")


def _memory(preflight: Preflight) -> Finding:
    machine = preflight.machine
    total = machine.memory_gib if machine.memory_limit_gib is None else machine.memory_limit_gib
    whose = "" if machine.memory_limit_gib is None else " (this container's limit)"
    found = f"{total:.1f} GiB of memory{whose}, {machine.memory_free_gib:.1f} free"
    needed = preflight.platform.loading_gib
    if total < needed:
        fix = "raise mem_limit in compose.yaml" if whose else "rent a machine with more memory"
        return warned(f"{found}; loading the base is expected to need {needed:g}", fix)
    return passed(found)


def _user(preflight: Preflight) -> Finding:
    home = Path(os.environ.get("HOME") or "/nonexistent")
    fix = "export USER=trainer HOME=/tmp/trainer; mkdir -p $HOME"
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        return failed(f"user id {os.getuid()} has no user name, which torch's caches need", fix)
    if not os.access(home, os.W_OK):
        return warned(f"{name}, HOME {home} is not writable", fix)
    return passed(f"{name}, HOME {home}")


def _clock(preflight: Preflight) -> Finding:
    now = datetime.now(UTC)
    found = clock(now)
    if now < MADE:
        text = f"{found}, earlier than this program's release ({MADE:%Y-%m}): web certificates look invalid"
        linux = preflight.machine.system == "Linux"
        return failed(text, "sudo timedatectl set-ntp true" if linux else "sudo sntp -sS time.apple.com")
    return passed(found)


def _shm(preflight: Preflight) -> Finding:
    found = preflight.machine.shm_gib
    if not preflight.machine.container or found is None:
        return skipped("not in a container")
    text = f"{found * 1024:,.0f} MiB of /dev/shm"
    if found < SHM_GIB:
        fix = "docker run --shm-size=1g, or shm_size: 1gb in compose.yaml"
        return warned(f"{text}, expected {SHM_GIB * 1024:.0f}", fix)
    return passed(text)


def _init(preflight: Preflight) -> Finding:
    if not preflight.machine.container:
        return skipped("not in a container")
    if preflight.machine.process_1:
        text = "this program is process 1, which must reap child processes and has no default signal handlers"
        return warned(text, "docker run --init, or init: true in compose.yaml")
    return passed("process 1 is not this program")


CHECKS = (
    Check("host.system", "operating system and architecture fit the platform; no Rosetta; macOS 15 or later", _system),
    Check("host.python", "Python 3.11 to 3.13", _python),
    Check("host.memory", "memory, and the container's memory limit", _memory, level="warn"),
    Check("host.user", "the user has a name and a writable HOME", _user),
    Check("host.clock", "the clock is not earlier than this program's release", _clock),
    Check("container.shm", "/dev/shm is not Docker's small default", _shm, level="warn"),
    Check("container.init", "an init is process 1", _init, level="warn"),
)
