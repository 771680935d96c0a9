"""The base model's exact tokenizer, and mistral-common's as a reference.

A conversation is split into pieces (text, or a control token by name), and each text piece is encoded separately with
control tokens disabled. So text in a message never becomes a control token, there is exactly one `<s>`, and loss is
computed only on assistant text and its end token, unless its weight is 0.

Mistral's ids come from SentencePiece and the file that mistral-common ships for Instruct v0.1 and v0.2, in batches;
mistral-common makes the same call for each text. The certificate compares them with mistral-common's own (`Reference`)
and with those of the tokenizer saved with the adapter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from finetune.data.template import (
    CHATML_FORMAT,
    IGNORED,
    MISTRAL_FORMAT,
    ChatFormat,
    Encoded,
    Messages,
    Piece,
    carries_loss,
)
from finetune.errors import ConfigError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


@dataclass(frozen=True)
class Chat:
    """A tokenizer and its chat format.

    `tokenizer` is saved with the adapter; if there is a `sentencepiece`, the ids come from that.
    """

    format: ChatFormat
    tokenizer: Tokenizer
    fingerprint: str  # sha256 of tokenizer and template
    sentencepiece: SentencePieceProcessor | None = None

    def encode(self, rows: Sequence[Messages]) -> list[Encoded]:
        """Ids and labels of each conversation, in one batch call."""
        return self._encode(self._pieces(rows), self._ids)

    def encode_as_saved(self, rows: Sequence[Messages]) -> list[Encoded]:
        """Ids and labels of each conversation, by the tokenizer saved with the adapter."""
        return self._encode(self._pieces(rows), self._saved_ids)

    def encode_prompt(self, messages: Messages) -> list[int]:
        """Ids of a conversation that ends with the user, up to the start of the model's reply."""
        return self._encode([[*self.format.pieces(messages), *self.format.opening]], self._ids)[0].input_ids

    def _pieces(self, rows: Sequence[Messages]) -> list[list[Piece]]:
        return [list(self.format.pieces(messages)) for messages in rows]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if self.sentencepiece is None:
            return self._saved_ids(texts)
        ids: list[list[int]] = self.sentencepiece.encode(texts, num_threads=1)  # the processes are the parallelism
        return ids

    def _saved_ids(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _encode(self, rows: list[list[Piece]], ids_of: Callable[[list[str]], list[list[int]]]) -> list[Encoded]:
        ids = iter(ids_of([piece.text for row in rows for piece in row if not piece.control]))
        return [self._join(row, ids) for row in rows]

    def _join(self, pieces: Iterable[Piece], ids_of_texts: Iterator[list[int]]) -> Encoded:
        input_ids: list[int] = []
        labels: list[int] = []
        turn_ends: list[int] = []
        for piece in pieces:
            ids = [self.token_id(piece.text)] if piece.control else next(ids_of_texts)
            input_ids += ids
            labels += ids if piece.supervised else [IGNORED] * len(ids)
            if piece.control and piece.supervised:
                turn_ends.append(len(input_ids))
        return Encoded(input_ids, labels, turn_ends)

    def token_id(self, token: str) -> int:
        """The id of a control token by its text."""
        token_id = self.tokenizer.token_to_id(token)
        if token_id is None:
            raise ConfigError(f"model.name: its tokenizer has no {token!r}, which the {self.format.name} format needs")
        return token_id

    @property
    def certifiable(self) -> bool:
        """Whether mistral-common is this tokenizer's reference."""
        return self.format is MISTRAL_FORMAT


def load_chat(folder: Path | None) -> Chat:
    """Load the tokenizer and format of a base model in a local `folder`, or of Mistral if None.

    Mistral's tokenizer is always made from mistral-common's own file, so it needs no account and no network; a
    `tokenizer.json` in the folder must have the same vocabulary. A tokenizer with `<|im_start|>` is the demo model's.
    Raises ConfigError for any other.
    """
    own = folder / "tokenizer.json" if folder else None
    if own is None or not own.is_file():
        return _chat(MISTRAL_FORMAT, mistral_tokenizer())
    try:
        tokenizer = Tokenizer.from_file(str(own))
    except Exception as error:  # noqa: BLE001  the tokenizers library raises plain Exception
        raise ConfigError(f"model.name: {own} cannot be read as a tokenizer: {error}") from None
    if tokenizer.token_to_id("<|im_start|>") is not None:
        return _chat(CHATML_FORMAT, tokenizer)
    pinned = mistral_tokenizer()
    difference = _first_difference(tokenizer, pinned)
    if difference:
        raise ConfigError(f"model.name: {own} is not Mistral-7B-Instruct-v0.2's tokenizer: {difference}")
    return _chat(MISTRAL_FORMAT, pinned)


def _chat(chat_format: ChatFormat, tokenizer: Tokenizer) -> Chat:
    digest = hashlib.sha256((tokenizer.to_str() + chat_format.template).encode()).hexdigest()
    tokenizer.encode_special_tokens = True  # "</s>" in a message is text, not the end of a turn
    return Chat(chat_format, tokenizer, digest, load_sentencepiece() if chat_format is MISTRAL_FORMAT else None)


def _first_difference(found: Tokenizer, expected: Tokenizer) -> str | None:
    if found.get_vocab_size() != expected.get_vocab_size():
        return f"{found.get_vocab_size()} tokens, expected {expected.get_vocab_size()}"
    for token, token_id in sorted(expected.get_vocab().items(), key=lambda item: item[1]):
        if found.token_to_id(token) != token_id:
            return f"token {token!r} has id {found.token_to_id(token)}, expected {token_id}"
    return None


def sentencepiece_file() -> Path:
    """The path of mistral-common's v1 SentencePiece model: the 32,000 pieces of Instruct v0.1 and v0.2."""
    import mistral_common

    return Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"


def load_sentencepiece() -> SentencePieceProcessor:
    """Load Mistral's tokenizer as mistral-common does: it encodes control tokens as text and keeps runs of spaces."""
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(sentencepiece_file()))


def mistral_tokenizer() -> Tokenizer:
    """Build Mistral's tokenizer as byte-fallback BPE, from SentencePiece's pieces and scores.

    Each way to join two pieces into a longer one is a merge, and merges apply in order of that piece's score, which is
    SentencePiece's own rule for BPE models. `Prepend` is its dummy prefix.
    """
    pieces = load_sentencepiece()
    scores = {pieces.id_to_piece(index): pieces.get_score(index) for index in range(pieces.get_piece_size())}
    vocab = {piece: index for index, piece in enumerate(scores)}
    if len(vocab) != 32000:
        found = f"mistral-common's tokenizer.model.v1 has {len(vocab)} pieces, expected 32000"
        raise ConfigError(found, fix="reinstall mistral-common")
    model = BPE(
        vocab=vocab,
        merges=_merges(vocab, scores),
        cache_capacity=0,  # it would keep 10,000 messages that never recur: 40 MiB per process
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return tokenizer


def _merges(vocab: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """All merges in order. Runs of spaces share one score; as SentencePiece does, the longest left part goes first."""
    pairs: list[tuple[float, int, int, str, str]] = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                pairs.append((-score, -len(left), vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(pairs)]


class Reference:
    """mistral-common's v1 tokenizer, which encodes a conversation with Mistral's own code."""

    def __init__(self) -> None:
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

        self._tokenizer = MistralTokenizer.v1().instruct_tokenizer

    def encode(self, messages: Messages) -> tuple[list[int], list[int]]:
        """Ids and labels, message by message, by mistral-common's own encoders; loss as in mistral-finetune."""
        from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage

        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        input_ids = list(self._tokenizer.start())
        labels = [IGNORED] * len(input_ids)
        for index, message in enumerate(messages[1:] if system else messages):
            if message["role"] == "user":
                user = UserMessage(content=message["content"])
                ids = self._tokenizer.encode_user_message(user, [], False, index == 0, system_prompt=system)[0]
                labels += [IGNORED] * len(ids)
            else:
                ids = self._tokenizer.encode_assistant_message(AssistantMessage(content=message["content"]), False)
                labels += ids if carries_loss(message) else [IGNORED] * len(ids)
            input_ids += ids
        return input_ids, labels
