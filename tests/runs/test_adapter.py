"""Which adapter a name means, and by which config its base is held; what is no adapter, or a damaged one, is told."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from finetune.cli import PYTHON
from finetune.config.base_model import MISTRAL
from finetune.config.load import load_config
from finetune.config.yaml_file import dump
from finetune.errors import CheckFailed, ConfigError, UserError
from finetune.files import ROOT, read_json, write_json
from finetune.machine.inspect import read_machine
from finetune.machine.platforms import choose
from finetune.runs.adapter import Adapter, find
from finetune.terminal import Terminal
from finetune.wording import SILENT
from support.taught import Taught

WANTED = "name a run's folder (adapters/RUN), one of its checkpoints, or a PEFT adapter in a folder or on the Hub"
CHAT = f"{PYTHON} scripts/chat.py"


@pytest.fixture
def run(taught: Taught, tmp_path: Path) -> Path:
    """A finished run's folder of one's own."""
    return Path(shutil.copytree(taught.run, tmp_path / "run"))


def stopped(run: Path) -> Path:
    """As a run's folder is before its end."""
    for path in run.glob("adapter_*"):
        path.unlink()
    write_json(run / "manifest.json", {"status": "interrupted"})
    return run


def plain(run: Path) -> Path:
    """The adapter alone, without the run."""
    folder = run.parent / "plain"
    folder.mkdir()
    for path in run.glob("adapter_*"):
        shutil.copy(path, folder)
    return folder


def damage(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def found(name: Path | str, *settings: str) -> tuple[Adapter, list[str]]:
    """The adapter, and the lines that were printed."""
    stream = io.StringIO()
    adapter = find(str(name), settings, Terminal(stream=stream))
    return adapter, stream.getvalue().splitlines()


def refused(kind: type[UserError], name: Path | str) -> str:
    with pytest.raises(kind) as error:
        found(name)
    return str(error.value).removeprefix("config: 1 problem\n  ")


# A run ----------------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_its_final_adapter_under_its_own_config(taught: Taught, run: Path) -> None:
    adapter, printed = found(run)
    assert adapter == Adapter(run, taught.config)
    assert printed == [f"config: {run}/config.yaml", f"adapter: {run}, eval_loss 1.2500 (step 4)"]


def test_a_setting_changes_how_the_base_is_held(run: Path) -> None:
    assert found(run, "quantization.storage=expanded")[0].config.quantization.storage == "expanded"


def test_final_weights_that_are_not_those_that_were_saved_are_refused(run: Path) -> None:
    weights = run / "adapter_model.safetensors"
    wanted = (
        f"{weights} is not the file that the run saved; "
        f"copy it again, or talk to the best checkpoint: {CHAT} {run}/checkpoints/best"
    )
    damage(run)
    assert refused(CheckFailed, run) == wanted
    weights.unlink()
    assert refused(CheckFailed, run) == wanted


def test_of_an_unfinished_run_it_is_the_best_checkpoint_so_far(run: Path) -> None:
    adapter, printed = found(stopped(run))
    assert adapter.folder == run / "checkpoints" / "best"
    assert printed[1:] == [f"adapter: {run}/checkpoints/best, step 4, eval_loss 1.2500; the run is not finished"]


def test_where_the_best_is_damaged_it_is_the_newest_that_is_whole(run: Path) -> None:
    damage(stopped(run) / "checkpoints" / "best")
    adapter, printed = found(run)
    assert adapter.folder == run / "checkpoints" / "checkpoint-6"
    changed = "adapter_model.safetensors is not what was saved (sha256 differs)"
    assert printed[::2] == [
        f"warning: best is damaged ({changed}), so another checkpoint is used",
        f"adapter: {run}/checkpoints/checkpoint-6, step 6, saved without an evaluation; the run is not finished",
    ]


def test_a_run_without_a_checkpoint_has_no_adapter_yet(run: Path) -> None:
    shutil.rmtree(stopped(run) / "checkpoints")
    assert refused(CheckFailed, run) == (
        f"{run} has no adapter yet: the run is not finished, and none of its checkpoints is intact; "
        "resume it first: type the command that started it"
    )


def test_an_adapter_that_failed_its_self_test_is_talked_to_only_by_name(run: Path) -> None:
    rejected = run / "rejected"
    rejected.mkdir()
    for path in run.glob("adapter_*"):
        shutil.copy(path, rejected)
    assert refused(CheckFailed, stopped(run)) == (
        f"{run} has no adapter: it failed its self-test; to talk to it anyway: {CHAT} {rejected}"
    )
    adapter, printed = found(rejected)
    assert (adapter.folder, printed) == (rejected, [f"config: {run}/config.yaml", f"adapter: {rejected}"])


def test_a_checkpoint_by_its_name(run: Path) -> None:
    folder = run / "checkpoints" / "checkpoint-4"
    adapter, printed = found(folder)
    assert (adapter.folder, printed) == (
        folder, [f"config: {run}/config.yaml", f"adapter: {folder}, step 4, eval_loss 1.2500"],
    )  # fmt: skip


def test_a_checkpoint_that_is_damaged_is_refused(run: Path) -> None:
    folder = run / "checkpoints" / "checkpoint-4"
    damage(folder)
    assert refused(CheckFailed, folder) == (
        f"{folder} is damaged: adapter_model.safetensors is not what was saved (sha256 differs); "
        "name another checkpoint, or the run's folder"
    )


def test_a_run_for_another_platform_is_held_as_this_machine_holds_a_base(run: Path) -> None:
    here, why = choose(read_machine())
    other = "m4" if here.name == "h100" else "h100"
    its = load_config(other, ["model.max_seq_length=1000", "system_prompt=Be kind."])[0]
    (run / "config.yaml").write_text(dump(its.as_dict()), encoding="utf-8")
    adapter, printed = found(run)
    config = adapter.config
    assert (config.platform, config.model.max_seq_length, config.system_prompt) == (here.name, 1000, "Be kind.")
    assert (config.model.name, config.model.revision) == (MISTRAL, its.model.revision)
    label = {"m4": "Apple silicon", "h100": "NVIDIA GPU"}[other]
    assert printed[0] == (
        f"config: configs/training_config_{here.name}.yaml ({why}); the run was made for {label} ({other})"
    )


def test_a_device_that_is_not_here_is_told(taught: Taught) -> None:
    here = choose(read_machine())[0].name
    config = taught.config.model_copy(update={"platform": "m4" if here == "h100" else "h100"})
    with pytest.raises(CheckFailed) as error:
        Adapter(taught.run, config).load(SILENT)
    found, fix = str(error.value).rsplit("; ", 1)
    assert re.match(r"device: this config is for .* \(\w+\), but torch [\w.+]+ sees none$", found)
    assert fix == f"{PYTHON} scripts/check_gpu.py says what this machine has"


# An adapter without a run ---------------------------------------------------------------------------------------------


def test_a_plain_adapter_names_its_base_which_this_machine_holds_its_own_way(taught: Taught, run: Path) -> None:
    here, why = choose(read_machine())
    folder = plain(run)
    adapter, printed = found(folder)
    assert (adapter.folder, adapter.config.model.name) == (folder, str(taught.base))
    assert adapter.config.platform == here.name
    assert printed == [f"config: configs/training_config_{here.name}.yaml ({why})", f"adapter: {folder}"]


@pytest.mark.parametrize(
    ("base", "shown"),
    [
        ("meta-llama/Llama-2-7b", "'meta-llama/Llama-2-7b' (text)"),
        ("/elsewhere/mistral", "'/elsewhere/mistral' (text)"),
        (None, "null"),
        (7, "7 (whole number)"),
    ],
)
def test_a_foreign_base_is_refused(run: Path, base: object, shown: str) -> None:
    path = plain(run) / "adapter_config.json"
    write_json(path, read_json(path) | {"base_model_name_or_path": base})
    assert refused(ConfigError, path.parent) == (
        f"{path}: base_model_name_or_path is {shown}, expected {MISTRAL} or a local folder; "
        "an adapter works only on its own base; if that is here, name it in this file"
    )


def test_a_base_of_another_architecture_is_refused(run: Path, tmp_path: Path) -> None:
    base = tmp_path / "llama"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}), encoding="utf-8")
    path = plain(run) / "adapter_config.json"
    write_json(path, read_json(path) | {"base_model_name_or_path": str(base)})
    assert refused(ConfigError, path.parent) == (
        f"model.name: {base}/config.json is a ['LlamaForCausalLM'], expected ['MistralForCausalLM']"
    )


def test_an_adapters_config_that_is_no_json_is_refused(run: Path) -> None:
    path = plain(run) / "adapter_config.json"
    path.write_text("{", encoding="utf-8")
    wanted = f"{path} cannot be read: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"
    assert refused(CheckFailed, path.parent) == wanted


def test_a_folder_without_an_adapter_is_told_what_is_wanted(tmp_path: Path) -> None:
    assert refused(ConfigError, tmp_path) == f"{tmp_path}: no adapter_config.json in it; {WANTED}"


@pytest.mark.parametrize("name", ["adapters/no-such-run", "no-such-run", "configs/a/b", "~/x"])
def test_a_folder_that_is_not_there_is_not_asked_for_at_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked"))
    assert refused(ConfigError, name) == f"{name}: no such folder; {WANTED}"


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub's cache, and no Hub."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_an_adapter_on_the_hub_is_taken_from_its_cache(offline: Path, run: Path) -> None:
    repository = offline / "models--me--adapter"
    snapshot = repository / "snapshots" / ("5" * 40)
    snapshot.parent.mkdir(parents=True)
    plain(run).rename(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("5" * 40, encoding="utf-8")
    assert found("me/adapter")[0].folder == snapshot


@pytest.mark.usefixtures("offline")
def test_one_that_the_hub_does_not_give_is_told_with_what_to_type() -> None:
    first, fix = refused(CheckFailed, "me/adapter").splitlines()
    assert first.startswith("me/adapter: no such folder, and the Hub has no such adapter: ")
    assert fix == f"{WANTED}; a private one needs a token: export HF_TOKEN=hf_..."
