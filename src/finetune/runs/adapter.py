"""Finds the adapter that a name refers to (a run, checkpoint, folder or Hub id), and the config to load its base with.

A run has its own config. If the run was made for another platform, and for an adapter without a run, this machine's
platform decides how the base is loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.cli import command
from finetune.config.base_model import MISTRAL, is_local
from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.errors import CheckFailed, ConfigError
from finetune.files import quoted, read_json, resolve, seal_facts, sha256, shown
from finetune.machine.device import memory_errors_explained, prepare_device
from finetune.machine.inspect import read_machine
from finetune.machine.platforms import PLATFORMS, choose
from finetune.model.hub import GIVE_TOKEN
from finetune.plan.model_shape import read_geometry
from finetune.runs.checkpoints import BEST, damage, saved
from finetune.runs.folder import REJECTED, read_manifest
from finetune.terminal import Terminal
from finetune.wording import Report, first_line, show

if TYPE_CHECKING:
    from peft import PeftModel

CHAT = "scripts/chat.py"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FREE = "close other programs that use it, or start with --set quantization.storage=packed"
WANTED = "name a run's folder (adapters/RUN), one of its checkpoints, or a PEFT adapter in a folder or on the Hub"


@dataclass(frozen=True)
class Adapter:
    """A folder with a PEFT adapter, and the config to load its base with."""

    folder: Path
    config: Config

    def load(self, report: Report) -> PeftModel:
        """Load the base and put the adapter on it. Raises CheckFailed if one cannot be loaded, and OutOfResource."""
        from finetune.model.load import load_base
        from finetune.model.lora import load_adapter

        platform = PLATFORMS[self.config.platform]
        try:
            prepare_device(platform)
        except CheckFailed as error:
            raise CheckFailed(error.found, f"{command('scripts/check_gpu.py')} says what this machine has") from None
        with memory_errors_explained(FREE):
            cache = resolve(self.config.output.dir) / ".cache"
            base = load_base(self.config.model, self.config.quantization, platform.device, report, cache)
            return load_adapter(base, self.folder)


def find(name: str, settings: Sequence[str], terminal: Terminal) -> Adapter:
    """Return the adapter that `name` refers to; print which one it is, and where its config is from.

    Raises ConfigError if there is none for a base this program knows, CheckFailed if it is damaged or not saved yet.
    """
    folder = Path(name).resolve()
    if not folder.is_dir():
        folder = _fetched(name)
    run = _run_of(folder)
    folder, which = _of_run(run, terminal) if folder == run else _in_folder(folder)
    config, source = _config(folder, run, settings)
    read_geometry(config)  # raises where the base has another architecture
    terminal.decision("config", source)
    terminal.decision("adapter", which)
    return Adapter(folder, config)


def _fetched(name: str) -> Path:
    """Download the adapter `name` from the Hub; a path in an existing folder is not taken for a Hub id."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or Path(name).parent.is_dir():
        raise ConfigError(f"{name}: no such folder", fix=WANTED)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))
    except (OSError, ValueError) as error:  # the client's own errors are some of these
        found = f"{name}: no such folder, and the Hub has no such adapter: {first_line(error)}"
        raise CheckFailed(found, f"{WANTED}; a private one needs a token: {GIVE_TOKEN}", between="\n") from None


def _run_of(folder: Path) -> Path | None:
    """Return the run that `folder` is part of: its own folder, a checkpoint or a rejected adapter."""
    above = folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent
    runs = [run for run in (folder, above) if read_manifest(run) and (run / "config.yaml").is_file()]
    return runs[0] if runs else None


def _of_run(run: Path, terminal: Terminal) -> tuple[Path, str]:
    """Return a run's final adapter, or the best one saved by an unfinished run, and a description of it."""
    manifest = read_manifest(run)
    if manifest["status"] == "complete":
        weights = run / WEIGHTS
        if not weights.is_file() or sha256(weights) != manifest["adapter_sha256"]:
            found = f"{shown(weights)} is not the file that the run saved"
            fix = f"copy it again, or talk to the best checkpoint: {command(CHAT)} {quoted(run / 'checkpoints' / BEST)}"
            raise CheckFailed(found, fix)
        return run, f"{shown(run)}, eval_loss {manifest['eval_loss']:.4f} (step {manifest['best_step']})"
    if (run / REJECTED).is_dir():
        found = f"{shown(run)} has no adapter: it failed its self-test"
        raise CheckFailed(found, f"to talk to it anyway: {command(CHAT)} {quoted(run / REJECTED)}")
    for folder in [run / "checkpoints" / BEST, *reversed(saved(run / "checkpoints"))]:
        wrong = damage(folder) if folder.is_dir() else None
        if wrong:
            terminal.warn(f"{folder.name} is damaged ({wrong}), so another checkpoint is used")
        elif folder.is_dir():
            return folder, f"{shown(folder)}, {_saved_at(folder)}; the run is not finished"
    found = f"{shown(run)} has no adapter yet: the run is not finished, and none of its checkpoints is intact"
    raise CheckFailed(found, "resume it first: type the command that started it")


def _in_folder(folder: Path) -> tuple[Path, str]:
    """Return an intact checkpoint of a run, or any other folder with an adapter, and a description of it."""
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{shown(folder)}: no {CONFIG} in it", fix=WANTED)
    if folder.parent.name != "checkpoints":
        return folder, f"{shown(folder)}"
    if wrong := damage(folder):
        raise CheckFailed(f"{shown(folder)} is damaged: {wrong}", "name another checkpoint, or the run's folder")
    return folder, f"{shown(folder)}, {_saved_at(folder)}"


def _saved_at(folder: Path) -> str:
    facts = seal_facts(folder)
    loss = facts.get("eval_loss")
    return f"step {facts['step']}, " + ("saved without an evaluation" if loss is None else f"eval_loss {loss:.4f}")


def _config(folder: Path, run: Path | None, settings: Sequence[str]) -> tuple[Config, str]:
    """Return the config to load the base with, and where it is from."""
    if run is None:
        return load_config(None, [_setting("model.name", _base_of(folder)), *settings])
    path = run / "config.yaml"
    config, _ = load_config(str(path), settings)
    platform, here = PLATFORMS[config.platform], choose(read_machine())[0]
    if platform is here or not platform.accelerated:
        return config, str(shown(path))
    own: dict[str, Any] = {"model.name": config.model.name, "model.revision": config.model.revision}
    own |= {"model.max_seq_length": config.model.max_seq_length, "system_prompt": config.system_prompt}
    config, source = load_config(None, [*(_setting(key, value) for key, value in own.items()), *settings])
    return config, f"{source}; the run was made for {platform.label} ({platform.name})"


def _setting(key: str, value: Any) -> str:
    """Format a key for --set; its value is JSON, which is also YAML."""
    return f"{key}={json.dumps(value)}"


def _base_of(folder: Path) -> str:
    """Return the base of an adapter without a run. Raises ConfigError if it is neither Mistral's nor a local folder."""
    path = folder / CONFIG
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckFailed(f"{shown(path)} cannot be read: {first_line(error)}") from None
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    if isinstance(base, str) and (base == MISTRAL or is_local(base)):
        return base
    found = f"{shown(path)}: base_model_name_or_path is {show(base)}, expected {MISTRAL} or a local folder"
    raise ConfigError(found, fix="an adapter works only on its own base; if that is here, name it in this file")
