"""Which base model `model.name` may mean: Mistral's on the Hub, or a folder."""

from __future__ import annotations

from finetune.files import resolve

MISTRAL = "mistralai/Mistral-7B-Instruct-v0.2"


def is_local(name: str) -> bool:
    """Whether `model.name` is a folder here rather than a Hub id."""
    try:
        return resolve(name).is_dir()
    except OSError:  # too long, or not ours to look at
        return False
