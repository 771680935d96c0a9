"""Two runs on one page."""

from __future__ import annotations

from pathlib import Path

from finetune.results.report import page as report_page
from support.pages import Reader
from support.run_folders import SAMPLES, make_run, manifest


def test_two_runs_share_their_charts_and_the_keys_that_differ_are_listed(complete: Path, tmp_path: Path) -> None:
    other = make_run(
        tmp_path / "warm", manifest(best_step=20, eval_loss=2.7), settings=("training.learning_rate=1e-4",)
    )
    path = report_page.write_comparison(complete, other)
    assert path == complete / "compare-warm.html"
    page = Reader(path)
    assert page.order("run and warm", "Which did better?", "run Best held-out loss 2.5000 against 2.7000 of warm")
    assert page.order("Config keys that differ", "training.learning_rate 0.0002 0.0001", "Tuned answers")
    assert page.order(SAMPLES[0]["prompt"], "run Keeper's log: boil it.", "warm Keeper's log: boil it.")
    assert path.read_text(encoding="utf-8").count("<svg") == 4


def test_losses_on_different_held_out_rows_are_not_compared(complete: Path, tmp_path: Path) -> None:
    content = manifest()
    content["tokens"]["validation"]["input_ids"] = "00" * 32
    page = Reader(report_page.write_comparison(complete, make_run(tmp_path / "other", content)))
    assert "Not comparable They were evaluated on different held-out rows" in page.text
