"""Reading a run's folder, and the message for a folder that is not a run's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from finetune.errors import ConfigError
from finetune.results.report import run_summary
from support.run_folders import SAMPLES, make_run, without_end


def test_an_incomplete_run_has_the_answers_of_its_newest_best_step(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", without_end("interrupted"))
    assert run_summary.read(folder).answers == []
    lines = [{"step": step, "eval_loss": 2.0, "samples": SAMPLES[:count]} for step, count in ((10, 2), (20, 1))]
    cut = '{"step": 30, "sam'  # a kill came in the middle of a line
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + cut, encoding="utf-8")
    assert run_summary.read(folder).answers == SAMPLES[:1]


@pytest.mark.parametrize(
    ("manifest_text", "problem"),
    [
        (None, r"\S+/run: no manifest.json in it; name a run's folder, such as adapters/RUN"),
        ("{", r"\S+/run/manifest.json: cannot be read \(Expecting property name .+\)"),
        ("[]", r"\S+/run/manifest.json: found list, expected an object"),
    ],
)
def test_a_folder_that_is_not_a_runs_gives_one_message(tmp_path: Path, manifest_text: str | None, problem: str) -> None:
    (tmp_path / "run").mkdir()
    if manifest_text:
        (tmp_path / "run" / "manifest.json").write_text(manifest_text, encoding="utf-8")
    with pytest.raises(ConfigError) as wrong:
        run_summary.read(tmp_path / "run")
    (found,) = wrong.value.problems
    assert re.fullmatch(problem, found)
