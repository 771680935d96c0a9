"""Hashes that identify a row: of its bytes, of its messages, and of what near copies have in common."""

from __future__ import annotations

import hashlib
import json
import unicodedata

from finetune.data.template import Messages

ROW_HASH_BYTES = 16
FOLDED = bytes(ord(" ") if chr(byte).isspace() else ord(chr(byte).lower()) for byte in range(128)) + bytes(128)
ANSWER = " \0assistant\0"  # marks the first answer of a folded conversation
as_json = json.JSONEncoder(ensure_ascii=False).encode


def row_hash(data: bytes | memoryview) -> bytes:
    """Hash a line's bytes, or the ids or labels of a row, to ROW_HASH_BYTES."""
    return hashlib.blake2b(data, digest_size=ROW_HASH_BYTES).digest()


def content_digest(messages: Messages) -> int:
    """Hash a conversation to 64 bits, the same in every file and on every machine.

    Weights are not hashed: rows that differ only in weights are copies, so no answer is on both sides of a split.
    """
    content = [{"role": message["role"], "content": message["content"]} for message in messages]
    return _hash64(as_json(content).encode())


def folded_digests(messages: Messages) -> tuple[int, int]:
    """Hash a conversation and its opening (everything before the first answer), each without whitespace and case.

    Conversations that differ only in case, runs of whitespace or whitespace around messages have the same first digest.
    Openings may also differ in the form of characters (NFKC). Rows with the same first digest have the same second.
    """
    text = "".join(f" \0{message['role']}\0 {message['content']}" for message in messages)
    if not text.isascii():
        folded_text = " ".join(text.split()).casefold()
        opening = unicodedata.normalize("NFKC", folded_text.partition(ANSWER)[0]).casefold()
        return _hash64(folded_text.encode()), _hash64(" ".join(opening.split()).encode())
    folded = text.encode().translate(FOLDED)  # the same result as above, faster
    while b"  " in folded:
        folded = folded.replace(b"  ", b" ")
    folded = folded.strip()
    return _hash64(folded), _hash64(folded.partition(ANSWER.encode())[0])


def _hash64(text: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
