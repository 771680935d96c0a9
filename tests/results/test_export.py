"""How a run that fails is recorded, and what the card says of a base that lies in a folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune.config.load import load_config
from finetune.config.schema import MISTRAL, Config
from finetune.data.encode import Recipe
from finetune.data.prepare import Prepared, prepare
from finetune.errors import Diverged, OutOfResource, Stopped
from finetune.runs import receipt
from finetune.runs.folder import Run
from finetune.runs.manifest import describe, recorded, write_receipt
from finetune.runs.receipt import base_model


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path, False, None)


def test_a_failure_is_recorded_with_its_text_and_passed_on(run: Run) -> None:
    with pytest.raises(Diverged), recorded(run, {"git_commit": "abc"}):
        raise Diverged("step 3: the loss is not a finite number")
    manifest = json.loads((run.folder / "manifest.json").read_text(encoding="utf-8"))
    wanted = {"status": "failed", "error": "step 3: the loss is not a finite number", "git_commit": "abc"}
    assert manifest == wanted


def test_a_stop_is_no_failure(run: Run) -> None:
    with pytest.raises(Stopped), recorded(run, {"git_commit": "abc"}):
        raise Stopped(143, "stopped")
    manifest = json.loads((run.folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest == {"status": "interrupted", "git_commit": "abc"}


def test_whatever_a_library_says_of_a_full_disk_it_is_exit_6_with_the_free_space(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**18))
    with pytest.raises(OutOfResource) as full, recorded(run, {}):
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
    return config, prepare(config.dataset, recipe, True, tmp_path / "cache")


def test_the_receipt_lies_in_the_run_folder_and_can_be_read(run: Run, prepared: tuple[Config, Prepared]) -> None:
    write_receipt(run, *prepared)
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
