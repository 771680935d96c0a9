"""A row as a person reads it: what its ids say, and which of it carries loss."""

from __future__ import annotations

from itertools import groupby

from finetune.data.prepare import Prepared
from finetune.data.template import IGNORED
from finetune.data.tokenizer import Chat
from finetune.wording import one_line


def segments(chat: Chat, input_ids: list[int], labels: list[int]) -> list[tuple[str, bool]]:
    """What a row's ids say, cut wherever loss begins or ends: (text, supervised), in order, control tokens included."""
    guard = chat.token_id(chat.format.end)  # decoders strip a space at the start, so this stands there
    runs = groupby(zip(input_ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    found = []
    for supervised, pairs in runs:
        text = chat.tokenizer.decode([guard, *(token for token, _ in pairs)], skip_special_tokens=False)
        found.append((text.removeprefix(chat.format.end), supervised))
    return found


ELLIPSIS = " ... "
LEAST_SHOWN = 24  # characters of a segment in a preview, below which it tells nothing


def preview(prepared: Prepared, width: int) -> list[tuple[str, bool]]:
    """The first training row as its stored ids say it: (text, whether it carries loss), in order.

    Text is safe for a terminal, on one line, and `width` characters in all (50 or more). Long segments lose their
    middle, so that both ends of a turn stay visible; the last of many turns are left out.
    """
    _, input_ids, labels = prepared.train.row(0)
    found = [
        (one_line(text), supervised)
        for text, supervised in segments(prepared.chat, input_ids.tolist(), labels.tolist())
    ]
    if sum(len(text) for text, _ in found) <= width:
        return found
    shown = found[: width // LEAST_SHOWN]
    left_out = [(ELLIPSIS, False)] if len(shown) < len(found) else []
    share = (width - len(ELLIPSIS)) // len(shown)
    return [(_shortened(text, share), supervised) for text, supervised in shown] + left_out


def marked(parts: list[tuple[str, bool]]) -> str:
    """A preview without color: what carries loss stands between >> and <<."""
    return "".join(f">>{text}<<" if supervised else text for text, supervised in parts)


def _shortened(text: str, width: int) -> str:
    half = (width - len(ELLIPSIS)) // 2
    return text if len(text) <= width else f"{text[:half]}{ELLIPSIS}{text[-half:]}"
