"""What TensorBoard reads and wandb's own records say of a run that was stopped once and went on."""

from __future__ import annotations

import html
import json
import re
import signal
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from wandb.proto.wandb_internal_pb2 import Record

from support.tracked import training

pytestmark = pytest.mark.slow

STEPS = 60
SETTINGS = (
    "tracking.project=my-project",
    "dataset.sample_prompts=['Why?', 'What is <two> plus one?']",
    "training.learning_rate=1e-3",
    "training.eval_steps=20",
    "training.save_steps=20",
)
# Where a value of metrics.jsonl stands in both trackers.
NAMES = {
    "train/loss": "loss",
    "eval/loss": "eval_loss",
    "train/learning_rate": "learning_rate",
    "train/grad_norm": "grad_norm",
    "train/tokens_per_second": "tokens_per_second",
    "train/memory_gib": "memory_gib",
}


@dataclass(frozen=True)
class Tracked:
    """The folder of a finished run of two starts."""

    folder: Path

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text(encoding="utf-8").splitlines()]

    def metrics(self, key: str) -> dict[int, float]:
        """A value of metrics.jsonl by its step."""
        return {entry["step"]: entry[key] for entry in self.lines("metrics.jsonl") if key in entry}


@pytest.fixture(scope="module")
def tracked(tiny_mistral: Path, tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    folder = tmp_path_factory.mktemp("tracked")
    rows = []
    for number in range(40):
        asked = {"role": "user", "content": f"What is {number} plus one?"}
        rows.append({"messages": [asked, {"role": "assistant", "content": f"It is {number + 1}."}]})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    start = (tiny_mistral, folder / "train.jsonl", folder, STEPS, *SETTINGS)
    first = training(*start, WANDB_MODE="offline")
    assert first.stdout is not None
    told = []
    for line in first.stdout:
        told.append(line)
        if line.startswith("step 25/"):
            first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=120) == 143, "".join(told)
    second = training(*start, WANDB_MODE="offline")
    text, _ = second.communicate(timeout=120)
    assert second.returncode == 0, text
    return Tracked(folder / "run")


# --- TensorBoard


@pytest.fixture(scope="module")
def events(tracked: Tracked) -> EventAccumulator:
    """What TensorBoard reads."""
    found = EventAccumulator(str(tracked.folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    return found.Reload()


@pytest.mark.parametrize("tag", NAMES)
def test_tensorboard_has_the_values_of_both_starts(events: EventAccumulator, tracked: Tracked, tag: str) -> None:
    values = {event.step: event.value for event in events.Scalars(tag)}
    assert values == pytest.approx(tracked.metrics(NAMES[tag]), rel=1e-6)
    assert {20, 40, STEPS} <= values.keys()


@pytest.mark.parametrize("number", [1, 2])
def test_tensorboard_shows_what_base_and_tuned_model_said_at_each_new_best(
    events: EventAccumulator, tracked: Tracked, number: int
) -> None:
    found = []
    for event in events.Tensors(f"samples/{number}/text_summary"):
        page = markdown_to_safe_html(event.tensor_proto.string_val[0])
        found.append((event.step, html.unescape(re.sub("<[^>]+>", " ", page)).split()))
    wanted = []
    for entry in tracked.lines("samples.jsonl"):
        sample = entry["samples"][number - 1]
        wanted.append(
            (entry["step"], " ".join(f"{name} {sample[name]}" for name in ("prompt", "base", "tuned")).split())
        )
    assert found == wanted
    assert [step for step, _ in wanted] == [20, 40, STEPS, STEPS]  # three times the best so far, and the last word


# --- wandb


@pytest.fixture(scope="module")
def files(tracked: Tracked) -> list[Path]:
    """What `wandb sync` is given: a file a start."""
    return sorted(tracked.folder.glob("wandb/offline-run-*/run-*.wandb"))


def read(file: Path) -> Iterator[Record]:
    """The messages of a wandb file: after 7 bytes LevelDB's log, whose blocks of 32 KiB split those that do not fit."""
    content, at, message = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, part = struct.unpack_from("<HB", content, at + 4)  # after a checksum
        message += content[at + 7 : at + 7 + size]
        at += 7 + size
        if part in (1, 4):  # a whole one, or the last part
            yield Record.FromString(message)
            message = b""


def history(files: list[Path]) -> Iterator[dict[str, Any]]:
    """What was logged, in its order."""
    for record in (record for file in files for record in read(file) if record.HasField("history")):
        yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}


def test_two_starts_are_one_run_of_wandb(tracked: Tracked, files: list[Path]) -> None:
    runs = [record.run for file in files for record in read(file) if record.HasField("run")]
    name = (tracked.folder / "wandb" / "id").read_text(encoding="utf-8")
    assert [(run.run_id, run.project, run.display_name, run.resume) for run in runs] == [
        (name, "my-project", "run", True)
    ] * 2
    assert [file.name for file in files] == [f"run-{name}.wandb"] * 2
    assert [sum(record.HasField("exit") for record in read(file)) for file in files] == [1, 1]  # each to its end


def test_wandb_has_the_resolved_config_without_the_folders_of_this_machine(tracked: Tracked, files: list[Path]) -> None:
    wanted = yaml.safe_load((tracked.folder / "config.yaml").read_text(encoding="utf-8"))
    wanted["model"]["name"], wanted["dataset"]["train_file"] = "tiny-mistral", "train.jsonl"
    wanted["output"]["dir"] = tracked.folder.parent.name
    for record in (record for file in files for record in read(file) if record.HasField("run")):
        found = {item.key: json.loads(item.value_json) for item in record.run.config.update}
        assert found == {"_wandb": {}, **wanted}


@pytest.mark.parametrize("tag", NAMES)
def test_wandb_has_the_values_of_both_starts(tracked: Tracked, files: list[Path], tag: str) -> None:
    values = {entry["train/global_step"]: entry[tag] for entry in history(files) if tag in entry}
    assert values == tracked.metrics(NAMES[tag])
    assert {20, 40, STEPS} <= values.keys()


def test_wandb_has_a_table_of_what_base_and_tuned_model_said(tracked: Tracked, files: list[Path]) -> None:
    columns = ["prompt", "base", "tuned"]
    logged = [entry for entry in history(files) if "samples/path" in entry]
    paths = [next(tracked.folder.glob(f"wandb/offline-run-*/files/{entry['samples/path']}")) for entry in logged]
    tables = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    wanted = tracked.lines("samples.jsonl")
    assert [entry["train/global_step"] for entry in logged] == [entry["step"] for entry in wanted]
    assert [(table["columns"], table["data"]) for table in tables] == [
        (columns, [[sample[name] for name in columns] for sample in entry["samples"]]) for entry in wanted
    ]
