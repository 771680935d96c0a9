"""Run the trials of the `device` checks on a working device: the figures behind their tolerances.

.venv/bin/python benchmarks/trials.py --output benchmarks/results/NAME.json     on an NVIDIA GPU: --platform h100
"""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import machine
import torch

from finetune.checks.numerics import linear
from finetune.checks.numerics.attention import packed_attention
from finetune.checks.numerics.optimizer import optimizer_step
from finetune.machine.platforms import PLATFORMS


def measure(platform: str) -> dict[str, Any]:
    """Return each trial's figure on the platform's device; flash-attn only if it is installed."""
    row = PLATFORMS[platform]
    found: dict[str, Any] = {
        "nf4_loss": linear.nf4_loss(row.device),
        "qlora_step_float32": linear.qlora_step(row.device, torch.float32, "packed"),
        "qlora_step_bfloat16": linear.qlora_step(row.device, torch.bfloat16, "packed"),
        "bfloat16_product": linear.bfloat16_product(row.device),
        **{f"optimizer_{name}": optimizer_step(name, row.device) for name in row.optimizers},
    }
    if importlib.util.find_spec("flash_attn"):
        found["flash_attention"] = packed_attention("flash_attention_2", row.device)
    return found


def main() -> None:
    parser = machine.parser(__doc__)
    parser.add_argument("--platform", choices=PLATFORMS, default="cpu")
    options = parser.parse_args()
    command = f"benchmarks/trials.py --platform {options.platform}"
    result = machine.record(options.output, command, ("torch", "bitsandbytes"), trials=measure(options.platform))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
