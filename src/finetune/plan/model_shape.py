"""The base model's shape, which the plan computes with, read without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.config.base_model import MISTRAL, is_local
from finetune.errors import ConfigError
from finetune.files import read_json, resolve
from finetune.machine.platforms import PLATFORMS

if TYPE_CHECKING:
    from finetune.config.schema import Config


@dataclass(frozen=True)
class Geometry:
    """transformers' MistralConfig names; counts and sizes, no units."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(in_features, out_features) of each linear layer of one decoder layer."""
        hidden, intermediate = self.hidden_size, self.intermediate_size
        keys = hidden // self.num_attention_heads * self.num_key_value_heads
        return {
            "q_proj": (hidden, hidden),
            "k_proj": (hidden, keys),
            "v_proj": (hidden, keys),
            "o_proj": (hidden, hidden),
            "gate_proj": (hidden, intermediate),
            "up_proj": (hidden, intermediate),
            "down_proj": (intermediate, hidden),
        }


MISTRAL_7B = Geometry(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=32000,
    tie_word_embeddings=False,
)


# The demo's base; scripts/make_demo_model.py makes it.
DEMO_135M = Geometry(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    tie_word_embeddings=True,
)


def read_geometry(config: Config) -> Geometry:
    """The base model's geometry: Mistral-7B's own, or that of a local folder's config.json.

    On h100 and m4 a folder must contain Mistral-7B or the demo's base; on cpu, any MistralForCausalLM. Raises
    ConfigError, also if training.checkpointed_layers exceeds the number of layers.
    """
    remote = config.model.name == MISTRAL and not is_local(config.model.name)
    found = MISTRAL_7B if remote else _local_geometry(config)
    asked, layers = config.training.checkpointed_layers, found.num_hidden_layers
    if isinstance(asked, int) and asked > layers:
        expected = f"expected 0 to {layers}, all or auto"
        raise ConfigError(f"training.checkpointed_layers: {asked}, but the model has {layers} layers", fix=expected)
    return found


def _local_geometry(config: Config) -> Geometry:
    path = resolve(config.model.name) / "config.json"
    try:
        values = read_json(path)
    except OSError as error:
        raise ConfigError(f"model.name: {path}: {error.strerror}", fix="expected a folder with a model in it") from None
    except ValueError as error:
        raise ConfigError(f"model.name: {path} is not JSON: {error}") from None
    architectures = values.get("architectures") if isinstance(values, dict) else None
    if architectures != ["MistralForCausalLM"]:
        raise ConfigError(f"model.name: {path} is a {architectures}, expected ['MistralForCausalLM']")
    found = Geometry(**_sizes(values, path))
    if found not in (MISTRAL_7B, DEMO_135M) and not PLATFORMS[config.platform].any_base:
        problem = f"model.name: {path} is not Mistral-7B: {_difference(found)}"
        raise ConfigError(problem, fix="train other models on platform cpu")
    return found


def _sizes(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Geometry's fields from a config.json. Raises ConfigError with all that are not positive whole numbers."""
    sizes = {name: values.get(name) for name in Geometry.__annotations__}
    sizes["tie_word_embeddings"] = bool(sizes["tie_word_embeddings"])  # transformers omits defaults from the file
    wrong = [f"{name} is {size!r}" for name, size in sizes.items() if not (isinstance(size, int) and size >= 0)]
    wrong += [f"{name} is 0" for name, size in sizes.items() if size == 0 and name != "tie_word_embeddings"]
    if wrong:
        raise ConfigError(f"model.name: {path}: {', '.join(wrong)}", fix="expected positive whole numbers")
    return sizes


def _difference(found: Geometry) -> str:
    pairs: dict[str, tuple[Any, Any]] = {
        name: (getattr(found, name), getattr(MISTRAL_7B, name)) for name in Geometry.__annotations__
    }
    return ", ".join(f"{name} {ours} (expected {theirs})" for name, (ours, theirs) in pairs.items() if ours != theirs)
