"""The manifest: what it says of the data and of each start of a run, and how an end is recorded, whatever it is."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.config.base_model import MISTRAL
from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.data.cache import Cache
from finetune.data.encode import Recipe
from finetune.data.prepare import Prepared, prepare
from finetune.errors import Diverged, OutOfResource, Stopped
from finetune.runs import receipt
from finetune.runs.folder import Run, read_manifest
from finetune.runs.manifest import Manifest, describe, fingerprint, write_config
from finetune.runs.receipt import base_model
from finetune.runs.resume import Decision, differences


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path, False, None)


def test_a_failure_is_recorded_with_its_text_and_passed_on(run: Run) -> None:
    with pytest.raises(Diverged), Manifest(run, {"git_commit": "abc"}).recorded():
        raise Diverged("step 3: the loss is not a finite number")
    manifest = read_manifest(run.folder)
    wanted = {"status": "failed", "error": "step 3: the loss is not a finite number", "git_commit": "abc"}
    assert manifest == wanted


def test_a_stop_is_no_failure(run: Run) -> None:
    with pytest.raises(Stopped), Manifest(run, {"git_commit": "abc"}).recorded():
        raise Stopped(143, "stopped")
    manifest = read_manifest(run.folder)
    assert manifest == {"status": "interrupted", "git_commit": "abc"}


def test_whatever_a_library_says_of_a_full_disk_it_is_exit_6_with_the_free_space(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**18))
    with pytest.raises(OutOfResource) as full, Manifest(run, {}).recorded():
        raise RuntimeError("PytorchStreamWriter failed writing file data/0")
    assert (full.value.exit_code, str(full.value)) == (
        6,
        f"no space left: {run.folder} has 0.2 MiB free; free some, then type the same command again",
    )


def test_a_base_in_a_folder_has_no_revision_and_keeps_its_path_to_itself(tmp_path: Path) -> None:
    folder = tmp_path / "mistral-7b"
    folder.mkdir()
    assert base_model(load_config("h100", [f"model.name={folder}"])[0]) == {"name": "mistral-7b", "revision": None}
    hub = base_model(load_config("h100")[0])
    assert hub == {"name": MISTRAL, "revision": "63a8b081895390a26e140280378bc85ec8bce07a"}


@pytest.fixture
def prepared(tmp_path: Path, conversations: Path) -> tuple[Config, Prepared]:
    config, _ = load_config("h100", [f"dataset.train_file={conversations}", "dataset.validation_file=null"])
    recipe = Recipe(None, None, max_seq_length=4096, truncation=True, certificate=False)
    return config, prepare(config.dataset, recipe, True, Cache(tmp_path / "cache"))


def test_the_receipt_lies_in_the_run_folder_and_can_be_read(run: Run, prepared: tuple[Config, Prepared]) -> None:
    write_config(run, *prepared)
    assert receipt.read(run.folder / "receipt.json") == receipt.make(*prepared)


def test_the_manifest_holds_every_count_of_the_rows(prepared: tuple[Config, Prepared]) -> None:
    known = describe(*prepared, hardware={})
    for name, counts in prepared[1].statistics.items():
        values = asdict(counts)
        for key, in_manifest in {"rows": "rows", "tokens": "total", "supervised_tokens": "supervised"}.items():
            assert values.pop(key) == known["tokens"][name][in_manifest]
        assert values.pop("bad") == known["rows"][name].pop("dropped_bad") == []
        assert values.pop("dropped_bad") == 0
        assert known["rows"][name] == values


def test_each_place_has_its_file(tmp_path: Path) -> None:
    row = '{"messages": [{"role": "user", "content": "%s"}, {"role": "assistant", "content": "Yes"}]}\n'
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    paths[0].write_text("".join(row % f"Is it {number}?" for number in range(9)))
    paths[1].write_text(row % "Is it 3?" + "{\n" + row % "Why [INST]?")

    given = f"dataset.train_file=[{paths[0]}, {{path: {paths[1]}, weight: 2}}]"
    config, _ = load_config("h100", [given, "dataset.validation_file=null", "dataset.on_bad_row=drop"])
    recipe = Recipe(None, None, max_seq_length=4096, truncation=True, certificate=False)
    both = describe(config, prepare(config.dataset, recipe, True, Cache(tmp_path / "cache")), hardware={})
    assert [(name, entry.get("weight"), entry["rows"]) for name, entry in both["data"].items()] == [
        ("train", None, 9), ("train 2", 2, 2)
    ]  # fmt: skip
    found = "not JSON: Expecting property name enclosed in double quotes at column 2"
    assert both["rows"]["train"]["dropped_bad"] == [{"file": str(paths[1]), "line": 2, "found": found}]
    places = [both["rows"][name][key] for name in both["rows"] for key in ("first_copy", "first_control_token")]
    assert sorted(filter(None, places)) == [f"{paths[1]}:1", f"{paths[1]}:3"]


def test_a_variable_that_decides_how_the_gpu_computes_may_not_change_on_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("h100", [])[0]
    prepared: Any = SimpleNamespace(tokens={}, files={}, statistics={}, chat=SimpleNamespace(fingerprint=""))
    monkeypatch.delenv("FLASH_ATTENTION_DETERMINISTIC", raising=False)
    then = fingerprint(config, prepared)
    assert describe(config, prepared, hardware={})["environment"] == {"FLASH_ATTENTION_DETERMINISTIC": "1"}
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "0")
    now = fingerprint(config, prepared)
    assert describe(config, prepared, hardware={})["environment"] == {"FLASH_ATTENTION_DETERMINISTIC": "0"}
    assert list(differences(then, now)) == ["FLASH_ATTENTION_DETERMINISTIC: 1 -> 0"]


# --- the starts of a run


AGO = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
OPEN = {"started": "2026-03-01T12:00:00+00:00", "from_step": 4, "ended": None, "step": None, "end": None}


def begin(folder: Path, from_step: int, *more: Any) -> list[dict[str, Any]]:
    """The starts that the manifest names once one begins from this step."""
    changes, set_aside, rehearsal = more or ((), (), None)
    checkpoint = folder / f"checkpoint-{from_step}" if from_step else None
    decision = Decision(folder, checkpoint, changes, (), False, None, None, None, ())
    manifest = Manifest(Run(folder, False, None), {})
    manifest.started(decision, set_aside, {"checkpointed_layers": 2}, rehearsal)
    assert (manifest.content["checkpointed_layers"], read_manifest(folder)["status"]) == (2, "interrupted")
    starts: list[dict[str, Any]] = read_manifest(folder)["starts"]
    return starts


def end(folder: Path, start: dict[str, Any], error: Exception | None) -> dict[str, Any]:
    """The start as the manifest names it once it has ended."""
    manifest = Manifest(Run(folder, False, None), {"starts": [start]})
    if error is None:
        manifest.complete()
    else:
        manifest.ended(error)
    (ended,) = read_manifest(folder)["starts"]
    assert ended.keys() == start.keys()
    return dict(ended)


def leave(folder: Path, starts: list[dict[str, Any]], *metrics: dict[str, Any]) -> None:
    (folder / "manifest.json").write_text(json.dumps({"starts": starts}), encoding="utf-8")
    lines = "".join(json.dumps(entry) + "\n" for entry in metrics)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")


def test_a_first_start_is_open_and_begins_now(tmp_path: Path) -> None:
    (start,) = begin(tmp_path, 0)
    assert abs(datetime.fromisoformat(start.pop("started")).timestamp() - time.time()) < 5
    nothing = {"changed": [], "set_aside": [], "rehearsal": None}
    assert start == {"from_step": 0, "ended": None, "step": None, "end": None, **nothing}


def test_a_start_says_what_it_accepted_what_it_set_aside_and_what_it_rehearsed(tmp_path: Path) -> None:
    (start,) = begin(tmp_path, 4, ("lora.r: 16 -> 8",), ("checkpoint-6 is damaged",), {"hours": 2.5})
    assert (start["changed"], start["set_aside"]) == (["lora.r: 16 -> 8"], ["checkpoint-6 is damaged"])
    assert start["rehearsal"] == {"hours": 2.5}


def test_a_start_whose_memory_ran_out_says_when_and_how_many_layers_it_checkpoints_now(tmp_path: Path) -> None:
    (start,) = begin(tmp_path, 4)
    manifest = Manifest(Run(tmp_path, False, None), {"checkpointed_layers": 2, "starts": [start]})
    for layers, sentence in ((17, "17 from step 5 on"), (25, "25 from step 9 on")):
        manifest.memory_ran_out(layers, sentence)
        found = read_manifest(tmp_path)
        assert (found["status"], found["checkpointed_layers"]) == ("interrupted", layers)
    assert found["starts"] == [{**start, "out_of_memory": ["17 from step 5 on", "25 from step 9 on"]}]


def test_a_start_that_never_wrote_its_end_was_killed_after_its_last_line(tmp_path: Path) -> None:
    seconds = AGO.timestamp()
    leave(tmp_path, [OPEN], {"step": 9, "time": seconds - 60}, {"step": 5, "time": seconds + 30})
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"step": 6, "ti')  # the line in which it was killed
    killed, now = begin(tmp_path, 4)
    assert killed == {**OPEN, "ended": "2026-03-01T12:00:30+00:00", "step": 5, "end": "killed"}
    assert (now["from_step"], now["end"]) == (4, None)


def test_a_start_that_was_killed_before_its_first_line_ended_nobody_knows_when(tmp_path: Path) -> None:
    leave(tmp_path, [OPEN], {"step": 9, "time": AGO.timestamp() - 60})  # another start's
    assert begin(tmp_path, 4)[0] == {**OPEN, "ended": None, "step": 4, "end": "killed"}


def test_a_start_that_ended_is_kept_as_it_is(tmp_path: Path) -> None:
    ended = {**OPEN, "ended": "2026-03-01T13:00:00+00:00", "step": 7, "end": "stopped"}
    leave(tmp_path, [ended])
    assert begin(tmp_path, 7)[0] == ended


@pytest.mark.parametrize(
    ("error", "how"),
    [
        (None, "complete"),
        (Stopped(143, "stopped by SIGTERM"), "stopped"),
        (Stopped(6, "time budget of 1 h used up"), "time budget"),
        (Diverged("the loss is not a finite number"), "failed"),
    ],
)
def test_a_start_ends_at_its_last_step_that_was_logged_or_saved(
    tmp_path: Path, error: Exception | None, how: str
) -> None:
    (start,) = begin(tmp_path, 2)
    leave(tmp_path, [start], {"step": 6, "time": time.time()})
    ended = end(tmp_path, start, error)
    assert (ended["step"], ended["end"]) == (6, how)
    (tmp_path / "checkpoints" / "checkpoint-8").mkdir(parents=True)
    (tmp_path / "checkpoints" / "checkpoint-8.partial").mkdir()
    ended = end(tmp_path, start, error)
    assert (ended["step"], ended["started"] <= ended["ended"]) == (8, True)
