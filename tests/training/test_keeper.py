"""What the keeper keeps: the best adapter at once, and checkpoints sealed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl

from finetune import files
from finetune.errors import DiskFull
from finetune.files import read_seal, sha256
from finetune.runs.checkpoints import saved
from finetune.runs.folder import Run
from finetune.training.keeper import Keeper
from support.training import FACTS


class Adapter:
    """Saves its text where a PeftModel would save its weights."""

    def __init__(self, text: str) -> None:
        self.text = text

    def parameters(self) -> list[Any]:
        return []

    def save_pretrained(self, folder: Path, save_embedding_layers: bool) -> None:
        assert save_embedding_layers is False  # PEFT would ask the Hub
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_text(self.text)


def evaluated(keeper: Keeper, step: int, loss: float, stopping: bool = False) -> Any:
    """What the keeper makes of control after an evaluation."""
    control = SimpleNamespace(should_save=False, should_training_stop=stopping)
    state = SimpleNamespace(global_step=step)
    keeper.on_evaluate(None, state, control, {"eval_loss": loss}, model=Adapter(f"weights of step {step}"))
    return control


@pytest.fixture
def keeper(tmp_path: Path) -> Keeper:
    run = Run(tmp_path / "run", False, None)
    run.checkpoints.mkdir(parents=True)
    return Keeper(run, FACTS, 3)


def test_the_best_adapter_is_kept_at_once_also_between_two_saves(keeper: Keeper) -> None:
    assert keeper.best is None
    seen = []
    for step, loss in {0: 3.0, 100: 2.0, 200: 2.5, 300: 2.0, 400: 1.5, 500: 1.6}.items():
        evaluated(keeper, step, loss)
        best = keeper.run.checkpoints / "best"
        facts = read_seal(best)
        assert (best / "adapter_model.safetensors").read_text() == f"weights of step {facts['step']}"
        assert {key: facts[key] for key in FACTS} == FACTS
        assert keeper.best == {key: facts[key] for key in ("step", "eval_loss", *FACTS)}
        seen.append((facts["step"], facts["eval_loss"]))
    assert seen == [(0, 3.0), (100, 2.0), (100, 2.0), (100, 2.0), (400, 1.5), (400, 1.5)]
    assert [path.name for path in keeper.run.checkpoints.iterdir()] == ["best"]


def test_what_describes_the_best_adapter_is_sealed_with_it(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return sha256(path)

    def describe(folder: Path, facts: dict[str, Any]) -> dict[str, str]:
        (folder / "README.md").write_text(f"{facts['eval_loss']}")
        return {"adapter_model.safetensors": sha256(folder / "adapter_model.safetensors")}

    monkeypatch.setattr(files, "sha256", counted)
    keeper.describe = describe
    evaluated(keeper, 100, 2.0)
    assert hashed == ["README.md"]  # the adapter was hashed for its description
    best = keeper.run.checkpoints / "best"
    assert (best / "README.md").read_text() == "2.0"
    assert sorted(read_seal(best)["files"]) == ["README.md", "adapter_model.safetensors"]


def test_a_new_keeper_knows_the_best_adapter_of_the_one_before(keeper: Keeper) -> None:
    evaluated(keeper, 100, 2.0)
    later = Keeper(keeper.run, FACTS, 3)
    evaluated(later, 200, 2.5)
    assert later.best == read_seal(keeper.run.checkpoints / "best")
    assert (keeper.run.checkpoints / "best" / "adapter_model.safetensors").read_text() == "weights of step 100"


def test_a_best_adapter_half_written_by_a_killed_run_is_replaced(keeper: Keeper) -> None:
    partial = keeper.run.checkpoints / "best.partial"
    partial.mkdir()
    (partial / "adapter_model.safetensors").write_text("half")
    evaluated(keeper, 0, 2.0)
    assert [path.name for path in keeper.run.checkpoints.iterdir()] == ["best"]
    assert (keeper.run.checkpoints / "best" / "adapter_model.safetensors").read_text() == "weights of step 0"


def test_an_evaluation_asks_for_a_save_only_where_training_stops(keeper: Keeper) -> None:
    assert evaluated(keeper, 100, 2.0).should_save is False
    assert evaluated(keeper, 200, 2.0, stopping=True).should_save is True


def test_a_checkpoint_is_sealed_with_its_loss_and_the_older_ones_thinned_out(keeper: Keeper) -> None:
    for step, loss in {2: 5.0, 4: 1.0, 6: 2.0, 8: 3.0, 10: 9.0}.items():
        evaluated(keeper, step, loss)
        folder = keeper.run.checkpoints / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "optimizer.pt").write_text("moments")
        keeper.on_save(None, SimpleNamespace(global_step=step), TrainerControl())
    facts = {folder.name: read_seal(folder) for folder in saved(keeper.run.checkpoints)}
    found = {name: (fact["step"], fact["eval_loss"], list(fact["files"])) for name, fact in facts.items()}
    losses = {4: 1.0, 6: 2.0, 8: 3.0, 10: 9.0}
    assert found == {f"checkpoint-{step}": (step, loss, ["optimizer.pt"]) for step, loss in losses.items()}


def test_a_disk_too_small_for_the_best_adapter_keeps_the_one_before(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated(keeper, 0, 3.0)
    usage = SimpleNamespace(free=-1)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(DiskFull, match=r"^no space left: "):
        evaluated(keeper, 100, 2.0)
    assert read_seal(keeper.run.checkpoints / "best")["step"] == 0
