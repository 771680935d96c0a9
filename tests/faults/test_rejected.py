"""An adapter that fails its self-test: what the run leaves, and what the same command does then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.harness import CHECKPOINTS, Command, Ended, Warm, Whole, names
from support.train_command import FILES

ADAPTER = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer.json",
    "tokenizer_config.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def rejected(warm: Warm, whole: Whole, tmp_path_factory: pytest.TempPathFactory) -> tuple[Command, Ended]:
    """A run whose learning rate is so small that it learns nothing, and how it ended."""
    command = whole.command.at(tmp_path_factory.mktemp("rejected") / "output", "training.learning_rate=1e-30")
    return command, warm(command)


def manifest(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return content


def message(folder: Path) -> str:
    """What is said of such a run, from its manifest's checks."""
    checks = manifest(folder)["self_test"]["checks"]
    wrong = [f"  {check['name']}: {check['detail']}" for check in checks if check["status"] == "fail"]
    first = f"self-test: {len(wrong)} of 7 checks failed, so this adapter is not final"
    last = f"it was moved to {folder}/rejected; change the config or the data, then start a new run with --fresh"
    return "\n".join([first, *wrong, last])


def test_it_is_exit_1_with_what_failed(rejected: tuple[Command, Ended]) -> None:
    command, ended = rejected
    assert ended.code == 1
    assert message(command.folder) in ended.text
    assert "  differs: logits differ from the base's by up to 0\n" in ended.text
    assert "Traceback" not in ended.text
    assert "done:" not in ended.text


def test_its_files_lie_aside_and_nothing_in_the_run_folder_can_be_taken_for_an_adapter(
    rejected: tuple[Command, Ended],
) -> None:
    command, _ = rejected
    assert names(command.folder) == FILES - ADAPTER | {"rejected"}
    assert names(command.folder / "rejected") == ADAPTER
    assert names(command.checkpoints) == CHECKPOINTS


def test_the_manifest_and_the_page_say_so(rejected: tuple[Command, Ended]) -> None:
    folder = rejected[0].folder
    found = manifest(folder)
    assert (found["status"], found["error"], found["self_test"]["status"]) == ("failed", message(folder), "fail")
    assert found["steps"] == 6 and len(found["adapter_sha256"]) == 64
    assert "No: its self-test failed" in (folder / "report.html").read_text(encoding="utf-8")


def test_the_same_command_trains_no_step_more_and_comes_to_the_same_end(
    warm: Warm, rejected: tuple[Command, Ended], tmp_path: Path
) -> None:
    command = rejected[0].elsewhere(tmp_path / "output")
    before = manifest(command.folder)
    ended = warm(command)
    after = manifest(command.folder)
    assert (ended.code, after["error"]) == (1, message(command.folder))
    assert "step 1/" not in ended.text
    assert [after[key] for key in ("status", "self_test", "adapter_sha256", "best_step")] == [
        before[key] for key in ("status", "self_test", "adapter_sha256", "best_step")
    ]
    assert names(command.folder) == FILES - ADAPTER | {"rejected"}


def test_fresh_starts_a_run_beside_it(warm: Warm, rejected: tuple[Command, Ended], tmp_path: Path) -> None:
    command = rejected[0].elsewhere(tmp_path / "output")
    better = command.at(command.output, "training.learning_rate=1e-3")
    refused = warm(better)
    assert refused.code == 2 and "training.learning_rate: 1e-30 -> 0.001" in refused.text
    ended = warm(better, "--fresh")
    assert ended.code == 0, ended.text
    assert manifest(command.output / "run-2")["status"] == "complete"
    assert manifest(command.folder)["status"] == "failed"
