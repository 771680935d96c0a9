"""What `model.name` may be: Mistral's model on the Hub, or a local folder."""

from __future__ import annotations

from finetune.files import resolve

MISTRAL = "mistralai/Mistral-7B-Instruct-v0.2"


def is_local(name: str) -> bool:
    """Whether `model.name` is a local folder rather than a Hub id."""
    try:
        return resolve(name).is_dir()
    except OSError:  # name too long, or no permission
        return False
