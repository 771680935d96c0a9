"""A conversion reads from a file, a folder that `datasets` knows, or the Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.data.formats.sources import open_source
from finetune.errors import ConfigError, DataError
from finetune.files import ROOT

ROWS = [{"prompt": "A", "completion": "B"}, {"prompt": "C", "completion": "D"}]


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def test_a_folder_of_files_is_read_by_its_split_train(tmp_path: Path) -> None:
    lines(tmp_path / "train.jsonl", ROWS)
    lines(tmp_path / "test.jsonl", ROWS[:1])
    source = open_source(str(tmp_path))
    assert source.what == "a folder of `datasets`, split train (ignored: test)"
    assert (list(source.rows()), list(source.rows())) == ([(1, ROWS[0]), (2, ROWS[1])],) * 2


def test_a_folder_of_save_to_disk_is_read(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert list(open_source(str(tmp_path / "saved")).rows()) == [(1, ROWS[0]), (2, ROWS[1])]


def test_a_folder_without_data_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        open_source(str(tmp_path))
    assert caught.value.found.startswith(f"{tmp_path}: `datasets` cannot read this folder: ")


def test_of_several_configurations_all_are_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        lines(tmp_path / f"{name}.jsonl", ROWS)
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("a", "b"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    with pytest.raises(ConfigError) as caught:
        open_source(str(tmp_path))
    assert caught.value.problems == (
        f"{tmp_path}: `datasets` cannot read this folder: Config name is missing. Please pick one among the available "
        "configs: ['a', 'b']; name a file in it",
    )


def test_a_data_set_of_the_hub_that_cannot_be_had_is_a_config_error_with_the_way_round() -> None:
    code = "import sys; from finetune.data.formats.sources import open_source; open_source('owner/name')"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    last = done.stderr.splitlines()[-1].strip()
    assert last.startswith("owner/name: not available from the Hub: ")
    assert last.endswith(
        "; name a file, or download it first: hf download --repo-type dataset owner/name --local-dir FOLDER"
    )


@pytest.mark.parametrize("name", ["data/absent.jsonl", "absent", "/absent/name"])
def test_what_is_no_file_and_no_hub_id_is_a_config_error(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_source(name)
    assert caught.value.found.endswith("absent/name: No such file or directory" if "/name" in name else
        f"{name}: No such file or directory")  # fmt: skip


def test_an_empty_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_source(str(lines(tmp_path / "rows.jsonl", [])))
    assert str(caught.value) == f"{tmp_path / 'rows.jsonl'} is empty (0 bytes); nothing to convert"
