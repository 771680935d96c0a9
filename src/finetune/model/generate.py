"""Greedy replies of a model to several prompts at once, which can be cut short between two tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria

from finetune.data.tokenizer import Chat

TOGETHER = 8  # prompts in one batch: reading the weights once for all is what makes it fast, the caches what limits it


@dataclass(frozen=True)
class Reply:
    """What the model said; `ended` where it came to its end token by itself. `tokens` counts without that one."""

    text: str
    tokens: int
    ended: bool


def reply_to(
    model: Any,
    chat: Chat,
    prompts: list[list[int]],
    max_new_tokens: int,
    stopped: Callable[[], bool] = lambda: False,
) -> list[Reply] | None:
    """Greedy replies to `prompts` (ids up to where a reply begins), in their order; None once `stopped` says so.

    Draws no random number, and leaves the model in the mode it was in.
    """
    replies: list[Reply] = []
    with evaluating(model):
        for first in range(0, len(prompts), TOGETHER):
            replies += _batch(model, chat, prompts[first : first + TOGETHER], max_new_tokens, stopped)
            if stopped():
                return None
    return replies


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Without gradients and in evaluation mode; the mode is put back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


class _Stop(StoppingCriteria):  # type: ignore[misc]
    """Ends all replies of a batch where `stopped` says so; asked after each token."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self.stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.stopped(), device=input_ids.device)


def _batch(
    model: Any, chat: Chat, prompts: list[list[int]], max_new_tokens: int, stopped: Callable[[], bool]
) -> list[Reply]:
    end, pad = chat.token_id(chat.format.end), chat.token_id(chat.format.pad)
    longest = max(map(len, prompts))
    padded = [[pad] * (longest - len(prompt)) + prompt for prompt in prompts]  # on the left: all replies begin together
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    output = model.generate(
        input_ids=torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=end,
        pad_token_id=pad,
        use_cache=True,
        stopping_criteria=[_Stop(stopped)],
    )
    return [_reply(chat, ids, end) for ids in output[:, longest:].tolist()]


def _reply(chat: Chat, ids: list[int], end: int) -> Reply:
    said = ids[: ids.index(end)] if end in ids else ids
    return Reply(chat.tokenizer.decode(said, skip_special_tokens=True).strip(), len(said), end in ids)
