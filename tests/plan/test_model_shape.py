"""The base model's shape, from its Hub id or a local folder's config.json."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from finetune.config import load
from finetune.errors import ConfigError
from finetune.machine.platforms import PLATFORMS
from finetune.plan.model_shape import DEMO_135M, MISTRAL_7B, Geometry, read_geometry

SMALL: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"], "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 32000, "tie_word_embeddings": True,
    "rope_theta": 10000.0,
}  # fmt: skip
LARGE = {"architectures": ["MistralForCausalLM"], **dataclasses.asdict(MISTRAL_7B)}


def read(folder: Path, content: object, platform: str = "cpu") -> Geometry:
    """The geometry of a local folder whose config.json holds `content` (text as it stands; None: no such file)."""
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / "config.json").write_text(text, encoding="utf-8")
    return read_geometry(load.load_config(platform, [f"model.name={folder}"])[0])


def problem(folder: Path, content: object, platform: str = "cpu") -> str:
    with pytest.raises(ConfigError) as caught:
        read(folder, content, platform)
    return str(caught.value)


@pytest.mark.parametrize("platform", ["h100", "m4"])
def test_the_hub_id_is_mistral_7b_without_a_look_at_any_file(platform: str) -> None:
    assert read_geometry(load.load_config(platform)[0]) == Geometry(4096, 14336, 32, 32, 8, 32000, False)


@pytest.mark.parametrize("platform", ["h100", "cpu"])
def test_more_layers_to_checkpoint_than_the_model_has_are_refused(platform: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LARGE), encoding="utf-8")
    on_cpu = [f"model.name={tmp_path}", "training.gradient_checkpointing=true"]
    local = on_cpu if platform == "cpu" else []
    assert read_geometry(load.load_config(platform, [*local, "training.checkpointed_layers=32"])[0]) == MISTRAL_7B
    with pytest.raises(ConfigError) as caught:
        read_geometry(load.load_config(platform, [*local, "training.checkpointed_layers=33"])[0])
    text = "training.checkpointed_layers: 33, but the model has 32 layers; expected 0 to 32, all or auto"
    assert caught.value.problems == (text,)


def test_the_seven_linear_layers_of_mistral_7b_have_their_published_shapes() -> None:
    assert MISTRAL_7B.linear_shapes() == {
        "q_proj": (4096, 4096), "k_proj": (4096, 1024), "v_proj": (4096, 1024), "o_proj": (4096, 4096),
        "gate_proj": (4096, 14336), "up_proj": (4096, 14336), "down_proj": (14336, 4096),
    }  # fmt: skip


def test_the_shapes_are_those_of_transformers_own_mistral(tiny_mistral: Path) -> None:
    from safetensors import safe_open

    geometry = read_geometry(load.load_config("cpu", [f"model.name={tiny_mistral}"])[0])
    with safe_open(tiny_mistral / "model.safetensors", "pt") as tensors:
        found = {
            name.split(".")[-2]: tuple(reversed(tensors.get_slice(name).get_shape()))
            for name in tensors.keys()  # noqa: SIM118  (safe_open is no mapping)
            if ".layers.0." in name and name.endswith("_proj.weight")
        }
    assert geometry.linear_shapes() == found


def test_a_local_folder_is_what_its_config_says_on_cpu(tmp_path: Path) -> None:
    assert read(tmp_path, SMALL) == Geometry(64, 128, 2, 4, 2, 32000, True)


@pytest.mark.parametrize("platform", ["h100", "m4"])
def test_a_local_folder_may_hold_mistral_7b_itself(platform: str, tmp_path: Path) -> None:
    assert read(tmp_path, LARGE, platform) == MISTRAL_7B


def test_embeddings_are_not_tied_where_the_file_does_not_say(tmp_path: Path) -> None:
    silent = {key: value for key, value in LARGE.items() if key != "tie_word_embeddings"}
    assert read(tmp_path, silent, "h100") == MISTRAL_7B


def test_a_folder_without_config_json_is_refused(tmp_path: Path) -> None:
    assert problem(tmp_path, None) == (
        f"config: 1 problem\n  model.name: {tmp_path}/config.json: No such file or directory; "
        "expected a folder with a model in it"
    )


@pytest.mark.parametrize(("size", "shown"), [(None, "None"), ("8", "'8'"), (0, "0"), (-2, "-2"), (2.0, "2.0")])
def test_a_size_that_is_no_positive_whole_number_is_refused_by_its_name(
    size: object, shown: str, tmp_path: Path
) -> None:
    assert problem(tmp_path, {**SMALL, "num_key_value_heads": size}) == (
        f"config: 1 problem\n  model.name: {tmp_path}/config.json: num_key_value_heads is {shown}; "
        "expected positive whole numbers"
    )


@pytest.mark.parametrize("text", ['"text"', "[]", "null", "7"])
def test_json_that_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    assert problem(tmp_path, text) == (
        f"config: 1 problem\n  model.name: {tmp_path}/config.json is a None, expected ['MistralForCausalLM']"
    )


@pytest.mark.parametrize("platform", ["h100", "m4"])
def test_a_smaller_or_tied_model_is_refused_where_mistral_7b_is_wanted(platform: str, tmp_path: Path) -> None:
    other = {**LARGE, "vocab_size": 32768, "num_hidden_layers": 2, "tie_word_embeddings": True}
    assert problem(tmp_path, other, platform) == (
        f"config: 1 problem\n  model.name: {tmp_path}/config.json is not Mistral-7B: "
        "num_hidden_layers 2 (expected 32), vocab_size 32768 (expected 32000), "
        "tie_word_embeddings True (expected False); train other models on platform cpu"
    )


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_demos_base_is_a_base_everywhere(platform: str, tmp_path: Path) -> None:
    demo = {"architectures": ["MistralForCausalLM"], **dataclasses.asdict(DEMO_135M)}
    assert read(tmp_path, demo, platform) == DEMO_135M
