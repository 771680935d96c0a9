"""Divides a step's profiled time into parts, by the names of kernels and operators."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

# Tried in this order. The first three include everything that runs within such an operator: AdamW multiplies, too.
WITHIN = {
    "optimizer": r"optimizer\.step|adam|koptimizer|multi_tensor|clip_grad",
    "dequantize": r"dequant",
    "attention": r"attention|flash|fmha|sdpa|varlen",
}
BY_NAME = {
    "matmul": r"gemm|cutlass|nvjet|cublas|matmul|aten::(add)?b?mm|mkldnn|onednn",
    "element-wise": (
        r"elementwise|vectorized|reduce|triton|softmax|norm|memcpy|memset|cat_?array|index|gather|scatter"
        r"|aten::(_?to_?copy|copy_|cat|mul|add|sub|div|neg|pow|rsqrt|sqrt|mean|sum|max|exp|log|silu|sigmoid|cos|sin"
        r"|bernoulli|dropout|where|fill|zero|eq|ne|clone|amax|argmax|clamp|rsub|slice_backward|foreach)"
    ),
}
PARTS = (*BY_NAME, *WITHIN, "other")


def part_of(names: Iterable[str]) -> str:
    """Return the part of an event: names[0] is its name, the others are those of the events around it."""
    own, *around = [name.lower() for name in names]
    for part, pattern in WITHIN.items():
        if any(re.search(pattern, name) for name in (own, *around)):
            return part
    return next((part for part, pattern in BY_NAME.items() if re.search(pattern, own)), "other")


def milliseconds(profile: Any, step_ms: float) -> dict[str, float]:
    """Return milliseconds by part of a step that took `step_ms`: of kernels on a GPU, else of operators.

    `idle` is the rest: the device waits, or on a CPU Python runs between operators; it includes the profiler itself.
    """
    found = dict.fromkeys(PARTS, 0.0)
    events = profile.events()
    kernels = [event for event in events if event.device_type.name != "CPU" and not event.is_user_annotation]
    for event in kernels or events:
        microseconds = event.self_device_time_total if kernels else event.self_cpu_time_total
        found[part_of(_names(event))] += microseconds / 1000
    return {**found, "idle": max(0.0, step_ms - sum(found.values()))}


def _names(event: Any) -> list[str]:
    """Return the names of an event and of those around it, innermost first."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names
