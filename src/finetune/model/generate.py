"""Greedy replies to several prompts in a batch, or to one as a stream; both can be stopped after any token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from finetune.data.tokenizer import Chat

TOGETHER = 8  # prompts in one batch: it shares reading the weights, and is limited by the caches
HALF = "\ufffd"  # decoded in place of a character whose last bytes have not been generated yet


@dataclass(frozen=True)
class Reply:
    """A reply. `ended`: the model generated its end token, which `tokens` does not count."""

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
    """Return greedy replies to `prompts` (token ids), in order; None if `stopped` returned true.

    Draws no random numbers and restores the model's mode.
    """
    replies: list[Reply] = []
    with evaluating(model):
        for first in range(0, len(prompts), TOGETHER):
            replies += _batch(model, chat, prompts[first : first + TOGETHER], max_new_tokens, stopped)
            if stopped():
                return None
    return replies


@dataclass(frozen=True)
class Listener:
    """Callbacks of a streamed reply: `heard` gets each new part of the text, `stopped` is called after each token."""

    heard: Callable[[str], None]
    stopped: Callable[[], bool] = lambda: False


def stream_reply(model: Any, chat: Chat, prompt: list[int], max_new_tokens: int, listener: Listener) -> Reply | None:
    """Reply to one prompt as `reply_to` does, passing the text to `listener` in parts."""
    with evaluating(model):
        parts = _Parts(chat, listener.heard)
        [reply] = _batch(model, chat, [prompt], max_new_tokens, listener.stopped, parts)
    return None if listener.stopped() else reply


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Run the block without gradients and in evaluation mode, then restore the mode."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


class _Stop(StoppingCriteria):  # type: ignore[misc]
    """Ends all replies of a batch when `stopped` returns true; called after each token."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self.stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.stopped(), device=input_ids.device)


class _Parts(BaseStreamer):  # type: ignore[misc]
    """Turns the tokens of `generate` into parts of text, passing on a character only once it is complete."""

    def __init__(self, chat: Chat, heard: Callable[[str], None]) -> None:
        self.chat, self.heard = chat, heard
        self.ids: list[int] | None = None  # the first call passes the prompt
        self.passed_on = ""

    def put(self, value: torch.Tensor) -> None:
        if self.ids is None:
            self.ids = []
            return
        self.ids += value.tolist()
        self._tell(self._text().rstrip(HALF).rstrip())

    def end(self) -> None:
        self._tell(self._text())

    def _text(self) -> str:
        return _reply(self.chat, self.ids or []).text

    def _tell(self, text: str) -> None:
        if len(text) > len(self.passed_on) and text.startswith(self.passed_on):
            self.heard(text[len(self.passed_on) :])
            self.passed_on = text


def _batch(
    model: Any,
    chat: Chat,
    prompts: list[list[int]],
    max_new_tokens: int,
    stopped: Callable[[], bool],
    streamer: BaseStreamer | None = None,
) -> list[Reply]:
    end, pad = chat.token_id(chat.format.end), chat.token_id(chat.format.pad)
    longest = max(map(len, prompts))
    padded = [[pad] * (longest - len(prompt)) + prompt for prompt in prompts]  # on the left: replies start together
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
        streamer=streamer,
    )
    return [_reply(chat, ids) for ids in output[:, longest:].tolist()]


def _reply(chat: Chat, ids: list[int]) -> Reply:
    end = chat.token_id(chat.format.end)
    said = ids[: ids.index(end)] if end in ids else ids
    return Reply(chat.tokenizer.decode(said, skip_special_tokens=True).strip(), len(said), end in ids)
