"""Rows packed into one sequence give the loss, gradients and logits that they give alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.data.cache import Cache
from finetune.data.encode import Recipe
from finetune.data.packing import Collator
from finetune.data.prepare import Prepared, prepare
from finetune.data.tokenizer import load_chat
from finetune.machine.platforms import PLATFORMS
from finetune.model.load import load_base, make_tokenizer
from finetune.model.lora import add_lora
from finetune.runs.folder import Run
from finetune.training.arguments import training_arguments
from finetune.training.trainer import Examples, Trainer, make_trainer
from support.conversations import conversation, weighted
from support.prepared import write

TOLERANCE = 1e-5  # relative; sums in another order

Tensors = dict[str, torch.Tensor]


class Case:
    """A tiny NF4 model with LoRA in training, and rows to feed it through the trainer's own loss."""

    def __init__(self, config: Config, train_file: Path, folder: Path) -> None:
        dataset = config.dataset
        recipe = Recipe(None, None, 256, True, False)
        self.prepared: Prepared = prepare(dataset, recipe, False, Cache(folder / "cache"), workers=0)
        self.model = add_lora(load_base(config.model, config.quantization, "cpu"), config.lora, 1)
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:  # at its start B is zero, and with it A's gradient
                torch.nn.init.normal_(parameter, std=0.2)
        tokenizer = make_tokenizer(load_chat(None), "right")
        self.collator = Collator(tokenizer, flat=False)
        sft = training_arguments(config.training, Run(folder / "run", False, None), PLATFORMS["cpu"], True)
        rows = self.prepared.train.dataset(None)
        self.trainer: Trainer = make_trainer(self.model, tokenizer, Examples(rows, rows), sft, 0)
        self.model.train()

    def batch(self, *sequences: list[int]) -> dict[str, Any]:
        dataset = self.prepared.train.dataset(list(sequences))
        return self.collator([dataset[index] for index in range(len(sequences))])

    def loss_and_gradients(self, batch: dict[str, Any]) -> tuple[int, torch.Tensor, Tensors]:
        """(supervised tokens, mean loss over them, gradients) of one batch."""
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        self.model.zero_grad()
        loss = self.trainer.compute_loss(self.model, dict(batch))
        loss.backward()
        gradients = {name: value.grad.clone() for name, value in self.model.named_parameters() if value.requires_grad}
        return tokens, loss.detach(), gradients

    def weighted(self, rows: list[int]) -> tuple[torch.Tensor, Tensors]:
        """Loss and gradients of rows one by one, each weighted by its supervised tokens."""
        alone = [self.loss_and_gradients(self.batch([row])) for row in rows]
        total = sum(tokens for tokens, _, _ in alone)
        loss = sum((tokens * loss for tokens, loss, _ in alone), torch.zeros(())) / total
        gradients = {
            name: sum((tokens * found[name] for tokens, _, found in alone), torch.zeros(())) / total
            for name in alone[0][2]
        }
        return loss, gradients

    def logits(self, batch: dict[str, Any], use_cache: bool = False) -> torch.Tensor:
        inputs = {key: value for key, value in batch.items() if key not in ("lines", "labels")}
        with torch.no_grad():
            return self.model(**inputs, use_cache=use_cache).logits[0]


@pytest.fixture
def case(tiny_mistral: Path, conversations: Path, tmp_path: Path) -> Case:
    settings = [
        f"model.name={tiny_mistral}",
        f"dataset.train_file={conversations}",
        "lora.lora_dropout=0",
        "training.gradient_checkpointing=false",
    ]
    return Case(load_config("cpu", settings)[0], conversations, tmp_path)


ROWS = [3, 0, 11, 4, 7]


def distance(found: Tensors, wanted: Tensors) -> float:
    """The largest difference of any tensor, relative to that tensor's norm."""
    assert found.keys() == wanted.keys()
    assert all(value.norm() > 0 for value in wanted.values())
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


@pytest.mark.parametrize(
    ("sequences", "checkpointing"),
    [([ROWS], False), ([ROWS[:2], ROWS[2:]], False), ([ROWS], True)],
    ids=["one sequence", "two sequences in one batch", "gradient checkpointing"],
)
def test_a_packed_batch_has_the_loss_and_gradients_of_its_rows_alone(
    case: Case, sequences: list[list[int]], checkpointing: bool
) -> None:
    if checkpointing:
        case.model.gradient_checkpointing_enable({"use_reentrant": False})
    loss, gradients = case.weighted(ROWS)
    tokens, packed_loss, packed_gradients = case.loss_and_gradients(case.batch(*sequences))
    assert tokens == sum(int((case.prepared.train.row(row)[2] != -100).sum()) for row in ROWS)
    assert float(abs(packed_loss - loss) / loss) < TOLERANCE
    assert distance(packed_gradients, gradients) < TOLERANCE


def test_a_packed_batch_has_the_loss_of_the_same_rows_padded(case: Case) -> None:
    dataset = case.prepared.train.dataset(None)
    padded = case.collator([dataset[row] for row in ROWS])
    assert padded["input_ids"].shape[0] == len(ROWS)
    tokens, loss, gradients = case.loss_and_gradients(padded)
    packed_tokens, packed_loss, packed_gradients = case.loss_and_gradients(case.batch(ROWS))
    assert packed_tokens == tokens
    assert float(abs(packed_loss - loss) / loss) < TOLERANCE
    assert distance(packed_gradients, gradients) < TOLERANCE


def test_a_turn_of_weight_0_has_no_labels_in_a_batch_and_gives_no_gradient(tiny_mistral: Path, tmp_path: Path) -> None:
    two = conversation("Why?", "Because.", "And then?", "So long.")
    rows = write(tmp_path / "rows.jsonl", weighted(two, 0, 1), weighted(two, 1, 0), conversation("Hi", "Hello"))
    held_out = write(tmp_path / "val.jsonl", conversation("Bye", "Yes"))
    files = [f"dataset.train_file={rows}", f"dataset.validation_file={held_out}"]
    config, _ = load_config("cpu", [f"model.name={tiny_mistral}", *files, "lora.lora_dropout=0"])
    case = Case(config, rows, tmp_path)
    hidden: list[torch.Tensor] = []  # the last, of which logits are made chunk by chunk

    def keep(*of_call: Any) -> None:
        of_call[2].retain_grad()
        hidden.append(of_call[2])

    case.model.get_base_model().model.norm.register_forward_hook(keep)
    batch = case.batch([0, 1, 2])
    labels = batch["labels"][0]
    learned = labels[labels != -100].tolist()
    said = load_chat(None).tokenizer.decode(learned, skip_special_tokens=False)
    assert said == "So long.</s> Because.</s> Hello</s>"
    case.loss_and_gradients(batch)
    (found,) = hidden
    assert found.grad is not None
    of_places = found.grad[0].abs().sum(-1) > 0
    assert of_places.tolist() == [*(labels[1:] != -100).tolist(), False]


def test_the_logits_of_a_row_do_not_depend_on_its_neighbors(case: Case) -> None:
    length = len(case.prepared.train.row(11)[1])
    alone = case.logits(case.batch([11]))
    for rows in ([3, 11], [11, 3], [0, 11, 4], [7, 4, 11, 3]):
        start = sum(len(case.prepared.train.row(row)[1]) for row in rows[: rows.index(11)])
        beside = case.logits(case.batch(rows))[start : start + length]
        torch.testing.assert_close(beside, alone, rtol=TOLERANCE, atol=1e-6)


def test_with_a_cache_rows_would_see_each_other_so_the_trainer_takes_none(case: Case) -> None:
    batch = case.batch(ROWS)
    first = len(case.prepared.train.row(ROWS[0])[1])
    difference = (case.logits(batch, use_cache=True) - case.logits(batch)).abs()
    assert difference[first:].max() > 0.1
    assert difference[:first].max() < 1e-5

    taken = []
    case.model.register_forward_pre_hook(lambda _, __, named: taken.append(named["use_cache"]), with_kwargs=True)
    case.loss_and_gradients(batch)
    assert taken == [False]
