"""Summarizes the jobs of benchmarks/train_step: figures per variant, ratios, agreement of losses, a table."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.plan.checkpointed_layers import with_layers
from finetune.plan.model_shape import MISTRAL_7B, Geometry
from finetune.plan.throughput import conditions
from finetune.prove.flops import utilization
from train_step.variants import OURS, TUNED, VARIANTS

# Largest relative distance from the first variant's loss: at step 0, and at any step, as TRL rounds B's adapter weights
# to bf16. About ten times what --tiny measures, in bfloat16 with --bf16 on a CPU: 6e-6 and 2.7e-4
# (results/2026-11-29-train-step-bfloat16-2-cores.json). A GPU's kernels and 32 layers may round differently, so a
# variant that disagrees is reported, but is no error.
TOLERANCE = {"float32": (2e-6, 2e-3), "bfloat16": (1e-4, 3e-3)}


def summary(results: list[dict[str, Any]], configs: dict[str, Config], geometry: Geometry) -> dict[str, dict[str, Any]]:
    """Return by variant and data: medians over the rounds, and the profile and memory of the first round."""
    variants: dict[str, dict[str, Any]] = {}
    for result in results:
        name = result["variant"]
        entry = variants.setdefault(name, {"what": VARIANTS[name].what, "settings": list(VARIANTS[name].settings)})
        if "failed" in result:
            entry["failed"] = f"{result['task']}, {result['data']}: {result['failed']}"
        elif result["task"] == "speed":
            entry.setdefault(result["data"], []).append(result)
    for name, entry in variants.items():
        for data in ("mixed", "full"):
            if data in entry:
                entry[data] = speed(entry[data], configs[name], geometry)
    return variants


def speed(rounds: list[dict[str, Any]], config: Config, geometry: Geometry) -> dict[str, Any]:
    """Return one variant's figures on one kind of rows; `rounds` are its results, the profiled one first."""
    first = rounds[0]
    timed = slice(first["warmup"], first["warmup"] + first["steps"])
    lengths = [length for step in first["row_lengths"][timed] for length in step]
    seconds = [sum(one["step_seconds"][timed]) for one in rounds]
    layers = first["checkpointed_layers"]
    used = utilization(config, geometry, lengths, layers, statistics.median(seconds), first["device"])
    return {
        "tokens_per_second": round(sum(lengths) / statistics.median(seconds), 2),
        "tokens_per_second_of_rounds": [round(sum(lengths) / one, 2) for one in seconds],
        "ms_per_step": round(1000 * statistics.median(seconds) / first["steps"], 2),
        "tokens_per_step": round(sum(lengths) / first["steps"]),
        "padding": round(first["padding"], 4),
        "attention": first["attention"],
        "checkpointed_layers": layers,
        **{name: share if share is None else round(share, 4) for name, share in used.items()},
        "memory_gib": {name: round(max(one["memory_gib"][name] for one in rounds), 3) for name in first["memory_gib"]},
        "profiled_step_ms": {name: round(part, 2) for name, part in first["parts_ms"].items()},
    }


def ratios(variants: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return by data the ratios of our median tokens per second to each other variant's: "D/A" and so on."""
    found: dict[str, dict[str, float]] = {}
    for data in ("mixed", "full"):
        speeds = {name: entry[data]["tokens_per_second"] for name, entry in variants.items() if data in entry}
        ours = {name: speed for name, speed in speeds.items() if name.startswith(OURS)}
        found[data] = {
            f"{mine}/{other}": round(ours[mine] / speeds[other], 3)
            for mine in ours
            for other in speeds
            if other not in ours or (other == OURS and mine != OURS)
        }
    return found


def check_losses(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare each variant's losses with the first's: relative distance at step 0, the largest, the verdict."""
    runs = {result["variant"]: result for result in results if result["task"] == "losses" and "failed" not in result}
    if not runs:
        return {"agree": False, "why": "no variant gave any"}
    against, reference = next(iter(runs.items()))
    at_first, at_any = TOLERANCE[reference["dtype"]]
    found = {}
    for name, run in runs.items():
        pairs = zip(run["losses"], reference["losses"], strict=True)
        distances = [abs(loss / wanted - 1) for loss, wanted in pairs]
        most = float(np.max(distances))  # NaN if any is, and then no comparison is true
        fits = distances[0] <= at_first and most <= at_any
        found[name] = {"losses": run["losses"], "at_step_0": distances[0], "at_most": most, "agrees": fits}
    return {
        "agree": all(entry["agrees"] for entry in found.values()),
        "against": against,
        "tolerance": {"at_step_0": at_first, "at_most": at_any},
        "variants": found,
    }


def throughput(
    variants: dict[str, dict[str, Any]], configs: dict[str, Config], geometry: Geometry
) -> list[dict[str, Any]]:
    """Return entries for src/finetune/plan/throughput.py, which estimates hours: ours on rows with lengths of chats.

    The first is without our options for speed, the last with all of them, as `auto` chooses. There is none unless
    Mistral-7B was trained with its platform's config.
    """
    if geometry != MISTRAL_7B or "mixed" not in variants.get(OURS, {}):
        return []
    shipped = load_config(configs[OURS].platform)[0]
    entries = []
    for name in (OURS, TUNED):
        if "mixed" not in variants.get(name, {}):
            continue
        found, speed = configs[name], variants[name]["mixed"]
        here = conditions(with_layers(found, speed["checkpointed_layers"]), geometry)
        batch, usual = (
            (config.training.per_device_train_batch_size, config.effective_batch_size) for config in (found, shipped)
        )
        if conditions(shipped, geometry).items() <= here.items() and batch == usual and found.lora == shipped.lora:
            entries.append({**here, "tokens_per_second": speed["tokens_per_second"], "eval_tokens_per_second": None})
    return entries


def show(found: dict[str, Any]) -> str:
    """Return the table for the terminal."""
    lines = []
    for data in ("mixed", "full"):
        lines += ["", f"{data} rows  tokens/s  ms a step  padding  MFU    HFU    memory GiB"]
        for name, entry in found["variants"].items():
            if data in entry:
                lines.append(_row(name, entry[data]))
        lines += [f"{pair:<16}{ratio:>8.2f} x" for pair, ratio in found["ratios"][data].items()]
    for name, entry in found["variants"].items():
        for why in ("left_out", "failed"):
            if why in entry:
                lines.append(f"{name}: {entry['what']}: {entry[why]}")
    return "\n".join([*lines, "", *_losses(found["losses"])])


def _row(name: str, entry: dict[str, Any]) -> str:
    shares = "".join(f"{'-' if entry[key] is None else format(entry[key], '.1%'):>7}" for key in ("mfu", "hfu"))
    memory = ", ".join(f"{kind} {gib:.2f}" for kind, gib in entry["memory_gib"].items())
    parts = ", ".join(f"{part} {ms:,.0f}" for part, ms in entry["profiled_step_ms"].items())
    return (
        f"{name:<12}{entry['tokens_per_second']:>10,.1f}{entry['ms_per_step']:>11,.0f}{entry['padding']:>9.0%}{shares}"
        f"  {memory}\n{'':<12}ms: {parts}"
    )


def _losses(losses: dict[str, Any]) -> list[str]:
    if "variants" not in losses:
        return [f"losses: {losses['why']}"]
    first, any_step = losses["tolerance"].values()
    lines = [
        f"losses at dropout 0, and how far from {losses['against']}'s: "
        f"at step 0 (tolerated: {first:g}), at most ({any_step:g})"
    ]
    for name, entry in losses["variants"].items():
        verdict = "agrees" if entry["agrees"] else "DISAGREES"
        fell = f"{entry['losses'][0]:.4f} -> {entry['losses'][-1]:.4f}"
        lines.append(f"{name:<12}{fell}  {entry['at_step_0']:.1e}  {entry['at_most']:.1e}  {verdict}")
    return lines
