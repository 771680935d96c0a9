"""Checks of a Mac: MPS, chip and unified memory, watermarks, memory pressure, low power mode."""

from __future__ import annotations

import os

from finetune.checks.preflight import Preflight
from finetune.checks.runner import Check, Finding, failed, passed, warned
from finetune.machine.platforms import WORKING_SET_SHARE, chip_generation, names
from finetune.plan.fit import compare

UNIFIED_GIB = 32
LOW_WATERMARK = 1.4  # torch's default


def _mps(preflight: Preflight) -> Finding:
    found = preflight.torch
    if not found.mps_built:
        return failed(f"torch {found.version} is built without MPS", preflight.platform.repair)
    if not found.sees_mps:
        text = f"torch {found.version} is built with MPS but cannot use it"
        return failed(text, "log in to the Mac's own desktop once, update macOS, then try again")
    return passed(f"torch {found.version} sees the GPU")


def _chip(preflight: Preflight) -> Finding:
    machine = preflight.machine
    cores = f" with {machine.gpu_cores} GPU cores" if machine.gpu_cores else ""
    found = f"{machine.chip or 'unknown chip'}{cores}, {machine.memory_gib:.0f} GiB of unified memory"
    if machine.memory_gib < UNIFIED_GIB:
        fitting = compare(preflight.config, preflight.geometry, {"": machine.memory_gib * WORKING_SET_SHARE})
        fix = "nothing to change: the run fits" if fitting.fits else fitting.fix()
        return warned(f"{found}; the m4 config is made for {UNIFIED_GIB}", fix)
    generation = chip_generation(machine)
    if generation is None or generation < 4:
        fix = "nothing to change; its estimates of hours do not apply"
        return warned(f"{found}; the m4 config is made for an Apple M4", fix)
    return passed(found if generation == 4 else f"{found}; newer than the M4 that estimates of hours are for")


def _memory(preflight: Preflight) -> Finding:
    total_gib, fitting = preflight.machine.memory_gib, preflight.fitting
    if fitting.fits:
        return passed(fitting.found)
    used_by_others = fitting.peak_gib <= (preflight.working_set_gib or 0)
    fix = fitting.fix("close other programs" if used_by_others else "")
    if fitting.peak_gib > total_gib:
        return failed(f"{fitting.found}; the Mac has only {total_gib:.0f}", fix)
    return warned(fitting.found, fix)


def _watermarks(preflight: Preflight) -> Finding:
    names = ("PYTORCH_MPS_LOW_WATERMARK_RATIO", "PYTORCH_MPS_HIGH_WATERMARK_RATIO")
    low_text, high_text = (os.environ.get(name) for name in names)
    fix = f"export {names[0]}=1.0 {names[1]}=1.2"
    if low_text is None and high_text is None:
        found = "not set: torch may use more memory than the Mac has, which then swaps instead of failing"
        return warned(found, fix)
    try:
        low = LOW_WATERMARK if low_text is None else float(low_text)
        high = None if high_text is None else float(high_text)
    except ValueError:
        return failed(f"{names[0]}={low_text} {names[1]}={high_text}: not numbers", fix)
    if high == 0:
        return failed(f"{names[1]}={high_text} removes every limit: the Mac may freeze", fix)
    if high is not None and not low <= high:
        return failed(f"the low watermark {low:g} is above the high one {high:g}: torch refuses to start", fix)
    return passed(f"low {low:g}, high {'default' if high is None else f'{high:g}'}")


def _pressure(preflight: Preflight) -> Finding:
    machine = preflight.machine
    level = {1: "normal", 2: "high", 4: "critical"}.get(machine.pressure, str(machine.pressure))
    found = f"memory pressure {level}, {machine.swap_used_gib:.1f} GiB in swap"
    if machine.pressure > 1:
        return warned(found, "close the programs that Activity Monitor lists first under Memory, or restart the Mac")
    return passed(found)


def _power(preflight: Preflight) -> Finding:
    setting = preflight.machine.low_power
    if setting:
        return warned("low power mode is on: the GPU is slower", f"sudo pmset -a {setting} 0")
    return passed("low power mode is off")


MEMORY = "free memory and the GPU's working set against the expected peak"
MAC, A_MAC = names(lambda row: row.unified_memory), ("host.system",)
CHECKS = (
    Check("mac.torch", "torch is built with MPS and can use it", _mps, MAC, (*A_MAC, "libraries.imports")),
    Check("mac.chip", "an M4 with 32 GB", _chip, MAC, (*A_MAC, "model.geometry"), level="warn"),
    Check("mac.memory", MEMORY, _memory, MAC, ("mac.torch", "model.geometry")),
    Check("mac.watermarks", "PyTorch's MPS watermark variables", _watermarks, MAC, A_MAC),
    Check("mac.pressure", "memory pressure and swap", _pressure, MAC, A_MAC, level="warn"),
    Check("mac.power", "low power mode is off", _power, MAC, A_MAC, level="warn"),
)
