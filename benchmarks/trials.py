"""What the trials of the `device` checks give on a device that works: the figures behind their tolerances.

.venv/bin/python benchmarks/trials.py --output benchmarks/results/NAME.json     on an NVIDIA GPU: --platform h100
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from machine import describe

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from finetune.checks import numerics
from finetune.machine.platforms import PLATFORMS


def measure(platform: str) -> dict[str, Any]:
    """Each trial's number on the platform's device; optimizers that it can run, flash-attn where it is installed."""
    row = PLATFORMS[platform]
    found: dict[str, Any] = {
        "nf4_loss": numerics.nf4_loss(row.device),
        "qlora_step_float32": numerics.qlora_step(row.device, torch.float32, "packed"),
        "qlora_step_bfloat16": numerics.qlora_step(row.device, torch.bfloat16, "packed"),
        "bfloat16_product": numerics.bfloat16_product(row.device),
        **{f"optimizer_{name}": numerics.optimizer_step(name, row.device) for name in row.optimizers},
    }
    if importlib.util.find_spec("flash_attn"):
        found["flash_attention"] = numerics.flash_attention(row.device)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", choices=PLATFORMS, default="cpu")
    parser.add_argument("--output", type=Path, help="also write the result there")
    options = parser.parse_args()
    command = f"benchmarks/trials.py --platform {options.platform}"
    result = {**describe(command, ("torch", "bitsandbytes")), "trials": measure(options.platform)}
    print(json.dumps(result, indent=2))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
