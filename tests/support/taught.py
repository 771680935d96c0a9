"""A tiny Mistral that knows a few conversations by heart, an adapter with other answers, and a run's folder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import MistralForCausalLM

from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.config.yaml_file import dump
from finetune.data.template import Messages
from finetune.data.tokenizer import Chat
from finetune.files import seal, sha256, write_json
from finetune.model.load import load_base
from finetune.model.lora import add_lora

WHO, WHY, BRIEF = "Who is there?", "Why?", "Be brief."
KEEPER, SHIPS, ME, NOBODY, SO = "The keeper.", "For ships\nat sea, é.", "Me.", "Nobody.", "So."
MOST_STEPS = 300


def turns(*texts: str, system: str | None = None) -> Messages:
    """A conversation of user and assistant in turn."""
    led = [] if system is None else [{"role": "system", "content": system}]
    return led + [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


TUNED = (turns(WHO, KEEPER, WHY, SHIPS), turns(WHO, ME, system=BRIEF))
# What the base answers to the same, and all words that the adapter needs.
BASE = (turns(WHO, NOBODY), turns(WHY, SO), turns("Go", KEEPER), turns("On", SHIPS), turns("A", ME))


def teach(model: Any, chat: Chat, conversations: Iterable[Messages], rate: float) -> None:
    """Train `model` until it says each of these answers, token by token."""
    rows = chat.encode(list(conversations))
    longest = max(len(row.input_ids) for row in rows)
    ids = torch.tensor([row.input_ids + [0] * (longest - len(row.input_ids)) for row in rows])
    labels = torch.tensor([row.labels + [-100] * (longest - len(row.labels)) for row in rows])
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=rate)
    for _ in range(MOST_STEPS):
        output = model(input_ids=ids, labels=labels, use_cache=False)
        said, wanted = output.logits[:, :-1].argmax(-1), labels[:, 1:]
        if bool((said == wanted)[wanted != -100].all()) and output.loss < 0.5:
            return
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    raise AssertionError(f"not learned in {MOST_STEPS} steps: {output.loss}")


@dataclass(frozen=True)
class Taught:
    """The base's folder and its config, the adapter on it, and a finished run's folder with that adapter."""

    base: Path
    config: Config
    model: PeftModel
    chat: Chat
    run: Path


def make_taught(tiny: Path, chat: Chat, folder: Path) -> Taught:
    """All of it below `folder`; `tiny` is where the base begins."""
    base = folder / "base"
    model = MistralForCausalLM.from_pretrained(tiny)
    teach(model, chat, BASE, 1e-2)
    model.save_pretrained(base)
    settings = [f"model.name={base}", f"output.dir={folder}", "tracking.run_name=run", "model.max_seq_length=256"]
    config = load_config("cpu", settings)[0]
    tuned = add_lora(load_base(config.model, config.quantization, "cpu"), config.lora, 1).eval()
    teach(tuned, chat, TUNED, 5e-3)
    made = Taught(base, config, tuned, chat, folder / "run")
    _write_run(made)
    return made


def _write_run(taught: Taught) -> None:
    """As a run of six steps leaves it, of which the fourth was the best."""
    for name, facts in {
        "best": {"step": 4, "eval_loss": 1.25},
        "checkpoint-4": {"step": 4, "eval_loss": 1.25},
        "checkpoint-6": {"step": 6, "eval_loss": None},
    }.items():
        taught.model.save_pretrained(taught.run / "checkpoints" / name, save_embedding_layers=False)
        seal(taught.run / "checkpoints" / name, facts)
    taught.model.save_pretrained(taught.run, save_embedding_layers=False)
    (taught.run / "config.yaml").write_text(dump(taught.config.as_dict()), encoding="utf-8")
    digest = sha256(taught.run / "adapter_model.safetensors")
    manifest = {"status": "complete", "eval_loss": 1.25, "best_step": 4, "adapter_sha256": digest}
    write_json(taught.run / "manifest.json", manifest)
