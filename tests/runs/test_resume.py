"""Where a start resumes: the decision changes nothing; applied, it sets aside what cannot be used."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import CheckFailed, ConfigError
from finetune.files import read_seal, seal, write_json
from finetune.runs.checkpoints import replace_best, saved
from finetune.runs.resume import apply, decide, refuse_changes
from finetune.terminal import Terminal
from support.as_nobody import as_nobody
from support.sealed import (
    ADAPTER,
    CHANGED,
    FINGERPRINT,
    NO_SEAL,
    checkpoint,
    content,
    every_damage,
    flip_a_byte,
    names,
    remove_the_seal,
    truncate,
    unsealed,
)


def best(checkpoints: Path, fingerprint: dict[str, Any] = FINGERPRINT) -> Path:
    folder = checkpoints / "best"
    folder.mkdir(parents=True)
    (folder / "adapter.bin").write_bytes(b"weights")
    seal(folder, {"step": 3, "eval_loss": 1.0, "fingerprint": fingerprint})
    return folder


def resumed(checkpoints: Path, fingerprint: Any = FINGERPRINT, accept: bool = False) -> tuple[Path | None, list[str]]:
    """The checkpoint that a start resumes from, and what it set aside; deciding so has changed nothing."""
    before = content(checkpoints)
    decision = decide(checkpoints, fingerprint)
    assert content(checkpoints) == before
    return decision.checkpoint, apply(decision, accept, Terminal(stream=StringIO()))


# --- the newest whole one


@every_damage
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_taken(
    tmp_path: Path, damage: Callable[[Path], None], text: str
) -> None:
    best(tmp_path)
    whole, newest = checkpoint(tmp_path, 8), checkpoint(tmp_path, 10)
    damage(newest)
    kept = content(newest)
    note = f"checkpoint-10 is damaged ({text}); set aside as damaged-checkpoint-10.1"
    assert resumed(tmp_path) == (whole, [note])
    assert names(tmp_path) == ["best", "checkpoint-8", "damaged-checkpoint-10.1"]
    assert content(tmp_path / "damaged-checkpoint-10.1") == kept


@pytest.mark.parametrize("closed", [ADAPTER, "sha256.json", "."])
def test_a_checkpoint_without_the_right_to_read_it_is_refused_and_not_called_damaged(closed: str) -> None:
    with tempfile.TemporaryDirectory(prefix="closed-") as made:
        Path(made).chmod(0o755)  # nobody must reach the checkpoint
        best(Path(made))
        checkpoint(Path(made), 8)
        newest = checkpoint(Path(made), 10)
        assert decide(Path(made), FINGERPRINT).checkpoint == newest
        (newest / closed).chmod(0)
        with as_nobody(), pytest.raises(CheckFailed) as caught:
            decide(Path(made), FINGERPRINT)
        path = newest / ("sha256.json" if closed == "." else closed)
        assert caught.value.found == f"{path} cannot be read: Permission denied"
        assert caught.value.fix == f"sudo chown -R $(id -u) {newest} makes it yours; --fresh starts a new run"
        newest.chmod(0o755)


def test_newest_means_the_highest_step_and_older_damage_is_left_alone(tmp_path: Path) -> None:
    best(tmp_path)
    for step in (2, 10, 9):
        checkpoint(tmp_path, step)
    flip_a_byte(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-abc").mkdir()
    assert resumed(tmp_path) == (tmp_path / "checkpoint-10", [])
    assert names(tmp_path) == ["best", "checkpoint-10", "checkpoint-2", "checkpoint-9", "checkpoint-abc"]
    assert saved(tmp_path) == [tmp_path / f"checkpoint-{step}" for step in (2, 9, 10)]


def test_where_none_is_whole_all_are_set_aside_newest_first_and_the_start_is_refused(tmp_path: Path) -> None:
    truncate(checkpoint(tmp_path, 2))
    remove_the_seal(checkpoint(tmp_path, 4))
    said = StringIO()
    for warnings in (
        f"warning: checkpoint-4 is damaged ({NO_SEAL}); set aside as damaged-checkpoint-4.1\n"
        f"warning: checkpoint-2 is damaged ({CHANGED}); set aside as damaged-checkpoint-2.1\n",
        "",  # the same command again: what was set aside is refused, too
    ):
        with pytest.raises(CheckFailed, match=r"is intact; --fresh starts a new run$"):
            apply(decide(tmp_path, FINGERPRINT), False, Terminal(stream=said))
        assert said.getvalue() == warnings
        assert names(tmp_path) == ["damaged-checkpoint-2.1", "damaged-checkpoint-4.1"]
        said = StringIO()


def test_a_run_that_was_killed_in_its_first_save_begins_again_and_nothing_is_overwritten(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        unsealed(tmp_path, 4)
        note = f"checkpoint-4 is damaged ({NO_SEAL}); set aside as damaged-checkpoint-4.{number}"
        assert resumed(tmp_path) == (None, [note])
    assert names(tmp_path) == [f"damaged-checkpoint-4.{number}" for number in (1, 2, 3)]


def test_an_empty_or_absent_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert resumed(tmp_path) == (None, [])
    assert resumed(tmp_path / "absent") == (None, [])


# --- what changed since


def test_a_start_is_refused_early_only_if_no_checkpoint_has_its_fingerprint(tmp_path: Path) -> None:
    refuse_changes(tmp_path, FINGERPRINT)
    older, newer = checkpoint(tmp_path, 4), checkpoint(tmp_path, 8)
    seal(newer, {"step": 8, "fingerprint": {"lr": 0.3}})
    refuse_changes(tmp_path, FINGERPRINT)
    with pytest.raises(ConfigError) as refused:
        refuse_changes(tmp_path, {"lr": 0.2})
    assert str(refused.value) == (
        "config: 1 problem\n  changed since checkpoint-8: lr: 0.3 -> 0.2\n"
        "--fresh starts a new run, --resume-changed resumes anyway"
    )
    (older / "sha256.json").write_text("{}", encoding="utf-8")
    refuse_changes(tmp_path, {"lr": 0.2})  # a damaged seal is left to `decide`


def test_a_change_is_refused_unless_it_is_accepted_and_then_the_best_adapter_is_not_used(tmp_path: Path) -> None:
    best(tmp_path)
    checkpoint(tmp_path, 4)
    change = "lr: 0.1 -> 0.2"
    with pytest.raises(ConfigError) as refused:
        resumed(tmp_path, {"lr": 0.2})
    assert refused.value.problems == (f"changed since checkpoint-4: {change}",)
    assert names(tmp_path) == ["best", "checkpoint-4"]
    assert decide(tmp_path, {"lr": 0.2}).changes == (change,)
    assert resumed(tmp_path, {"lr": 0.2}, accept=True) == (tmp_path / "checkpoint-4", [OTHER])
    assert names(tmp_path) == ["checkpoint-4", "damaged-best.1"]


# --- the best adapter so far


OTHER = "the best adapter so far is not used (trained with another config or data); set aside as damaged-best.1"


def test_the_best_adapter_of_another_config_or_data_is_set_aside(tmp_path: Path) -> None:
    best(tmp_path, {"lr": 0.2})
    assert resumed(tmp_path) == (None, [OTHER])
    assert names(tmp_path) == ["damaged-best.1"]


def test_a_damaged_best_adapter_is_set_aside(tmp_path: Path) -> None:
    (best(tmp_path) / "adapter.bin").write_bytes(b"w")
    text = "adapter.bin is not what was saved (sha256 differs)"
    assert resumed(tmp_path)[1] == [f"the best adapter so far is not used ({text}); set aside as damaged-best.1"]


def test_a_lost_best_adapter_is_trained_again_from_the_checkpoint_before_it(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        losses = [{"step": 4, "eval_loss": 1.0}, {"step": 6, "eval_loss": 2.0}]
        write_json(unsealed(tmp_path, step) / "trainer_state.json", {"log_history": losses[: step // 2]})
        seal(tmp_path / f"checkpoint-{step}", {"step": step, "fingerprint": FINGERPRINT})
    flip_a_byte(tmp_path / "checkpoint-6")
    again = "the best adapter, of step 4, is made again"
    wanted = [
        f"checkpoint-6 is damaged ({CHANGED}); set aside as damaged-checkpoint-6.1",
        f"checkpoint-8 set aside as damaged-checkpoint-8.1: {again}",
        f"checkpoint-4 set aside as damaged-checkpoint-4.1: {again}",
    ]
    assert resumed(tmp_path) == (tmp_path / "checkpoint-2", wanted)
    shutil.rmtree(tmp_path / "damaged-checkpoint-6.1")
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert resumed(tmp_path) == (None, [])


@pytest.mark.parametrize("moment", ["before the first rename", "between the renames", "before the old one is removed"])
def test_a_kill_while_the_best_adapter_is_replaced_leaves_a_whole_one(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    best(tmp_path)
    better = tmp_path / "best.partial"
    better.mkdir()
    seal(better, {"step": 9, "eval_loss": 0.5, "fingerprint": FINGERPRINT})
    calls = {"before the first rename": 1, "between the renames": 2}
    renames, rename = [], Path.rename

    def killed(self: Path, target: Path) -> Path:
        renames.append(target)
        if len(renames) == calls.get(moment):
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        if moment in calls:
            with pytest.raises(KeyboardInterrupt):
                replace_best(tmp_path, better)
        else:
            replace_best(tmp_path, better)
            (tmp_path / "best.old").mkdir()
    assert resumed(tmp_path) == (None, [])
    assert read_seal(tmp_path / "best")["step"] == (3 if moment == "before the first rename" else 9)
    assert names(tmp_path) == ["best"]
