"""The receipt: what a run trains, so that another machine can tell whether it would train the same thing.

A Mac at 2,048 tokens and an H100 at 4,096 agree on the conversations, their ids and labels before truncation, the
split, tokenizer, template and the config keys that determine what is learned. Truncation, packing and how the machine
computes differ by design and are reported separately. Contents are compared, paths are not.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from finetune.config.base_model import is_local
from finetune.config.schema import Config, Mark, marked
from finetune.data.prepare import Prepared
from finetune.data.split import Statistics
from finetune.errors import ConfigError
from finetune.files import read_json, resolve
from finetune.runs import warm_start
from finetune.wording import leaves, one_line, show

FILE = "receipt.json"
SCHEMA_VERSION = 1


def make(config: Config, prepared: Prepared) -> dict[str, Any]:
    """The receipt of a run with this config over this data, as JSON holds it.

    `must_agree` and `by_design` map what is compared, in words or as a key of the config, to its value.
    """
    keys = leaves(config.as_dict())
    chosen = {key: keys.pop(key) for key in marked(Mark.BY_DESIGN)}
    left_out = marked(Mark.NOT_COMPARED)
    shared = {key: value for key, value in keys.items() if key not in left_out}
    base = {f"model.{name}": value for name, value in base_model(config).items()}
    derived = {
        "adapter to begin with": warm_start.digest(config),
        "effective batch size": config.effective_batch_size,
        "dataset.validation_split": _split(config, prepared),
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "must_agree": _contents(prepared) | base | derived | shared,
        "by_design": chosen | _lengths(prepared),
    }


def base_model(config: Config) -> dict[str, str | None]:
    """Hub id and revision; of a local folder only its name, since its path means nothing elsewhere."""
    if is_local(config.model.name):
        return {"name": resolve(config.model.name).name, "revision": None}
    return {"name": config.model.name, "revision": config.model.revision}


def read(path: Path) -> dict[str, Any]:
    """A receipt that `make` made. Raises ConfigError with what is wrong where the file is none."""
    try:
        receipt = read_json(path)
    except OSError as error:
        raise _refused(path, str(error.strerror)) from None
    except ValueError as error:
        raise _refused(path, f"not JSON ({error})") from None
    if not isinstance(receipt, dict) or "schema_version" not in receipt:
        raise _refused(path, "no receipt, for it has no schema_version")
    version = receipt["schema_version"]
    if version != SCHEMA_VERSION:
        found = f"schema_version is {show(version)}, expected {SCHEMA_VERSION}"
        raise ConfigError(f"--receipt {path}: {found}", fix="make both with the same version of this program")
    for part in ("must_agree", "by_design"):
        if not isinstance(receipt.get(part), dict):
            raise _refused(path, f"{part} is {show(receipt.get(part))}, expected a section")
    return receipt


def _refused(path: Path, found: str) -> ConfigError:
    return ConfigError(f"--receipt {path}: {found}", fix=f"name the {FILE} of a run's folder, copied whole")


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What must agree and does not, and what differs by design: lines `what: theirs -> ours`, hashes shortened."""
    must_agree, by_design = (_differences(ours[part], theirs[part]) for part in ("must_agree", "by_design"))
    return must_agree, by_design


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    return [
        one_line(f"{what}: {_shown(theirs, what)} -> {_shown(ours, what)}")
        for what in ours | theirs
        if what not in ours or what not in theirs or ours[what] != theirs[what]
    ]


def _shown(receipt: dict[str, Any], what: str) -> str:
    if what not in receipt:
        return "absent"
    text = json.dumps(receipt[what], ensure_ascii=False)
    return text[1:13] if re.fullmatch(r'"[0-9a-f]{64}"', text) else text


def _split(config: Config, prepared: Prepared) -> float | str:
    """Beside a validation file the share has no effect."""
    return "a validation file" if "validation" in prepared.files else config.dataset.validation_split


def _contents(prepared: Prepared) -> dict[str, Any]:
    compared: dict[str, Any] = {"tokenizer and template": prepared.chat.fingerprint}
    for name, whole in prepared.whole.items():
        compared |= {
            f"{name}: rows": whole["rows"],
            f"{name}: conversations, in any order": whole["content"],
            f"{name}: token ids before truncation, in file order": whole["input_ids"],
            f"{name}: labels before truncation, in file order": whole["labels"],
        }
    return compared


def _lengths(prepared: Prepared) -> dict[str, Any]:
    """What truncation and packing made of the rows."""
    sequences = len(prepared.train.lengths if prepared.sequences is None else prepared.sequences)
    made = {"train: sequences": sequences}
    for name, counts in prepared.statistics.items():
        made |= _after_truncation(name, counts, prepared.whole[name]["rows"])
    return made


def _after_truncation(name: str, counts: Statistics, rows: int) -> dict[str, int]:
    return {
        f"{name}: rows cut": counts.truncated,
        f"{name}: rows dropped as too long": rows - counts.rows,
        f"{name}: tokens": counts.tokens,
        f"{name}: tokens with loss": counts.supervised_tokens,
    }
