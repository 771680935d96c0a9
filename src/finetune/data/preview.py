"""Show a row to a person: its decoded text, and which parts carry loss."""

from __future__ import annotations

from itertools import groupby

from finetune.data.prepare import Prepared
from finetune.data.template import IGNORED
from finetune.data.tokenizer import Chat
from finetune.wording import one_line


def segments(chat: Chat, input_ids: list[int], labels: list[int]) -> list[tuple[str, bool]]:
    """Decode a row into (text, supervised) segments in order, cut where loss starts or ends; keeps control tokens."""
    guard = chat.token_id(chat.format.end)  # decoders strip a space at the start, so the guard precedes it
    runs = groupby(zip(input_ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    found = []
    for supervised, pairs in runs:
        text = chat.tokenizer.decode([guard, *(token for token, _ in pairs)], skip_special_tokens=False)
        found.append((text.removeprefix(chat.format.end), supervised))
    return found


ELLIPSIS = " ... "
LEAST_SHOWN = 24  # characters of a segment in a preview; fewer would be meaningless


def preview(prepared: Prepared, width: int) -> list[tuple[str, bool]]:
    """Decode the stored ids of the first training row into (text, supervised) segments, in order.

    Text is safe for a terminal, on one line, and at most `width` characters in total (50 or more). Long segments lose
    their middle, so both ends of a turn stay visible; if there are many turns, the last ones are left out.
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
    """Format a preview without color, with >> and << around the text that carries loss."""
    return "".join(f">>{text}<<" if supervised else text for text, supervised in parts)


def _shortened(text: str, width: int) -> str:
    half = (width - len(ELLIPSIS)) // 2
    return text if len(text) <= width else f"{text[:half]}{ELLIPSIS}{text[-half:]}"
