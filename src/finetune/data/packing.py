"""Several rows in one training sequence, and batches of them, without one row seeing another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.data.template import IGNORED


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows to sequences by best-fit decreasing: longest rows first, each into the fullest sequence that still takes it.

    `lengths`: tokens of each row, none over `capacity`. Returns the row indices of each sequence, in file order.
    Best fit is found in the bits of one integer (bit k set: some sequence has k tokens free), so a row costs one shift.
    """
    sequences: list[list[int]] = []
    with_free: list[list[int]] = [[] for _ in range(capacity + 1)]
    occupied = 0
    for row in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[row]
        fits = occupied >> length
        if fits:
            free = length + (fits & -fits).bit_length() - 1
            target = with_free[free].pop()
            if not with_free[free]:
                occupied ^= 1 << free
        else:
            free, target = capacity, len(sequences)
            sequences.append([])
        sequences[target].append(row)
        left = free - length
        if left:
            with_free[left].append(target)
            occupied |= 1 << left
    return [sorted(sequence) for sequence in sequences]


class Collator:
    """Makes a batch of tensors from examples of `Rows.dataset`.

    Packed examples (those with `seq_lengths`) become one flat sequence [1, tokens] with position ids that start again
    at each row and no attention mask: that is how transformers and flash-attn know where a row ends. Others are padded
    to the longest, [rows, tokens], on the tokenizer's `padding_side`. `lines` of the batch names its rows in the file.
    """

    def __init__(self, tokenizer: Any) -> None:
        from transformers import DataCollatorForSeq2Seq
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        self._flat = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id, padding_free=True)
        self._padded = DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=IGNORED)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        lines = [line for example in examples for line in example.pop("lines")]
        batch = self._flat(examples) if "seq_lengths" in examples[0] else self._padded(examples)
        return {**batch, "lines": lines}
