"""Verdicts on a run: what was trained, whether it helped, whether it is safe, how to resume."""

from __future__ import annotations

import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest

from finetune.cli import PYTHON
from finetune.config.base_model import MISTRAL
from finetune.results.report import run_summary, verdicts
from finetune.results.report.verdicts import Verdict
from support.run_folders import PASSED, make_run, manifest, rows, start, without_end

UNTESTED = "No check tests whether its answers are true or harmless."


def of(folder: Path, content: dict[str, Any], steps: int = 40) -> run_summary.Evidence:
    return run_summary.read(make_run(folder / "run", content, steps))


def told(answer: Verdict | None) -> tuple[Any, ...]:
    assert answer is not None
    return astuple(answer)[1:]


def test_a_run_that_helped_says_by_how_much_and_that_it_got_worse_afterwards(tmp_path: Path) -> None:
    run = of(tmp_path, manifest())
    assert verdicts.unfinished(run) is None
    assert told(verdicts.trained(run)) == (
        f"A LoRA adapter for {MISTRAL}",
        "plain",
        ["100 conversations; loss is computed on 12,000 answer tokens.", "40 optimizer steps."],
    )
    held_out = "(nats per token, on 10 conversations not used for training)"
    assert told(verdicts.helped(run)) == (
        "Yes: 38% less held-out loss",
        "good",
        [
            f"Held-out loss 4.000 before, 2.500 at step 30 {held_out}.",
            "It rose again, to 2.600 at step 40: longer training only memorizes the rows.",
            "This measures how well it predicts such answers, not whether they are right: read the ones below.",
        ],
    )
    assert told(verdicts.safe(run)) == (
        "Yes, as far as tested",
        "good",
        ["Its self-test passed: 1 check, listed below.", UNTESTED],
    )


def test_a_run_whose_best_adapter_is_the_untrained_one_did_not_help(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", manifest(best_step=0, eval_loss=4.0))
    lines = [{"step": 0, "eval_loss": 4.0}, {"step": 10, "eval_loss": 4.1}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    short, tone, more = told(verdicts.helped(run_summary.read(folder)))
    assert (short, tone) == ("No", "bad")
    assert more[1] == "No evaluation was better than the one before training: the adapter is the untrained one."


def test_with_a_single_evaluation_it_is_not_known_whether_it_helped(tmp_path: Path) -> None:
    run = of(tmp_path, without_end("interrupted", start((0, 5), (0, 5), "stopped")), steps=5)
    wanted = ("Not known yet", "warn", ["There is no evaluation after the first step yet."])
    assert told(verdicts.helped(run)) == wanted


def test_an_adapter_that_was_not_tested_or_failed_is_not_called_safe(tmp_path: Path) -> None:
    untested = manifest()
    del untested["self_test"]
    run = of(tmp_path / "a", untested)
    assert told(verdicts.safe(run)) == ("Not tested", "warn", ["The adapter's self-test was not run."])
    wrong = {"name": "finite", "status": "fail", "detail": "2 of 28 tensors are not"}
    failed = {"status": "fail", "checks": [*PASSED["checks"], wrong]}  # type: ignore[misc]
    run = of(tmp_path / "b", without_end("failed", self_test=failed, error="the self-test failed"))
    assert told(verdicts.safe(run)) == ("No: its self-test failed", "bad", ["finite: 2 of 28 tensors are not"])


def test_an_adapter_whose_self_test_warns_is_safe_with_a_warning(tmp_path: Path) -> None:
    ran_on = {"name": "answers_end", "status": "warn", "detail": "1 of 4 answers have no </s>"}
    warned = {"status": "warn", "checks": [*PASSED["checks"], ran_on]}  # type: ignore[misc]
    assert told(verdicts.safe(of(tmp_path, manifest(self_test=warned)))) == (
        "Yes, with a warning",
        "warn",
        [
            "Its self-test has 1 warning in 2 checks, listed below.",
            "answers_end: 1 of 4 answers have no </s>",
            UNTESTED,
        ],
    )


def test_skipped_checks_and_leaks_are_in_the_verdict(tmp_path: Path) -> None:
    found = {"train": rows(100, certified=0), "validation": rows(10, certified=0, normalized_leaks=2, opening_leaks=1)}
    run = of(tmp_path, manifest(rows=found, skipped_checks=["host.memory", "rehearsal"]))
    assert told(verdicts.safe(run)) == (
        "Yes, with these notes",
        "good",
        [
            "Its self-test passed: 1 check, listed below.",
            "Checks skipped with --skip: host.memory, rehearsal.",
            "2 held-out conversations also in the training data (ignoring case and spacing): the loss is optimistic.",
            "The training data has the opening of 1 held-out conversation: the loss is optimistic.",
            "Tokens were not compared with mistral-common: the base is not Mistral's, or the check is off.",
            UNTESTED,
        ],
    )


@pytest.mark.parametrize(
    ("end", "how"),
    [
        ("stopped", "It was stopped at step 25 of 40."),
        ("time budget", "Its time budget was used up at step 25 of 40."),
        (None, "It is still training, or was killed; its last record is from step 25 of 40."),
    ],
)
def test_an_interrupted_run_says_how_it_ended_and_how_to_resume(tmp_path: Path, end: str | None, how: str) -> None:
    minutes, steps = ((0, None), (0, None)) if end is None else ((0, 20), (0, 25))
    run = of(tmp_path, without_end("interrupted", start(minutes, steps, end)), steps=25)
    go_on = f"{PYTHON} src/train.py --config {tmp_path}/run/config.yaml"
    assert told(verdicts.unfinished(run)) == (
        how,
        "warn",
        [
            "There is no final adapter yet. To resume from the newest checkpoint, "
            f"repeat the command (without --fresh) or run: {go_on}"
        ],
    )
    assert told(verdicts.safe(run)) == ("There is no final adapter", "warn", [])


def test_a_failed_run_says_its_error_first(tmp_path: Path) -> None:
    error = "step 3: the loss is not a finite number on rows train.jsonl:7; lower training.learning_rate"
    run = of(tmp_path, without_end("failed", start((0, 2), (0, 3), "failed"), error=error), steps=2)
    again = f"Fix it, then run: {PYTHON} src/train.py --config {tmp_path}/run/config.yaml"
    assert verdicts.unfinished(run) == Verdict("This run failed", "At step 3 of 40.", "bad", [error, again])
