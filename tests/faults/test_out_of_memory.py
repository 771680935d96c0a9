"""A run whose memory runs out in a step continues with more layers checkpointed; if it cannot, it ends with advice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.harness import Command, Ended, Warm, Whole, differences

CHECKPOINTED = ("training.gradient_checkpointing=true", "training.checkpointed_layers=0")
CAUSE = "memory ran out (CUDA out of memory. Tried to allocate 2.00 GiB)"


def manifest(command: Command) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((command.folder / "manifest.json").read_text(encoding="utf-8"))
    return content


def short(warm: Warm, command: Command, runs_out: str) -> Ended:
    return warm(command, module="short_of_memory", RUNS_OUT=runs_out)


def test_the_run_ends_with_the_same_bits_and_its_manifest_and_page_say_what_happened(
    warm: Warm, whole: Whole, tmp_path: Path
) -> None:
    command = whole.command.at(tmp_path / "output", *CHECKPOINTED)
    ended = short(warm, command, "4,9")
    assert ended.code == 0, ended.text
    assert differences(command, whole.result) == []
    sentences = [
        f"checkpointed layers: 1 of 2 from step 2 on, which is computed again; with 0 {CAUSE}",
        f"checkpointed layers: 2 of 2 from step 4 on, which is computed again; with 1 {CAUSE}",
    ]
    found = manifest(command)
    assert (found["checkpointed_layers"], found["starts"][0]["out_of_memory"]) == (2, sentences)
    page = (command.folder / "report.html").read_text(encoding="utf-8")
    assert all(sentence in ended.text.splitlines() and sentence in page for sentence in sentences)


@pytest.mark.slow
def test_with_all_layers_checkpointed_it_is_exit_6_and_the_same_command_loses_nothing(
    warm: Warm, whole: Whole, tmp_path: Path
) -> None:
    command = whole.command.at(tmp_path / "output", *CHECKPOINTED)
    ended = short(warm, command, "6,8,10")
    assert (ended.code, manifest(command)["checkpointed_layers"]) == (6, 2)
    assert warm(command).code == 0
    assert differences(command, whole.result) == []
    sizes = ("training.per_device_train_batch_size=1", "training.per_device_eval_batch_size=1")
    smallest = whole.command.at(tmp_path / "smallest", *CHECKPOINTED, *sizes)
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which ..."
    advice = "no change to the config is enough; use a machine with more memory"
    assert short(warm, smallest, "6,8,10").text.splitlines()[-2:] == [f"out of memory: {said}", advice]
