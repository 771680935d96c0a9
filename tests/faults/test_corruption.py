"""A checkpoint or best adapter of which any byte is not what was saved is set aside, and the run ends right."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from finetune.errors import CheckFailed
from finetune.files import SEAL, read_seal
from finetune.model.hub import weights_digest
from finetune.runs.folder import Run
from finetune.runs.resume import apply, decide
from finetune.terminal import Terminal
from support.harness import COUNTS, NIGHTLY, Command, Warm, Whole, differences, names, result

FLIPS = 400 if NIGHTLY else 20  # bytes flipped in each file, spread over it
CHANGED = "is not what was saved (sha256 differs)"
Damage = Callable[[Path], None]


def cut_in_half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def append_a_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def remove(path: Path) -> None:
    path.unlink()


def flip(place: int) -> Damage:
    def flip_a_bit(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)

    return flip_a_bit


def damages(path: Path) -> Iterator[tuple[str, Damage]]:
    """(what is said of it, the damage), for a file that a seal names."""
    for damage in (cut_in_half, empty, append_a_byte):
        yield CHANGED, damage
    yield "is missing", remove
    size = path.stat().st_size
    for place in sorted({number * (size - 1) // FLIPS for number in range(FLIPS + 1)}):
        yield CHANGED, flip(place)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != SEAL)


class Copy:
    """A copy of the stopped run's checkpoints, of which one file is damaged and made whole again."""

    def __init__(self, stopped: Command, folder: Path) -> None:
        self.source, self.run = stopped.checkpoints, Run(folder / "run", False, None)
        self.fingerprint = read_seal(stopped.checkpoints / "checkpoint-4")["fingerprint"]
        self.run.folder.mkdir()
        shutil.copytree(self.source, self.run.checkpoints)

    def found(self, damaged: Path) -> tuple[str | None, list[str]]:
        """The checkpoint that a start would resume from, and what it says first; then all is made whole again."""
        said = io.StringIO()
        try:
            decision = decide(self.run.checkpoints, self.fingerprint)
            apply(decision, False, Terminal(False, said))
        finally:
            shutil.rmtree(self.run.checkpoints)
            shutil.copytree(self.source, self.run.checkpoints)
        COUNTS["damaged"] += 1
        COUNTS["used"] += decision.checkpoint == damaged
        return decision.checkpoint and decision.checkpoint.name, said.getvalue().splitlines()


@pytest.fixture
def copy(stopped: Command, tmp_path: Path) -> Copy:
    return Copy(stopped, tmp_path)


def test_damage_in_any_file_of_a_checkpoint_sets_it_aside_and_the_one_before_it_is_used(copy: Copy) -> None:
    folder = copy.run.checkpoints / "checkpoint-4"
    assert len(files(folder)) == 7
    wrong = []
    for name in files(folder):
        for text, damage in damages(folder / name):
            damage(folder / name)
            answer = copy.found(folder)
            aside = f"warning: checkpoint-4 is damaged ({name} {text}); set aside as damaged-checkpoint-4.1"
            goes_on = "resume: from checkpoint-2, the newest intact checkpoint"
            if answer != ("checkpoint-2", [aside, goes_on]):
                wrong.append((name, damage.__name__, answer))
    assert wrong == []


def test_damage_in_any_file_of_the_best_adapter_sets_it_aside(copy: Copy) -> None:
    folder = copy.run.checkpoints / "best"
    assert files(folder) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    wrong = []
    for name in files(folder):
        for text, damage in damages(folder / name):
            damage(folder / name)
            answer = copy.found(folder)[1]
            aside = f"warning: the best adapter so far is not used ({name} {text}); set aside as damaged-best.1"
            if aside not in answer:
                wrong.append((name, damage.__name__, answer))
    assert wrong == []


@pytest.mark.parametrize("name", ["checkpoint-4", "best"])
def test_a_seal_with_any_byte_changed_says_the_same_or_is_refused(copy: Copy, name: str) -> None:
    """The facts in it decide too: an eval_loss that changed would make another adapter the best."""
    seal = copy.run.checkpoints / name / SEAL
    content, facts = seal.read_bytes(), read_seal(seal.parent)
    believed = []
    for place in range(0, len(content), 1 if NIGHTLY else 11):
        changed = bytearray(content)
        changed[place] ^= 1
        seal.write_bytes(changed)
        COUNTS["damaged"] += 1
        with suppress(ValueError):
            if read_seal(seal.parent) != facts:
                believed.append(bytes(changed[max(0, place - 30) : place + 10]))
    COUNTS["used"] += len(believed)
    assert believed == []


def test_where_a_checkpoint_lost_its_seal_or_gained_a_file_the_one_before_it_is_used(copy: Copy) -> None:
    folder = copy.run.checkpoints / "checkpoint-4"
    (folder / SEAL).unlink()
    reason = f"no {SEAL}: its save was not finished"
    said = f"warning: checkpoint-4 is damaged ({reason}); set aside as damaged-checkpoint-4.1"
    assert copy.found(folder)[1][0] == said
    (folder / "more.bin").write_bytes(b"")
    reason = "more.bin was not there when it was saved"
    said = f"warning: checkpoint-4 is damaged ({reason}); set aside as damaged-checkpoint-4.1"
    assert copy.found(folder)[1][0] == said


def test_where_every_checkpoint_is_damaged_the_run_is_refused_and_nothing_is_deleted(copy: Copy) -> None:
    for step in (2, 4):
        flip(100)(copy.run.checkpoints / f"checkpoint-{step}" / "optimizer.pt")
    with pytest.raises(CheckFailed) as refused:
        apply(decide(copy.run.checkpoints, copy.fingerprint), False, Terminal(False, io.StringIO()))
    assert str(refused.value) == f"no checkpoint in {copy.run.checkpoints} is intact; --fresh starts a new run"
    assert names(copy.run.checkpoints) == {"best", "damaged-checkpoint-2.1", "damaged-checkpoint-4.1"}


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param("checkpoint-4/rng_state.pth", remove, marks=pytest.mark.slow),
        ("checkpoint-4/scheduler.pt", cut_in_half),
        pytest.param("checkpoint-4/adapter_model.safetensors", flip(5000), marks=pytest.mark.slow),
    ],
    ids=["generator state removed", "scheduler cut in half", "one bit of the adapter"],
)
def test_a_run_with_a_damaged_checkpoint_ends_with_the_bits_of_one_without(
    warm: Warm, whole: Whole, stopped: Command, tmp_path: Path, name: str, damage: Damage
) -> None:
    command = stopped.elsewhere(tmp_path / "output")
    damage(command.checkpoints / name)
    ended = warm(command)
    assert ended.code == 0, ended.text
    assert "resume: from checkpoint-2, the newest intact checkpoint" in ended.text.splitlines()
    assert differences(command, whole.result) == []


def test_a_start_that_sets_a_checkpoint_aside_writes_so_into_the_manifest(
    warm: Warm, stopped: Command, tmp_path: Path
) -> None:
    command = stopped.elsewhere(tmp_path / "output")
    cut_in_half(command.checkpoints / "checkpoint-4" / "scheduler.pt")
    ended = warm(command)
    assert ended.code == 0, ended.text
    first, second = json.loads((command.folder / "manifest.json").read_text(encoding="utf-8"))["starts"]
    aside = f"checkpoint-4 is damaged (scheduler.pt {CHANGED}); set aside as damaged-checkpoint-4.1"
    assert (first["set_aside"], second["set_aside"], second["changed"]) == ([], [aside], [])
    assert aside in (command.folder / "report.html").read_text(encoding="utf-8")


# --- the base


def test_where_the_base_has_other_weights_than_before_the_run_is_refused(
    warm: Warm, whole: Whole, stopped: Command, tmp_path: Path
) -> None:
    command = replace(stopped, base=tmp_path / "base", output=tmp_path / "output")
    shutil.copytree(stopped.base, command.base)
    sealed = ["rename", *(f"run/checkpoints/checkpoint-4/{name}" for name in ("sha256.json.partial", "sha256.json"))]
    assert warm(command, point=whole.points.index(sealed) + 2).code < 0
    before = weights_digest(command.base)
    weights = load_file(command.base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] += 0.001
    save_file(weights, command.base / "model.safetensors", metadata={"format": "pt"})
    ended = warm(command)
    assert (ended.code, ended.text.splitlines()[-3:]) == (
        2,
        [
            "config: 1 problem",
            f"  changed since checkpoint-4: base_weights: {before} -> {weights_digest(command.base)}",
            "--fresh starts a new run, --resume-changed resumes anyway",
        ],
    )
    assert names(command.checkpoints) == {"best", "checkpoint-2", "checkpoint-4"}


# --- the best adapter, where a later one is worse


OTHER_REPLIES = ("0 0 0 0 0 0 0", "Yes.")  # what the training at first makes likelier with all else, and then forgets


def remove_all(folder: Path) -> None:
    shutil.rmtree(folder)


def cut_the_adapter(folder: Path) -> None:
    cut_in_half(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def worsening(warm: Warm, whole: Whole, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """A finished run whose later adapters are worse than that of step 2, since it is validated on other replies."""
    folder = tmp_path_factory.mktemp("worse")
    with (folder / "validation.jsonl").open("w", encoding="utf-8") as stream:
        for number in range(8):
            question = {"role": "user", "content": f"What comes after {number}?"}
            reply = {"role": "assistant", "content": OTHER_REPLIES[number % 2]}
            stream.write(json.dumps({"messages": [question, reply]}) + "\n")
    command = whole.command.at(
        folder / "output",
        f"dataset.validation_file={folder / 'validation.jsonl'}",
        "training.learning_rate=0.002",
        "training.lr_scheduler_type=constant",
        "training.warmup_ratio=0",
    )
    ended = warm(command)
    assert ended.code == 0, ended.text
    losses = [entry["eval_loss"] for entry in result(command)["metrics"] if "eval_loss" in entry]
    # Far apart, so that step 2 is the best on every machine: processors round differently.
    assert [number for number, loss in enumerate(losses) if loss < min(losses) + 0.02] == [1], losses
    return command


@pytest.mark.parametrize("damage", [cut_the_adapter, remove_all])
def test_where_the_best_adapter_is_damaged_or_gone_no_worse_one_becomes_the_result(
    warm: Warm, worsening: Command, tmp_path: Path, damage: Damage
) -> None:
    command = worsening.elsewhere(tmp_path / "output")
    shutil.rmtree(command.checkpoints / "checkpoint-6")
    (command.folder / "manifest.json").write_text('{"status": "interrupted"}', encoding="utf-8")
    damage(command.checkpoints / "best")
    ended = warm(command)
    assert ended.code == 0, ended.text
    assert differences(command, result(worsening)) == []
