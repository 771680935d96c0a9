"""The run's README.md: a model card as the Hub reads it, which can be uploaded as it is.

It contains only what manifest and config record: no language, no data set id, and no license of an unknown base. Names
of people and files are in code spans, where they cannot end the header or the Markdown.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader

from finetune.config.base_model import MISTRAL, is_local
from finetune.config.schema import Config, Mark, marked
from finetune.config.yaml_file import get_config_value
from finetune.files import resolve
from finetune.plan.automatic import in_words
from finetune.runs.checkpoints import BEST
from finetune.wording import clean

LICENSE = "apache-2.0"  # Mistral-7B-Instruct-v0.2's
PEFT = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")  # all that the card's code for PEFT needs
CONVERTERS = ("torch", "transformers")  # of those, what llama.cpp's converters need
LLAMA_CPP = "2026.10.11549"  # the release of xllamacpp that benchmarks/foreign_clients.py was run with
SAME_TOKENS = 40  # of llama.cpp's answer, at least


def model_card(config: Config, manifest: dict[str, Any]) -> str:
    """Return README.md in the Hub's format from a run's manifest, with the verdict of `self_test` if there is one.

    For an unfinished run, `manifest` has the figures of the best adapter so far, and the card is for that one's folder.
    """
    hub, tree, finished = hub_base(config), config.as_dict(), manifest["status"] == "complete"
    found = {
        "header": metadata(config, manifest).to_yaml(),
        "name": config.run_name,
        "finished": finished,
        "folder": config.run_folder.name if finished else f"{config.run_folder.name}/checkpoints/{BEST}",
        "hub": hub,
        "base": str(manifest["base_model"]["name"]),
        "revision": config.model.revision if hub else None,
        "config": config,
        "installed": _requirements(manifest["versions"], PEFT),
        "converters": f"{_requirements(manifest['versions'], CONVERTERS)} sentencepiece xllamacpp=={LLAMA_CPP}",
        "llama_cpp": LLAMA_CPP,
        "same_tokens": SAME_TOKENS,
        "computed": in_words(manifest),
        "settings": [(path, get_config_value(tree, path)) for path in marked(Mark.IN_CARD)],
    }
    return _cards().get_template("model_card.md.j2").render(manifest | found)


def metadata(config: Config, manifest: dict[str, Any]) -> ModelCardData:
    """Return the card's header; `eval_results` has the final eval_loss, on held-out conversations of the user."""
    base = hub_base(config)
    result = EvalResult(
        task_type="text-generation",
        dataset_type="json",
        dataset_name="held-out conversations",
        dataset_split="validation",
        dataset_args={"conversations": manifest["tokens"]["validation"]["rows"]},
        metric_type="loss",
        metric_name="eval_loss",
        metric_value=manifest["eval_loss"],
    )
    return ModelCardData(
        base_model=base,
        base_model_relation="adapter" if base else None,
        library_name="peft",
        license=LICENSE if base else None,
        pipeline_tag="text-generation",
        tags=["lora", "qlora", "mistral", "trl", "sft"],
        model_name=config.run_name,
        eval_results=[result],
    )


def hub_base(config: Config) -> str | None:
    """Return the base's Hub id; for a folder, only if `hf download` recorded there that it has the pinned commit.

    Geometry and tokenizer are the same for other fine-tunes of Mistral-7B.
    """
    if not is_local(config.model.name):
        return config.model.name
    note = resolve(config.model.name) / ".cache" / "huggingface" / "download" / "config.json.metadata"
    commit = note.read_text(encoding="utf-8").splitlines()[:1] if note.is_file() else []
    return MISTRAL if config.model.revision is not None and commit == [config.model.revision] else None


def _requirements(versions: dict[str, str], names: Sequence[str]) -> str:
    """Return pip's requirements to use the adapter, in the run's versions; pip chooses the build, such as +cpu."""
    return " ".join(f"{name}=={versions[name].partition('+')[0]}" for name in names)


def _cards() -> Environment:
    """Return the template's environment; every value not from this program must go through one of its filters."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=False,  # Markdown, not HTML
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {"escaped": _escaped, "code": _code, "cell": _cell, "named": _named, "repr": repr}
    made.filters["count"] = "{:,.0f}".format
    return made


def _named(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def _escaped(text: str) -> str:
    """Return `text` on one line, with Markdown's special characters escaped."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~&])", r"\\\1", " ".join(clean(text).split()))


def _code(text: str) -> str:
    """Return `text` as a code span on one line, fenced by more backticks than any run of them in it."""
    line = " ".join(clean(str(text)).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    room = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{room}{line}{room}{fence}"


def _cell(value: object) -> str:
    """Return a code span for a table, where an unescaped bar would begin the next cell."""
    text = ", ".join(value) if isinstance(value, list) else str(value)
    return _code(text).replace("|", "\\|")
