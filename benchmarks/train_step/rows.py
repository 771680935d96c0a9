"""Token rows for benchmarks/train_step: the same rows in each step for every variant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.data.packing import pack

MEAN_SHARE = 490 / 4096  # chats of 490 tokens on average in sequences of 4096
SIGMA = 0.9  # of the logarithm of a row's length: median 330, one row in a hundred over 2,600 (at 4096)
FILL = 0.96  # the share of a step's sequences that rows fill


@dataclass(frozen=True)
class Shape:
    """Tokens of one optimizer step: `accumulation` micro-batches of `micro_batch` sequences of `length` tokens."""

    micro_batch: int
    accumulation: int
    length: int

    @property
    def sequences(self) -> int:
        """Sequences of a step."""
        return self.micro_batch * self.accumulation


@dataclass(frozen=True)
class Step:
    """The rows of one optimizer step, and the rows of each packed sequence."""

    rows: list[list[int]]
    sequences: list[list[int]]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row) for row in self.rows]


def make_steps(data: str, shape: Shape, vocab_size: int, count: int, seed: int) -> list[Step]:
    """Return `count` steps of random rows; `data` is mixed (log-normal lengths) or full (each fills its sequence)."""
    random = np.random.default_rng(seed)
    lengths = mixed_lengths if data == "mixed" else full_lengths
    steps = []
    for _ in range(count):
        chosen = lengths(shape, random)
        rows = [_tokens(length, vocab_size, random) for length in chosen]
        steps.append(Step(rows, pack(chosen, shape.length)))
    return steps


def full_lengths(shape: Shape, _random: np.random.Generator) -> list[int]:
    return [shape.length] * shape.sequences


def mixed_lengths(shape: Shape, random: np.random.Generator) -> list[int]:
    """Return lengths of whole micro-batches that fill a step on average, drawn until they pack into its sequences."""
    mean = MEAN_SHARE * shape.length
    count = int(FILL * shape.sequences / MEAN_SHARE) // shape.micro_batch * shape.micro_batch
    while True:
        drawn = random.lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA, count)
        lengths = [int(length) for length in np.clip(drawn, 4, shape.length)]
        if len(pack(lengths, shape.length)) == shape.sequences:
            return lengths


def _tokens(length: int, vocab_size: int, random: np.random.Generator) -> list[int]:
    """Return ids from 3, low ones far more often, so that there is something to learn and the loss falls."""
    return [int(token) for token in 3 + (vocab_size - 3) * random.random(length) ** 4]


def padding_share(steps: list[Step], micro_batch: int) -> float:
    """Return the share of padding if rows, in order, are padded to the longest of their micro-batch."""
    lengths = [length for step in steps for length in step.lengths]
    batches = [lengths[first : first + micro_batch] for first in range(0, len(lengths), micro_batch)]
    return 1 - sum(lengths) / sum(max(batch) * len(batch) for batch in batches)


# Formats of the trainers --------------------------------------------------------------------------------------------


def _labels(row: list[int]) -> list[int]:
    return [-100, *row[1:]]  # nothing before the first token could predict it


def one_by_one(steps: list[Step]) -> Any:
    """Return one example per row, in the order of the steps."""
    from datasets import Dataset

    rows = [row for step in steps for row in step.rows]
    return Dataset.from_dict({"input_ids": rows, "labels": [_labels(row) for row in rows]})


def packed_by_trl(steps: list[Step], shape: Shape) -> Any:
    """Pack with TRL, step by step, so that each step has the same rows in every variant."""
    from datasets import Dataset, concatenate_datasets
    from trl import pack_dataset

    packed = []
    for step in steps:
        rows = Dataset.from_dict({"input_ids": step.rows, "labels": [_labels(row) for row in step.rows]})
        packed.append(pack_dataset(rows, shape.length, "bfd"))
        if len(packed[-1]) != shape.sequences:
            raise RuntimeError(f"TRL packs a step into {len(packed[-1])} sequences, not {shape.sequences}")
    return concatenate_datasets(packed)


def packed_by_us(steps: list[Step]) -> Any:
    """Return the packed rows in the format of Rows.dataset, for packing.Collator."""
    from datasets import Dataset

    examples = []
    for step in steps:
        for members in step.sequences:
            rows = [step.rows[index] for index in members]
            examples.append(
                {
                    "input_ids": [token for row in rows for token in row],
                    "labels": [label for row in rows for label in _labels(row)],
                    "seq_lengths": [len(row) for row in rows],
                    "lines": members,
                }
            )
    return Dataset.from_list(examples)
