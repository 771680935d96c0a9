"""Greedy replies of a model to several prompts at once, or to one as a stream, which can be cut short after a token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from finetune.data.tokenizer import Chat

TOGETHER = 8  # prompts in one batch: reading the weights once for all is what makes it fast, the caches what limits it
HALF = "\ufffd"  # what a decoder makes of a character of which a byte is still to come


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


@dataclass(frozen=True)
class Listener:
    """Whoever follows a reply: `heard` gets each new part of its text, `stopped` is asked after each token."""

    heard: Callable[[str], None]
    stopped: Callable[[], bool] = lambda: False


def stream_reply(model: Any, chat: Chat, prompt: list[int], max_new_tokens: int, listener: Listener) -> Reply | None:
    """As `reply_to` for one prompt; the parts that `listener` hears are together the reply's text."""
    with evaluating(model):
        parts = _Parts(chat, listener.heard)
        [reply] = _batch(model, chat, [prompt], max_new_tokens, listener.stopped, parts)
    return None if listener.stopped() else reply


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


class _Parts(BaseStreamer):  # type: ignore[misc]
    """Cuts the tokens that `generate` hands on into parts of text, a character only once it is whole."""

    def __init__(self, chat: Chat, heard: Callable[[str], None]) -> None:
        self.chat, self.heard = chat, heard
        self.ids: list[int] | None = None  # the first that it is handed is the prompt
        self.told = ""

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
        if len(text) > len(self.told) and text.startswith(self.told):
            self.heard(text[len(self.told) :])
            self.told = text


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
        streamer=streamer,
    )
    return [_reply(chat, ids) for ids in output[:, longest:].tolist()]


def _reply(chat: Chat, ids: list[int]) -> Reply:
    end = chat.token_id(chat.format.end)
    said = ids[: ids.index(end)] if end in ids else ids
    return Reply(chat.tokenizer.decode(said, skip_special_tokens=True).strip(), len(said), end in ids)
