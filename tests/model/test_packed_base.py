"""A base that was quantized once is loaded packed by later starts, with the same bits, and only where it is whole."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch

from finetune.config.schema import Config
from finetune.model import load as model_module
from finetune.model import packed_base
from finetune.model.load import load_base
from finetune.wording import Report
from support.bases import layers


class Loads:
    """Loads `config`'s base for a device on which nothing can be quantized (`meta` stands for MPS); what each said."""

    def __init__(self, config: Config, cache: Path, patch: pytest.MonkeyPatch) -> None:
        self.config, self.cache, self.quantized = config, cache, 0
        self.said: list[str] = []
        self.values: dict[str, torch.Tensor] = {}
        self.folder = folder_of(cache, config)
        quantize, verify = bitsandbytes.functional.quantize_4bit, model_module.verify_base

        def counted(*arguments: Any, **options: Any) -> Any:
            self.quantized += 1
            return quantize(*arguments, **options)

        def seen(base: Any, *arguments: Any) -> None:
            if arguments[2] == "cpu":
                self.values = unpacked(base)
                self.state = {name: value.clone() for name, value in base.state_dict().items()}
                self.about = base.name_or_path, base.config.to_dict(), base.generation_config.to_dict()
            verify(base, *arguments)

        patch.setattr(bitsandbytes.functional, "quantize_4bit", counted)
        patch.setattr(model_module, "verify_base", seen)
        patch.setattr(model_module, "duration", lambda _: "6 min")

    def __call__(self, storage: str = "expanded") -> Any:
        self.said.clear()
        self.quantized = 0
        quantization = self.config.changed("quantization", storage=storage).quantization
        report = Report(
            decision=lambda what, because: self.said.append(f"{what}: {because}"),
            warn=lambda text: self.said.append(f"warning: {text}"),
        )
        return load_base(self.config.model, quantization, "meta", report, self.cache)


def folder_of(cache: Path, config: Config) -> Path:
    return packed_base.cache_in(cache).folder_of(packed_base.key(config.model, config.quantization))


def made(loads: Loads) -> str:
    return f"packed base: quantized on the CPU in 6 min, and kept in {loads.folder} for later starts"


def unpacked(base: Any) -> dict[str, torch.Tensor]:
    weights = {name: base.get_submodule(name).weight for name in layers()}
    return {name: bitsandbytes.functional.dequantize_4bit(it.data, it.quant_state) for name, it in weights.items()}


@pytest.fixture(params=["float32", "bfloat16"])
def loads(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Loads:
    changed = config.changed("model", dtype=request.param)
    changed = changed.changed("quantization", bnb_4bit_compute_dtype=request.param)
    return Loads(changed, tmp_path / "cache", monkeypatch)


def test_the_second_load_quantizes_nothing_and_has_the_same_bits(loads: Loads) -> None:
    loads()
    values, state, about = loads.values, loads.state, loads.about
    assert loads.quantized == 14
    assert loads.said == [made(loads)]
    loads()
    assert loads.quantized == 0
    assert loads.said == [f"packed base: loaded from {loads.folder} in 6 min, not quantized again"]
    assert len(values) == 14 and all(torch.equal(loads.values[name], value) for name, value in values.items())
    assert loads.state.keys() == state.keys()
    assert all(torch.equal(loads.state[name], value) for name, value in state.items())
    assert loads.about == about


@pytest.fixture
def once(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loads:
    """After the first load, which kept the base."""
    loads = Loads(config, tmp_path / "cache", monkeypatch)
    loads()
    return loads


def test_a_packed_base_is_kept_too_and_moved_packed(once: Loads) -> None:
    base = once("packed")
    assert once.quantized == 0
    assert {value.device.type for value in (*base.parameters(), *base.buffers())} == {"meta"}
    states = [base.get_submodule(name).weight.quant_state for name in layers()]
    assert {(it.absmax.device.type, it.state2.absmax.device.type) for it in states} == {("meta", "meta")}


def test_where_the_device_quantizes_itself_nothing_is_kept(config: Config, tmp_path: Path) -> None:
    load_base(config.model, config.quantization, "cpu", cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_damaged_one_is_set_aside_and_made_again(once: Loads) -> None:
    (once.folder / "config.json").unlink()
    once()
    assert once.quantized == 14
    damaged = f"warning: {once.folder} is damaged (config.json is missing)"
    assert once.said == [f"{damaged}; set aside as {once.folder.name}.damaged and made again", made(once)]
    assert once.folder.with_name(f"{once.folder.name}.damaged").is_dir()


def test_weights_that_are_fetched_now_are_quantized_once(once: Loads, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of what is kept depends on them."""
    shutil.rmtree(once.folder)
    monkeypatch.setattr(model_module, "is_local", lambda _: False)
    monkeypatch.setattr(model_module, "is_cached", lambda *_: False)
    monkeypatch.setattr(model_module, "_source", lambda model: model.name)
    once()
    assert (once.quantized, once.said) == (14, [made(once)])


def test_a_disk_that_does_not_take_it_is_a_warning_and_the_load_succeeds(once: Loads) -> None:
    shutil.rmtree(once.folder)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        once()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (once.quantized, once.said) == (
        14,
        [
            f"warning: the packed base cannot be kept in {once.cache} "
            "(Error while serializing: I/O error: File too large (os error 27)): each start will quantize it"
        ],
    )
    assert [path.name for path in once.cache.iterdir()] == ["packed-lock"]


def test_a_folder_that_cannot_be_made_is_a_warning_and_the_load_succeeds(once: Loads) -> None:
    once.cache = once.cache.parent / "file"
    once.cache.touch()
    once()
    assert once.quantized == 14
    found = f"output.dir: {once.cache}: File exists"
    assert once.said == [
        f"warning: the packed base cannot be kept in {once.cache} ({found}): each start will quantize it"
    ]


def test_other_weights_settings_and_libraries_have_a_folder_of_their_own(
    once: Loads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = once.config

    def name(changed: Config) -> str:
        return folder_of(once.cache, changed).name

    copy = tmp_path / "copy"
    shutil.copytree(config.model.name, copy)
    same = config.changed("model", name=str(copy)).changed("quantization", storage="expanded")
    assert name(same) == once.folder.name
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    names = [
        once.folder.name,
        name(same),
        name(config.changed("model", dtype="bfloat16")),
        name(config.changed("quantization", bnb_4bit_use_double_quant=False)),
        name(config.changed("quantization", bnb_4bit_quant_type="fp4")),
        name(config.changed("quantization", bnb_4bit_compute_dtype="bfloat16")),
    ]
    for library in packed_base.LIBRARIES:
        with monkeypatch.context() as patch:
            patch.setattr(packed_base, "version", lambda asked, other=library: "0" if asked == other else "1")
            names.append(name(config))
    assert len(set(names)) == len(names)
