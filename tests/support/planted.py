"""A crash behind four comparisons, which no random input meets and a fuzzer that sees coverage comes to, one by one."""

from __future__ import annotations


def check_planted(content: bytes) -> None:
    if content[:1] == b"L" and content[1:2] == b"o" and content[2:3] == b"s" and content[3:4] == b"t":
        raise RuntimeError("the planted crash")
