"""What a result file becomes: a line a part, a block without names, and rows for docs/measured.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.prove.result import block, describe, part_line, table

DOCUMENT: dict[str, Any] = {
    "date": "2026-12-01",
    "command": "scripts/prove.py --minutes 8 --random",
    "machine": {"system": "Linux x86_64", "cpu_cores": 16, "cpu": "some CPU", "gpu": "NVIDIA H100 80GB HBM3"},
    "versions": {"python": "3.11.9", "torch": "2.10.0"},
    "parts": {
        "checks": {"status": "failed", "seconds": 31.0, "found": "44 passed, 1 failed", "failed": ["gpu.device"],
            "checks": ["fail gpu.device: in /home/somebody/project"]},
        "speed": {"status": "done", "seconds": 60.4, "base": "Mistral-7B", "steps": 3, "tokens_per_second": 7912.3,
            "mfu": 0.312, "hfu": None},
        "memory": {"status": "done", "seconds": 90.0, "furthest_off": 0.021,
            "configs": [{"config": "all layers", "expected_gib": 13.4, "measured_gib": 13.1}]},
        "kill": {"status": "done", "seconds": 50.0, "killed_after_step": 10, "same_bits": True, "adapter": "0123"},
        "train": {"status": "skipped", "seconds": 0.0, "why": "train: no time was left; allow more with --minutes N"},
    },
    "throughput": [{"tokens_per_second": 7912.3}],
}  # fmt: skip


def test_a_part_is_a_line_with_its_figures_or_why_it_has_none() -> None:
    speed = "done    speed          60 s  base Mistral-7B, steps 3, tokens per second 7,912, mfu 0.312, hfu not known"
    assert part_line("speed", DOCUMENT["parts"]["speed"]) == speed
    skipped = "skipped train           0 s  train: no time was left; allow more with --minutes N"
    assert part_line("train", DOCUMENT["parts"]["train"]) == skipped


def test_the_block_names_machine_versions_parts_and_checks_but_no_person() -> None:
    assert block(DOCUMENT) == [
        "----- paste from here -----",
        "command  scripts/prove.py --minutes 8 --random, 2026-12-01",
        "machine  NVIDIA H100 80GB HBM3; Linux x86_64, 16 cores",
        "versions python 3.11.9, torch 2.10.0",
        "failed  checks         31 s  found 44 passed, 1 failed",
        "  gpu.device",
        "  fail gpu.device: in ~/project",
        "done    speed          60 s  base Mistral-7B, steps 3, tokens per second 7,912, mfu 0.312, hfu not known",
        "done    memory         90 s  furthest off 0.021",
        "  config all layers, expected_gib 13.4, measured_gib 13.1",
        "done    kill           50 s  killed after step 10, same bits yes, adapter 0123",
        "skipped train           0 s  train: no time was left; allow more with --minutes N",
        "----- to here -----",
    ]


def test_the_rows_for_the_page_of_what_was_measured_are_of_parts_that_were_made() -> None:
    gpu = "NVIDIA H100 80GB HBM3"
    assert table(DOCUMENT, "x-prove-h100.json") == [
        f"| {gpu}, Mistral-7B: training, 3 steps | 7,912 tokens/s, MFU 31.2% | `x-prove-h100.json` |",
        f"| {gpu}: expected memory against the measured peak | 2.1% off | `x-prove-h100.json` |",
        f"| {gpu}: killed after step 10, resumed | the same adapter, bit for bit | `x-prove-h100.json` |",
        "in benchmarks/results, plans count 0.04 h for a million tokens from it",
    ]
    assert table({**DOCUMENT, "parts": {}, "throughput": []}, "x.json") == []


def test_a_head_says_when_where_and_with_what() -> None:
    head = describe("some command", ("torch",))
    assert sorted(head) == ["command", "date", "machine", "versions"]
    assert sorted(head["versions"]) == ["python", "torch"]
    if Path("/proc/cpuinfo").is_file():
        assert head["machine"]["cpu"]
