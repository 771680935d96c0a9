"""Time and tokens of all starts of a run."""

from __future__ import annotations

import json
import shutil
import time
from itertools import accumulate
from pathlib import Path

import pytest

from finetune.training.progress import Progress
from support.training import Case
from support.whole_trainings import BETWEEN


def test_seconds_and_speed_are_of_all_starts_of_a_run(
    case: Case, tiny_mistral: Path, conversations: Path, tmp_path: Path
) -> None:
    whole, _, _ = case.train(*BETWEEN, "training.save_minutes=0.00001", "training.save_total_limit=10")
    assert whole.tokens_per_second * whole.seconds > (tokens := case.metrics()[-2]["num_tokens"])
    later = Case(tiny_mistral, conversations, tmp_path / "later", case.tokenizer)
    for name in ("checkpoint-3", "best"):
        shutil.copytree(case.run.checkpoints / name, later.run.checkpoints / name)
    path = later.run.checkpoints / "checkpoint-3" / "trainer_state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    state["stateful_callbacks"]["Sums"]["attributes"] |= {"seconds": 1000.0, "step_seconds": 500.0}
    path.write_text(json.dumps(state), encoding="utf-8")
    started = time.monotonic()
    outcome, _, _ = later.train(*BETWEEN, checkpoint=path.parent)
    assert 1000 < outcome.seconds < 1000 + time.monotonic() - started
    assert outcome.tokens_per_second == pytest.approx(tokens / 500, rel=0.01)  # the fourth step takes milliseconds
    assert later.metrics()[-2]["num_tokens"] == tokens


def test_micro_batches_are_shown_with_the_tokens_of_the_step_so_far(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=4")
    settings = (*settings, "training.max_steps=2", "training.logging_steps=1")
    shown: list[tuple[int, int, int]] = []
    monkeypatch.setattr(
        Progress, "micro_batch", lambda _, state, count, tokens: shown.append((state.global_step, count, tokens))
    )
    batches = [batch["input_ids"].numel() for batch in case.trainer(*settings).get_train_dataloader()]
    case.train(*settings)
    first, second = accumulate(batches[:3]), accumulate(batches[4:7])
    assert shown == [*((0, 4, tokens) for tokens in first), *((1, 4, tokens) for tokens in second)]
