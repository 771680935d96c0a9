"""The adapter that a run begins with: it fits in all that PEFT would pass over, or is refused with what differs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.data.template import MISTRAL_FORMAT
from finetune.errors import ConfigError
from finetune.files import read_json, sha256, write_json
from finetune.model.lora import add_lora
from finetune.plan.model_shape import read_geometry
from finetune.runs.manifest import fingerprint
from finetune.runs.resume import differences
from finetune.runs.warm_start import FIX, digest, require
from support.bases import base_model

A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def saved(tiny_mistral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter's folder, as a finished run has it."""
    folder = tmp_path_factory.mktemp("saved")
    config = load_config("cpu", [f"model.name={tiny_mistral}", "lora.r=4"])[0]
    add_lora(base_model(config), config.lora, 1).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(MISTRAL_FORMAT.template, encoding="utf-8")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """One of one's own."""
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def config_of(base: Path, folder: Path, *settings: str) -> Config:
    return load_config("cpu", [f"model.name={base}", "lora.r=4", f"lora.init_from={folder}", *settings])[0]


def refusal(config: Config) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        require(config, MISTRAL_FORMAT.template, read_geometry(config))
    assert refused.value.fix == FIX
    return list(refused.value.problems)


def change(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    write_json(path, read_json(path) | values)


def retensor(folder: Path, act: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = dict(load_file(folder / "adapter_model.safetensors"))
    act(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def test_an_adapter_of_this_base_template_and_lora_fits_whatever_its_dropout(tiny_mistral: Path, folder: Path) -> None:
    config = config_of(tiny_mistral, folder, "lora.lora_dropout=0.3")
    require(config, MISTRAL_FORMAT.template, read_geometry(config))
    assert digest(config) == sha256(folder / "adapter_model.safetensors")


def test_a_new_adapter_needs_nothing(tiny_mistral: Path) -> None:
    config = load_config("cpu", [f"model.name={tiny_mistral}"])[0]
    require(config, MISTRAL_FORMAT.template, read_geometry(config))
    assert digest(config) is None


@pytest.mark.parametrize(
    ("act", "found"),
    [
        (lambda at: change(at, base_model_name_or_path="a/b"), "its base is \"a/b\", the run's is \"BASE\""),
        (lambda at: change(at, lora_alpha=8), "its lora_alpha is 8, the run's is 32"),
        (lambda at: change(at, target_modules=["q_proj"]), "its target_modules are q_proj; the run's are down_proj, "
            "gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"),
        (lambda at: change(at, use_dora=True), "its use_dora is true"),
        (lambda at: change(at, rank_pattern={"q_proj": 8}), "its rank_pattern is {\"q_proj\": 8}"),
        (lambda at: (at / "chat_template.jinja").write_text("{{ messages }}"),
            "its chat_template.jinja differs from the run's"),
        (lambda at: (at / "chat_template.jinja").unlink(),
            "it has no chat_template.jinja: how its conversations were written is not known"),
        (lambda at: retensor(at, lambda them: them.pop(A)), f"it lacks {A}"),
        (lambda at: retensor(at, lambda them: them.update(other=them[A].clone())), "it also has other"),
        (lambda at: retensor(at, lambda them: them.update({A: them[A][:, :32].contiguous()})),
            f"1 tensor of another shape, the first {A}: (4, 32), expected (4, 64)"),
    ],
)  # fmt: skip
def test_one_difference_is_refused_by_name(
    act: Callable[[Path], object], found: str, tiny_mistral: Path, folder: Path
) -> None:
    act(folder)
    (line,) = refusal(config_of(tiny_mistral, folder))
    assert line.replace(str(tiny_mistral), "BASE") == f"lora.init_from: {folder}: {found}"


def test_all_differences_are_told_at_once(tiny_mistral: Path, folder: Path) -> None:
    lines = refusal(config_of(tiny_mistral, folder, "lora.r=8", "lora.lora_alpha=16"))
    where, first = f"lora.init_from: {folder}", "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    assert lines == [
        f"{where}: its r is 4, the run's is 8",
        f"{where}: its lora_alpha is 32, the run's is 16",
        f"{where}: 28 tensors of another shape, the first {first}: (4, 128), expected (8, 128)",
    ]


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("adapter_config.json", b"{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("adapter_model.safetensors", b"abc", "Error while deserializing header: header too small"),
    ],
)
def test_a_folder_without_a_whole_adapter_is_refused(
    name: str, content: bytes, found: str, tiny_mistral: Path, folder: Path
) -> None:
    (folder / name).write_bytes(content)
    assert refusal(config_of(tiny_mistral, folder)) == [
        f"lora.init_from: {folder} is not a complete PEFT adapter: {found}"
    ]


def test_other_weights_are_another_run(tiny_mistral: Path, folder: Path) -> None:
    config = config_of(tiny_mistral, folder)
    prepared: Any = SimpleNamespace(tokens={}, chat=SimpleNamespace(fingerprint=""))
    then, was = fingerprint(config, prepared), digest(config)
    retensor(folder, lambda them: them[A].mul_(2))
    assert list(differences(then, fingerprint(config, prepared))) == [f"init_adapter: {was} -> {digest(config)}"]


def test_weights_that_are_gone_when_a_run_goes_on_are_told(tiny_mistral: Path, folder: Path) -> None:
    config = config_of(tiny_mistral, folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError) as refused:
        digest(config)
    assert refused.value.found == f"lora.init_from: {folder}/adapter_model.safetensors: No such file or directory"
