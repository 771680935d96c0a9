"""Print this machine's accelerator, its memory, and the config that fits it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from finetune import cli
from finetune.errors import CheckFailed
from finetune.files import GIB
from finetune.machine.device import Torch, read_torch
from finetune.machine.inspect import Machine, read_machine
from finetune.machine.platforms import accelerator, choose
from finetune.terminal import Terminal


def bytes_to_gb(size: float) -> float:
    """Bytes to GiB (2**30 bytes); all labels say GiB."""
    return size / GIB


def check_pytorch_import() -> Torch:
    """Whether the installed PyTorch can use CUDA or MPS. Raises CheckFailed if it cannot be imported."""
    return read_torch()


def main() -> None:
    options = cli.plain_parser(__doc__ or "").parse_args()
    terminal, machine = Terminal(options.json), read_machine()
    platform, reason = choose(machine)
    terminal.decision("accelerator", accelerator(machine))
    for line in memory_lines(machine):
        terminal.say(f"  {line}")
    terminal.decision("config", f"configs/training_config_{platform.name}.yaml ({reason})")
    try:
        torch = check_pytorch_import()
    except CheckFailed as error:
        raise CheckFailed(error.found, f"type: {platform.install}") from None
    terminal.decision("PyTorch", torch_line(torch))
    if options.json:
        cli.print_json(document(machine, platform.name, torch))


def memory_lines(machine: Machine) -> list[str]:
    """The memory in GiB: the GPU's own, or the machine's."""
    if machine.gpu_memory_gib is not None and machine.gpu_free_gib is not None:
        return [f"{machine.gpu_memory_gib:.1f} GiB of GPU memory, {machine.gpu_free_gib:.1f} free"]
    kind = "unified memory" if machine.apple_silicon else "memory"
    return [f"{machine.memory_gib:.1f} GiB of {kind}, {machine.memory_free_gib:.1f} free"]


def torch_line(torch: Torch) -> str:
    """Describe what PyTorch can use."""
    if torch.sees_mps:
        return f"{torch.version} sees the Mac's GPU"
    if torch.mps_built:
        return f"{torch.version} is built with MPS but cannot use it"
    built = "without CUDA" if torch.built_for is None else f"for CUDA {torch.built_for}"
    return f"{torch.version} {built} sees {'the GPU' if torch.sees_nvidia else 'no GPU'}"


def document(machine: Machine, platform: str, torch: Torch) -> dict[str, Any]:
    """The document of `--json`."""
    return {
        "schema_version": 1,
        "accelerator": accelerator(machine),
        "config": f"configs/training_config_{platform}.yaml",
        "machine": dataclasses.asdict(machine),
        "torch": dataclasses.asdict(torch),
    }


if __name__ == "__main__":
    cli.run(main)
