"""lora.init_from: the adapter a run starts from instead of a new one.

PEFT loads the tensors that fit and ignores the rest silently, so everything that must match is compared first: the
base, the chat template, LoRA's settings, and the name and shape of every tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from finetune.config.base_model import is_local
from finetune.config.schema import Config, LoraConfig
from finetune.errors import ConfigError
from finetune.files import read_json, resolve, sha256, shown
from finetune.plan.model_shape import Geometry
from finetune.runs.adapter import CONFIG, WEIGHTS
from finetune.wording import counted, first_line, listed

TEMPLATE = "chat_template.jinja"
FIX = "name the folder of a finished run of this base with these settings, or null for a new adapter"
# In adapter_config.json: kinds of LoRA this program does not train, each with the values that mean it is off.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    **dict.fromkeys(("use_dora", "use_rslora", "fan_in_fan_out", "lora_bias"), (None, False)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform"), (None, {}, [])),
}


def folder_of(config: Config) -> Path | None:
    """The folder of lora.init_from; None if the run starts with a new adapter."""
    return None if config.lora.init_from is None else resolve(config.lora.init_from)


def digest(config: Config) -> str | None:
    """The sha256 of the weights the run starts from; None for a new adapter. Raises ConfigError."""
    folder = folder_of(config)
    if folder is None:
        return None
    try:
        return _digest_of(folder / WEIGHTS, (folder / WEIGHTS).stat().st_mtime_ns)
    except OSError as error:
        raise _refused(f"{shown(folder / WEIGHTS)}: {error.strerror}") from None


@lru_cache(maxsize=1)
def _digest_of(path: Path, mtime_ns: int) -> str:
    """Hash the file once for manifest, fingerprint and receipt, unless it changes."""
    del mtime_ns
    return sha256(path)


def require(config: Config, template: str, geometry: Geometry) -> None:
    """Raise ConfigError with every reason why this run cannot start from the adapter of lora.init_from.

    `template` is the chat template of the run. Dropout, which is not part of an adapter, may differ.
    """
    folder = folder_of(config)
    if folder is None:
        return
    try:
        found = read_json(folder / CONFIG)
        with safe_open(folder / WEIGHTS, framework="np") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        why = first_line(error)
        if isinstance(error, FileNotFoundError) and error.filename:
            why = f"{shown(Path(error.filename))}: {error.strerror}"
        raise _refused(f"{shown(folder)} is not a complete PEFT adapter: {why}") from None
    problems = [*_settings(found, config), *_template(folder, template), *_tensors(shapes, config.lora, geometry)]
    if problems:
        raise _refused(*(f"{shown(folder)}: {problem}" for problem in problems))


def _refused(*problems: str) -> ConfigError:
    return ConfigError(*(f"lora.init_from: {problem}" for problem in problems), fix=FIX, between="\n")


def _settings(found: dict[str, Any], config: Config) -> Iterator[str]:
    base, name = found.get("base_model_name_or_path"), config.model.name
    expected = resolve(name).name if is_local(name) else name
    if (Path(str(base)).name if is_local(name) else base) != expected:
        yield f"its base is {json.dumps(base)}, the run's is {json.dumps(name)}"
    for key in ("r", "lora_alpha", "bias", "task_type"):
        if found.get(key) != getattr(config.lora, key):
            yield f"its {key} is {json.dumps(found.get(key))}, the run's is {json.dumps(getattr(config.lora, key))}"
    theirs, ours = sorted(found.get("target_modules") or []), sorted(config.lora.target_modules)
    if theirs != ours:
        yield f"its target_modules are {', '.join(theirs)}; the run's are {', '.join(ours)}"
    yield from (
        f"its {key} is {json.dumps(found[key])}" for key in PLAIN if key in found and found[key] not in PLAIN[key]
    )


def _template(folder: Path, template: str) -> Iterator[str]:
    try:
        theirs = (folder / TEMPLATE).read_text(encoding="utf-8")
    except (OSError, ValueError):
        yield f"it has no {TEMPLATE}: how its conversations were written is not known"
        return
    if theirs != template:
        yield f"its {TEMPLATE} differs from the run's"


def _tensors(shapes: dict[str, tuple[int, ...]], lora: LoraConfig, geometry: Geometry) -> Iterator[str]:
    expected = dict(_expected(lora, geometry))
    for what, names in (("lacks", expected.keys() - shapes.keys()), ("also has", shapes.keys() - expected.keys())):
        if names:
            yield f"it {what} {listed(sorted(names), 1)}"
    other = sorted(name for name in expected.keys() & shapes.keys() if expected[name] != shapes[name])
    if other:
        first = other[0]
        differ = counted(len(other), "tensor")
        yield f"{differ} of another shape, the first {first}: {shapes[first]}, expected {expected[first]}"


def _expected(lora: LoraConfig, geometry: Geometry) -> Iterator[tuple[str, tuple[int, int]]]:
    """PEFT's name and the shape of each tensor of an adapter with these settings."""
    shapes = geometry.linear_shapes()
    for layer in range(geometry.num_hidden_layers):
        for module in lora.target_modules:
            block = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            name = f"base_model.model.model.layers.{layer}.{block}.{module}"
            inputs, outputs = shapes[module]
            yield f"{name}.lora_A.weight", (lora.r, inputs)
            yield f"{name}.lora_B.weight", (outputs, lora.r)
