"""Pack several rows into one training sequence, and collate batches, so that no row sees another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.data.template import IGNORED


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack rows into sequences by best-fit decreasing: the longest first, each into the fullest sequence it fits in.

    `lengths` are the tokens of each row, at most `capacity`. Returns the row indices of each sequence, in file order.
    One integer finds the best fit (bit k is set if some sequence has k tokens free), so a row costs one shift.
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

    Packed examples (with `seq_lengths`) become one sequence [1, tokens] if `flat`, otherwise one sequence per example,
    padded to the longest, [sequences, tokens]. Their position ids restart at each row, and there is no attention mask:
    that is how transformers and flash-attn know where a row ends. Each padding token is a separate row.
    Other examples are padded to the longest, [rows, tokens], on the tokenizer's `padding_side`. In the batch, `lines`
    are the rows' file:line, and `tokens` counts tokens without padding.
    """

    def __init__(self, tokenizer: Any, flat: bool) -> None:
        from transformers import DataCollatorForSeq2Seq
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        packed = DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=flat, return_position_ids=True)
        self._packed = packed
        self._padded = DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=IGNORED)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        lines = [line for example in examples for line in example.pop("lines")]
        tokens = sum(len(example["input_ids"]) for example in examples)
        if "seq_lengths" in examples[0]:
            batch = self._packed(examples)
            batch.pop("attention_mask", None)
            batch["labels"][batch["position_ids"] == 0] = IGNORED  # no row is predicted from the row before
        else:
            batch = self._padded(examples)
        return {**batch, "lines": lines, "tokens": tokens}
