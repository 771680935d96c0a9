"""The self-test of an adapter: a trained one passes, and every defect is found and named."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from finetune.config.schema import Config
from finetune.data.prepare import Prepared
from finetune.data.tokenizer import load_chat
from finetune.model.generate import Reply, reply_to
from finetune.model.load import load_base, make_tokenizer
from finetune.results import self_test as self_test_module
from finetune.results.self_test import SelfCheck, SelfTest, Untrained, before_training, held_out, loss_rows, self_test
from finetune.runs.outcome import Outcome
from finetune.terminal import Terminal
from finetune.training.job import Job
from finetune.training.keeper import Keeper
from finetune.training.progress import Progress
from finetune.training.stopper import Stopper
from finetune.training.trainer import Watchers, train
from support.training import FACTS, Case

NAME = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
Change = Callable[[Any], None]


@dataclass(frozen=True)
class Trained:
    """A tiny model after four steps: its saved adapter, and everything that a self-test needs."""

    case: Case
    config: Config
    prepared: Prepared
    start: Untrained
    outcome: Outcome
    folder: Path
    in_memory: PeftModel  # for one self-test, which takes LoRA off it

    def model(self) -> PeftModel:
        """Its like, for one self-test."""
        base = load_base(self.config.model, self.config.quantization, "cpu")
        return PeftModel.from_pretrained(base, self.folder, torch_device="cpu")

    def test(self, model: PeftModel | None = None, folder: Path | None = None, **outcome: Any) -> SelfTest:
        facts = dataclasses.replace(self.outcome, **outcome)
        job = Job(self.case.run, self.config, self.prepared, model or self.model(), self.case.tokenizer)
        return self_test(job, folder or self.folder, self.start, facts)

    def changed(self, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        """A copy of the adapter with other tensors."""
        shutil.copytree(self.folder, folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder


def train_tiny(base: Path, folder: Path, *settings: str) -> Trained:
    rows = [
        [
            {"role": "user", "content": f"What is {number} plus one?"},
            {"role": "assistant", "content": f"It is {number + 1}" + ", one more" * (number % 5)},
        ]
        for number in range(40)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    case = Case(base, folder / "train.jsonl", folder, make_tokenizer(load_chat(None), "right"))
    config, trainer = case.config(*settings), case.trainer(*settings)
    start = before_training(trainer.model)
    watchers = Watchers(Keeper(case.run, FACTS, 3), Stopper(case.run), Progress(Terminal(stream=StringIO())))
    outcome = train(trainer, config.training, watchers, 4, None)
    trainer.model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return Trained(case, config, case.data(config), start, outcome, folder / "adapter", trainer.model)


@pytest.fixture(scope="module")
def trained(tiny_mistral: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_tiny(tiny_mistral, tmp_path_factory.mktemp("trained"))


def failed(found: SelfTest) -> list[tuple[str, str]]:
    return [(check.name, check.detail) for check in found.failed]


def test_a_trained_adapter_passes_every_check(trained: Trained) -> None:
    found = trained.test()
    assert found.as_dict()["status"] == "pass"
    loss, rows = trained.outcome.eval_loss, len(trained.prepared.validation.lengths)
    tokens = int(trained.prepared.validation.lengths.sum())
    expected = [
        ("base", rf"the base weights are unchanged \(sha256 {trained.start.base[:16]}\)"),
        ("reload", "all 28 tensors equal the saved ones"),
        ("changed", "training changed all 28 tensors"),
        ("finite", "every value is a finite number"),
        ("differs", r"logits differ from the base's by up to [0-9.]+"),
        (
            "eval_loss",
            rf"{f'{loss:.6f}'[:-2]}\d\d over all {rows} validation rows \({tokens} tokens\), "
            rf"{loss:.6f} during training \(tolerance 0\.001\)",
        ),
        ("answers_end", "4 of 4 answers end in </s>, within 0 tokens; 4 of them are empty"),
    ]
    assert [check.name for check in found.checks] == [name for name, _ in expected]
    wrong = [c.detail for c, (_, text) in zip(found.checks, expected, strict=True) if not re.fullmatch(text, c.detail)]
    assert wrong == []
    assert found.sentence() == "7 of 7 checks passed on the adapter reloaded from disk"


@pytest.mark.parametrize(
    "setting",
    [
        "quantization.storage=expanded",
        "training.fused_lora=true",
        pytest.param("training.fused_kernels=true", marks=pytest.mark.slow),
    ],
)
def test_an_adapter_passes_in_the_program_that_trained_it_whatever_it_was_trained_with(
    tiny_mistral: Path, tmp_path: Path, setting: str
) -> None:
    trained = train_tiny(tiny_mistral, tmp_path, setting)
    found = trained.test(trained.in_memory)
    assert (len(found.checks), failed(found)) == (7, [])


def test_the_loss_is_reproduced_far_closer_than_is_allowed(trained: Trained) -> None:
    rows = trained.prepared.validation
    found = held_out(trained.model(), trained.prepared, loss_rows(rows))
    assert found.loss == pytest.approx(trained.outcome.eval_loss, rel=1e-6)


def test_the_base_has_the_same_digest_with_and_without_lora(trained: Trained) -> None:
    model = trained.model()
    with_lora = before_training(model).base
    assert with_lora == self_test_module._base_digest(model.unload()) == trained.start.base


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight.absmax", "model.norm.weight"])
def test_a_base_that_has_changed_is_found_in_its_last_bit(trained: Trained, name: str) -> None:
    model = trained.model()
    tensor = next(
        value for key, value in model.get_base_model().state_dict().items() if key.replace(".base_layer", "") == name
    )
    tensor.view(-1).view(torch.uint8)[0] ^= 1
    found = failed(trained.test(model))
    assert [name for name, _ in found] == ["base"]
    before = trained.start.base[:16]
    assert re.fullmatch(rf"the base weights have changed \(sha256 {before} -> [0-9a-f]{{16}}\)", found[0][1])


def test_the_untrained_adapter_is_found(trained: Trained, tmp_path: Path) -> None:
    def untrained(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "lora_B" in name:
                tensor.zero_()

    folder = trained.changed(tmp_path / "adapter", untrained)
    found = failed(trained.test(folder=folder, eval_loss=trained.outcome.first_eval_loss, best_step=0))
    assert found == [
        (
            "changed",
            "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight and 13 more are unchanged by training, "
            "of 28 tensors; no evaluation was better than the one before training",
        ),
        ("differs", "logits differ from the base's by up to 0"),
    ]


def test_one_value_that_is_not_finite_is_found(trained: Trained, tmp_path: Path) -> None:
    folder = trained.changed(tmp_path / "adapter", lambda tensors: tensors[NAME][0, 0].fill_(torch.nan))
    found = dict(failed(trained.test(folder=folder)))
    assert found["finite"] == f"{NAME} is not finite"
    assert found["differs"] == "logits differ from the base's by up to nan"
    assert found["eval_loss"].startswith("nan over all ")


def test_a_tensor_that_peft_passes_over_in_silence_is_found(trained: Trained, tmp_path: Path) -> None:
    folder = trained.changed(tmp_path / "adapter", lambda tensors: tensors.pop(NAME))
    with pytest.warns(UserWarning, match="missing adapter keys"):
        assert ("reload", f"{NAME} is not equal to the saved one") in failed(trained.test(folder=folder))


def test_a_file_that_cannot_be_read_is_found(trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained.folder, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"nothing")
    found = failed(trained.test(folder=tmp_path / "adapter"))
    assert found == [("reload", "PEFT cannot read it: Error while deserializing header: header too small")]


def test_an_adapter_of_another_loss_is_found(trained: Trained) -> None:
    found = failed(trained.test(eval_loss=trained.outcome.eval_loss + 0.002))
    assert [name for name, _ in found] == ["eval_loss"]


def test_of_many_rows_the_first_are_held_against_the_model_in_memory(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = trained.prepared.validation.lengths
    monkeypatch.setattr(self_test_module, "LOSS_TOKENS", int(lengths[:2].sum()) + 1)
    found = {check.name: check for check in trained.test(eval_loss=99.0).checks}["eval_loss"]
    assert found.status == "pass"
    assert f" over the first 2 validation rows ({int(lengths[:2].sum())} tokens), " in found.detail
    monkeypatch.setattr(self_test_module, "LOSS_TOKENS", 1)
    assert loss_rows(trained.prepared.validation) == [0]


@pytest.fixture
def endless(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> tuple[PeftModel, str]:
    """A model that may not say the end token, and what its four replies lack."""
    monkeypatch.setattr(self_test_module, "LEAST_NEW_TOKENS", 5)
    model = trained.model()
    model.generation_config.suppress_tokens = [2]
    rows = trained.prepared.validation
    turns = sorted(
        (self_test_module._first_turn(rows, index) for index in range(len(rows.lengths))), key=lambda turn: turn[2]
    )
    lines = ", ".join(str(place.line) for place, _, _ in turns[:4])
    return model, f"have no </s> within {4 * turns[3][2]} tokens (rows of lines {lines})"


def test_answers_that_never_end_warn_if_the_end_was_not_learned(
    trained: Trained, endless: tuple[PeftModel, str]
) -> None:
    model, lack = endless
    found = trained.test(model)
    loss = held_out(trained.model(), trained.prepared, loss_rows(trained.prepared.validation)).end
    why = f"its loss on end tokens of validation rows is {loss:.3f}: not learned"
    assert found.warned == (SelfCheck("answers_end", "warn", f"4 of 4 answers {lack}; {why}"),)
    assert (failed(found), found.as_dict()["status"]) == ([], "warn")
    assert found.sentence() == "6 of 7 checks passed on the adapter reloaded from disk"


@pytest.mark.parametrize(
    "end_loss, status, why",
    [
        (0.5, "fail", "its loss on end tokens of validation rows is 0.500: learned"),
        (0.7, "warn", "its loss on end tokens of validation rows is 0.700: not learned"),
        (None, "warn", "no validation row has an end token with loss"),
    ],
)
def test_an_adapter_that_predicts_the_end_and_never_ends_fails(
    trained: Trained, endless: tuple[PeftModel, str], end_loss: float | None, status: str, why: str
) -> None:
    model, lack = endless
    found = self_test_module._answers_end(model, trained.prepared, end_loss)
    assert (found.status, found.detail) == (status, f"4 of 4 answers {lack}; {why}")


def test_one_answer_that_does_not_end_is_only_a_warning(
    trained: Trained, endless: tuple[PeftModel, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, lack = endless

    def but_one(*arguments: Any) -> list[Reply]:
        first, *others = reply_to(*arguments) or []
        return [dataclasses.replace(first, ended=False), *others]

    monkeypatch.setattr(self_test_module, "reply_to", but_one)
    found = self_test_module._answers_end(trained.model(), trained.prepared, 0.0)
    assert (found.status, found.detail) == ("warn", "1 of 4 answers " + lack.split(",")[0] + ")")


def test_the_end_tokens_loss_is_the_mean_over_the_rows_ends(trained: Trained) -> None:
    """Each row has one answer, so the loss of a row that carries it on its end alone is that of its end."""
    model, prepared = trained.model(), trained.prepared
    losses = []
    for index in range(len(prepared.validation.lengths)):
        _, input_ids, labels = prepared.validation.row(index)
        ids, only_end = torch.tensor(input_ids[None].astype("int64")), torch.tensor(labels[None].astype("int64"))
        only_end[only_end != 2] = -100
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=only_end).loss))
    found = held_out(model, prepared, loss_rows(prepared.validation)).end
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_the_first_turn_of_a_row_is_its_prompt_and_the_length_of_its_answer(trained: Trained) -> None:
    rows, chat = trained.prepared.validation, trained.prepared.chat
    place, prompt, answer = self_test_module._first_turn(rows, 0)
    number = place.line - 1
    assert prompt == chat.encode_prompt([{"role": "user", "content": f"What is {number} plus one?"}])
    assert len(prompt) + answer == rows.lengths[0]
