"""A block to paste into an issue: machine, versions, config and all check results, without names or secrets."""

from __future__ import annotations

import getpass
import os
import platform as host
import re
from collections.abc import Iterable
from contextlib import suppress

from finetune.checks import libraries
from finetune.checks.preflight import Preflight
from finetune.checks.runner import Result
from finetune.files import ROOT
from finetune.machine.platforms import accelerator
from finetune.wording import clean

VERSIONS = ("torch", "transformers", "peft", "trl", "bitsandbytes")
BEGIN, END = "----- paste from here -----", "----- to here -----"
THE_USERS_OWN = ("data.preview",)  # its detail is a row of the data
SECRET = re.compile("(TOKEN|KEY|SECRET|PASSWORD)$")  # names of variables that hold secrets


def block(results: Iterable[Result], preflight: Preflight, source: str) -> list[str]:
    """The lines to paste; `source` says which file the config came from, and why."""
    machine, config = preflight.machine, preflight.config
    memory = f"{machine.memory_gib:.1f} GiB of memory, {machine.memory_free_gib:.1f} free"
    found = {name: libraries.installed(name) or "not installed" for name in VERSIONS}
    batch = f"{config.training.per_device_train_batch_size} x {config.training.gradient_accumulation_steps}"
    versions = [f"python {machine.python}", *(f"{name} {version}" for name, version in found.items())]
    lines = [
        f"machine  {machine.system} {machine.release} on {machine.architecture}; {accelerator(machine)}; {memory}",
        f"versions {', '.join(versions)}",
        f"config   {nameless(source)}: platform {config.platform}, storage {config.quantization.storage}, "
        f"{batch} sequences of {config.model.max_seq_length:,} tokens",
    ]
    for result in results:
        detail = "not shown here" if result.id in THE_USERS_OWN else nameless(clean(result.detail))
        lines += f"{result.status} {result.id}: {detail}".splitlines()
    return [BEGIN, *lines, END]


def nameless(text: str) -> str:
    """`text` without secrets, home folders, and the names of user and machine."""
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= 8:
            text = text.replace(value, "***")
    text = re.sub(r"(?<=://)[^/@\s]+@", "", text)
    own = os.environ.get("HOME", "").rstrip("/")
    homes = [rf"{re.escape(own)}(?![\w.-])"] * bool(own) + [r"/(Users|home)/[^/\s:;,]+"]
    for path, stands_for in ((re.escape(str(ROOT)), "."), ("|".join(homes), "~")):
        text = re.sub(rf"((\.\./)*\.\.)?({path})", stands_for, text)
    names = {host.node(): "HOST", host.node().split(".")[0]: "HOST"}
    with suppress(KeyError, OSError):
        names[getpass.getuser()] = "USER"
    for name, stands_for in names.items():
        if name:
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", stands_for, text)
    return text
