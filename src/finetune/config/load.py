"""Load the config: base file, platform's file and `--set` become one frozen tree, or all problems at once.

schema.py has the types and bounds of the keys; rules.py checks which values work together and on the platform.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.config import yaml_file
from finetune.errors import ConfigError
from finetune.files import ROOT, shown
from finetune.machine.inspect import read_machine
from finetune.machine.platforms import PLATFORMS, choose

if TYPE_CHECKING:
    from finetune.config.schema import Config

BASE_FILE = ROOT / "configs" / "training_config.yaml"


def config_file(choice: str | None) -> tuple[Path, str]:
    """The file for `--config` (a path or a platform's name) and the reason; without it, the detected platform's."""
    if choice is None:
        platform, reason = choose(read_machine())
        return shown(ROOT / "configs" / f"training_config_{platform.name}.yaml"), reason
    if choice in PLATFORMS:
        return shown(ROOT / "configs" / f"training_config_{choice}.yaml"), f"--config {choice}"
    path = Path(choice)
    try:
        found = path.is_file()
    except OSError as error:
        raise ConfigError(f"--config {choice}: {error.strerror}") from None
    if not found:
        names = ", ".join(PLATFORMS)
        raise ConfigError(f"--config {choice}: no such file", fix=f"type a path or one of: {names}")
    return path, f"--config {choice}"


def load_config(choice: str | None, settings: Iterable[str] = ()) -> tuple[Config, str]:
    """The resolved config, and a sentence with its file and the reason for it.

    Raises ConfigError with all problems: unknown, missing and duplicate keys, wrong types and values, and combinations
    that do not work.
    """
    from finetune.config import problems, rules, schema  # pydantic takes 0.1 s, and --help does not need it

    path, reason = config_file(choice)
    merged, places = yaml_file.read(BASE_FILE)
    unread: list[str] = []
    sources = [partial(yaml_file.read, path), *(partial(yaml_file.override, setting) for setting in settings)]
    for source in sources:
        try:
            values, value_places = source()
        except ConfigError as error:
            unread += error.problems
            continue
        merged = yaml_file.deep_merge(merged, values)
        places |= value_places
    sections = {name for name, value in merged.items() if isinstance(value, dict)}
    required = schema.marked(schema.Mark.REQUIRED)
    yaml_file.validate_required_fields(merged, (key for key in required if key.split(".")[0] in sections))
    faults = problems.Problems(places, unread)
    config = problems.validated(schema.Config, merged, faults)
    if config and not faults.found:
        config, chosen = _with_attention(_with_run_name(config, path))
        for rule in rules.RULES:
            rule(config, faults)
    if config is None or faults.found:
        raise ConfigError(*sorted(set(faults.found), key=_by_line))
    return config, f"{os.path.relpath(path)} ({reason}{chosen})"


def _by_line(problem: str) -> list[str | int]:
    # Compare digits as numbers, so that line 9 comes before line 10.
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"([0-9]{1,18})", problem))]


def _with_attention(config: Config) -> tuple[Config, str]:
    """Replace `auto` by the platform's first installed attention, and return a clause that says so.

    Plan, manifest and fingerprint then contain its name, so a different one counts as a changed config. PyTorch has all
    of them except flash-attn, which is only looked up, not imported.
    """
    if config.model.attn_implementation != "auto":
        return config, ""
    attentions = PLATFORMS[config.platform].attentions
    flash_attn = importlib.util.find_spec("flash_attn") is not None
    chosen = next(name for name in attentions if flash_attn or name != "flash_attention_2")
    clause = f"; model.attn_implementation auto: {chosen}, the first of {', '.join(attentions)} that is installed"
    return config.changed("model", attn_implementation=chosen), clause


def _with_run_name(config: Config, path: Path) -> Config:
    """Name the run after its config file if it has no name, so that the same command resumes it."""
    if config.tracking.run_name is not None:
        return config
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem)
    return config.changed("tracking", run_name=name)
