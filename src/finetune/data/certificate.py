"""The certificate: a row's ids and labels equal mistral-common's and the saved tokenizer's."""

from __future__ import annotations

from typing import Literal

from finetune.data.template import IGNORED, Encoded, Messages
from finetune.data.tokenizer import Chat, Reference

Certificate = Literal["every_row"] | bool

SAMPLED_ONE_IN = 20  # of the usual rows, unless the certificate compares every row


class Certifier:
    """Selects the rows to compare, and compares them. It selects none if mistral-common is not the reference."""

    def __init__(self, chat: Chat, certificate: Certificate) -> None:
        self._chat = chat
        self._every_row = certificate == "every_row"
        self._reference = Reference() if certificate and chat.certifiable else None

    def selects(self, messages: Messages, digest: int, literal: bool) -> bool:
        """Whether to compare a row: every row, or the unusual ones and a sample of the others.

        A row with a control token as text (`literal`) is unusual. The sample depends only on content. It uses the
        digest's last bits because the first bits select rows by the weight of their file.
        """
        if self._reference is None or self._every_row:
            return self._reference is not None
        return literal or is_unusual(messages) or digest % SAMPLED_ONE_IN == 0

    def mismatch(self, rows: list[tuple[int, Messages, Encoded]]) -> str | None:
        """Describe the first row (line, messages, our encoding) that is encoded differently, or return None."""
        if self._reference is None or not rows:
            return None
        saved = self._chat.encode_as_saved([messages for _, messages, _ in rows])
        for (line, messages, ours), of_saved in zip(rows, saved, strict=True):
            others = {"mistral-common": self._reference.encode(messages), "the saved tokenizer": of_saved[:2]}
            for name, (input_ids, labels) in others.items():
                if (ours.input_ids, ours.labels) != (input_ids, labels):
                    return f"{line}: {_difference(ours, name, Encoded(input_ids, labels, []))}"
        return None


def is_unusual(messages: Messages) -> bool:
    """Whether tokenizers might disagree: a system message, or a run of spaces, or a space at either end of a message.

    "▁" counts as a space, as in SentencePiece.
    """
    texts = (f" {message['content']} ".replace("▁", " ") for message in messages)
    return messages[0]["role"] == "system" or any("  " in text for text in texts)


def _difference(ours: Encoded, name: str, theirs: Encoded) -> str:
    found = list(zip(ours.input_ids, ours.labels, strict=True))
    expected = list(zip(theirs.input_ids, theirs.labels, strict=True))
    differing = (index for index, (one, other) in enumerate(zip(found, expected, strict=False)) if one != other)
    first = next(differing, min(len(found), len(expected)))
    return f"token {first} is {_ids(found, first)}, {name} says {_ids(expected, first)}"


def _ids(tokens: list[tuple[int, int]], start: int) -> str:
    """The next three ids, each with a + if it carries loss."""
    shown = [f"{token}{'' if label == IGNORED else '+'}" for token, label in tokens[start : start + 3]]
    return " ".join(shown) or "the end"
