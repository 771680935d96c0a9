"""Checks of the NVIDIA GPU: driver, CUDA, model, memory, other programs, and Triton's compiler."""

from __future__ import annotations

import re
import shutil
import sysconfig
from pathlib import Path

from finetune.checks.host import DRIVER, OLDEST_DRIVER, nvidia_driver
from finetune.checks.preflight import Preflight
from finetune.checks.runner import Check, Finding, failed, passed, skipped, warned
from finetune.cli import advice
from finetune.machine.inspect import GpuProcess
from finetune.machine.platforms import names
from finetune.plan.fit import compare

OLDEST_CUDA = (12, 1)
HOPPER, AMPERE = (9, 0), (8, 0)


def _driver(preflight: Preflight) -> Finding:
    absent = f"{DRIVER}; or --config cpu for the demo"
    if preflight.machine.container:
        validate = "docker compose run --rm validate, which requests the GPU; on a rented pod: choose one with a GPU"
        absent = advice(validate, "on the host: ./scripts/check_docker.py")
    return nvidia_driver(preflight.machine, absent, f"{DRIVER} (on the host, not in a container)")


def _cuda(preflight: Preflight) -> Finding:
    found, fix = preflight.torch, preflight.platform.install
    if found.built_for is None:
        return failed(f"torch {found.version} is built without CUDA", fix)
    if tuple(map(int, re.findall(r"\d+", found.built_for)[:2])) < OLDEST_CUDA:
        return failed(f"torch {found.version} is built for CUDA {found.built_for}, expected 12.1 or newer", fix)
    if not found.sees_nvidia:
        text = f"torch {found.version} for CUDA {found.built_for} sees no GPU; the driver is {preflight.machine.driver}"
        return failed(text, "unset CUDA_VISIBLE_DEVICES; if that fails, update the driver or restart the machine")
    return passed(f"torch {found.version} for CUDA {found.built_for} sees the GPU")


def _device(preflight: Preflight) -> Finding:
    machine, capability = preflight.machine, preflight.torch.capability
    if capability is None:
        return skipped("torch sees no GPU")
    name = machine.gpus[0] if machine.gpus else "an NVIDIA GPU"
    found = f"{name}, compute capability {capability[0]}.{capability[1]}"
    if len(machine.gpus) > 1:
        found += f", the first of {len(machine.gpus)}; only this one is used"
    if capability < AMPERE:
        return failed(f"{found}; it lacks bfloat16", "rent an H100, or another GPU of compute capability 8.0 or higher")
    if capability != HOPPER:
        return _another_gpu(preflight, found)
    return passed(found)


def _another_gpu(preflight: Preflight, found: str) -> Finding:
    """Warn about a GPU that is not an H100, and report what does not fit on it."""
    total_gib = preflight.machine.gpu_memory_gib
    fitting = compare(preflight.config, preflight.geometry, {"in total": total_gib} if total_gib else {})
    arches = "flash-attn built for 9.0 does not run on this GPU: rebuild it with FLASH_ATTN_CUDA_ARCHS, or "
    arches += "--set model.attn_implementation=torch_varlen"
    if fitting.fits:
        return warned(f"{found}; settings and time estimates are for an H100 (9.0)", arches)
    return warned(f"{found}; {fitting.found}", f"{fitting.fix()}; {arches}" if fitting.change else fitting.fix())


def _memory(preflight: Preflight) -> Finding:
    machine, fitting = preflight.machine, preflight.fitting
    if not fitting.limits:
        return warned(f"{fitting.found}; this driver does not report free memory", "nvidia-smi")
    if fitting.fits:
        return passed(fitting.found)
    if machine.gpu_memory_gib is None or fitting.peak_gib > machine.gpu_memory_gib:
        return failed(fitting.found, fitting.fix())
    if machine.gpu_processes:
        return failed(fitting.found, fitting.fix(f"{_kill(machine.gpu_processes)}, if yours"))
    return failed(fitting.found, fitting.fix("stop the programs that nvidia-smi lists on the host"))


def _processes(preflight: Preflight) -> Finding:
    others = preflight.machine.gpu_processes
    if not others:
        return passed("no other program on the GPU")
    each = (f"{it.pid} {it.name}" + (f" {it.memory_gib:.1f} GiB" if it.memory_gib else "") for it in others)
    text = f"{len(others)} other program{'s' * (len(others) != 1)} on the GPU: {', '.join(each)}"
    return warned(text, f"{_kill(others)}, if yours; other programs slow the run and use its memory")


def _kill(processes: tuple[GpuProcess, ...]) -> str:
    return f"kill {' '.join(str(it.pid) for it in processes)}"


def _compiler(preflight: Preflight) -> Finding:
    found = shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    if found is None:
        return failed("no C compiler; Triton needs one for its kernels", "sudo apt install build-essential")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        version = sysconfig.get_python_version()
        return failed("no Python.h; Triton needs it for its kernels", f"sudo apt install python{version}-dev")
    return passed(f"{found}, with Python's headers")


CUDA = "torch is built for CUDA 12.1 or newer and sees the GPU"
NVIDIA, LINUX = names(lambda row: row.nvidia), ("host.system",)
CHECKS = (
    Check("gpu.driver", f"an NVIDIA driver, {OLDEST_DRIVER} or newer", _driver, NVIDIA, LINUX),
    Check("gpu.torch", CUDA, _cuda, NVIDIA, ("gpu.driver", "libraries.imports")),
    Check("gpu.device", "an H100; what would not fit on another GPU", _device, NVIDIA, ("gpu.torch", "model.geometry")),
    Check("gpu.memory", "free memory against the expected peak", _memory, NVIDIA, ("gpu.driver", "model.geometry")),
    Check("gpu.processes", "no other program on the GPU", _processes, NVIDIA, ("gpu.driver",), level="warn"),
    Check("gpu.compiler", "a C compiler and Python's headers, for Triton", _compiler, NVIDIA, LINUX),
)
