"""What scripts/prove.py trains: a large and a small base, sample rows, and their settings."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.checks.preflight import Preflight
from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.files import ROOT
from finetune.machine.inspect import read_machine
from finetune.machine.platforms import Platform
from finetune.model import hub
from finetune.plan.model_shape import DEMO_135M, Geometry, read_geometry
from finetune.prove.process import run_alone

if TYPE_CHECKING:
    from finetune.training.job import Job

SAMPLE, DEMO = ROOT / "data" / "sample" / "train.jsonl", ROOT / "models" / "demo-135m"
TINY = Geometry(64, 192, 2, 4, 2, 32000, False)
COMMON = (
    *("tracking.report_to=none", "dataset.sample_prompts=[]", "dataset.validation_file=null"),
    *("dataset.validation_split=0.1", "training.num_train_epochs=1"),
)
TINY_SETTINGS = (
    *("model.max_seq_length=160", "training.gradient_accumulation_steps=1", "training.gradient_checkpointing=true"),
    *("training.checkpointed_layers=auto", "training.fused_lora=auto"),
)
ROW_TOKENS = 500  # estimated tokens of each sample row that is joined, so that a sequence holds several
ATTENTION = "model.attn_implementation=auto"  # if the config's choice is missing, the checks report it


class LeftOut(Exception):
    """A part that cannot run here; the message says why."""


@dataclass(frozen=True)
class Work:
    """What to run, on which platform, and until when (in time.monotonic()).

    `config` and `settings` select the large base, which `base` names; the settings `small` replace it with a small one.
    `random`: use random weights, created on the device for a 7B.
    """

    platform: Platform
    config: str
    settings: tuple[str, ...]
    small: tuple[str, ...]
    base: str
    random: bool
    folder: Path
    until: float

    @property
    def seconds_left(self) -> float:
        """The time left; 0 if it is over."""
        return max(0.0, self.until - time.monotonic())

    def config_of(self, *more: str) -> Config:
        """Return the config of the large base with these settings."""
        return load_config(self.config, [*self.settings, ATTENTION, *more])[0]

    def alone(self, function: Callable[[Any], Any], argument: Any) -> Any:
        """Run `function(argument)` in its own process within the time left, and return the result."""
        return run_alone(function, argument, not self.platform.accelerated, self.seconds_left)

    def need_base(self) -> None:
        """Raise LeftOut if the large base would have to be downloaded."""
        model = self.config_of().model
        if not (self.random or self.small[0] in self.settings or hub.is_cached(model.name, model.revision)):
            how = f"{hub.fetch_command(model.name, model.revision)}, or --random"
            raise LeftOut(f"{model.name} is not in the Hub's cache: {how}")

    def job(self, config: Config) -> Job:
        """Load the base of `config`, with LoRA, to train it."""
        from finetune.machine.device import prepare_device
        from finetune.model import load
        from finetune.model.lora import add_lora
        from finetune.prove.random_base import make_base
        from finetune.runs.folder import Run
        from finetune.training.job import Job, load_job

        run_folder, prepared = Run(self.folder / "large", False, None), Preflight(config, read_machine()).prepared
        if not (self.random and self.platform.nvidia):
            return load_job(run_folder, config, prepared)
        prepare_device(self.platform)
        base = make_base(config, read_geometry(config), self.platform)
        model = add_lora(base, config.lora, config.training.seed)
        return Job(run_folder, config, prepared, model, load.make_tokenizer(prepared.chat, config.dataset.padding_side))


def make_work(platform: Platform, random: bool, tiny: bool, folder: Path, until: float) -> Work:
    """Prepare the work. The small base is the demo's, or random if that is missing or `random` or `tiny` is set."""
    config, small, name = str(ROOT / platform.demo) if platform.demo else platform.name, DEMO, "the demo's base"
    random = random or tiny
    if random or hub.missing_weights(DEMO):
        small, name = folder / "base", "random weights of " + ("a tiny model" if tiny else "the demo's shape")
        run_alone(partial(_save_base, small), TINY if tiny else DEMO_135M, not platform.accelerated)
    if platform.nvidia:
        name = "Mistral-7B" + random * "'s shape, random weights"
    to_small = (f"model.name={small}", "model.revision=null")
    settings = [f"output.dir={folder}", *COMMON, *(() if platform.nvidia else to_small)]
    if tiny:
        settings += TINY_SETTINGS
    length = load_config(config, settings)[0].model.max_seq_length
    settings.append(f"dataset.train_file={write_rows(folder / 'rows.jsonl', length)}")
    return Work(platform, config, tuple(settings), to_small, name, random, folder, until)


def _save_base(folder: Path, geometry: Geometry) -> None:
    from finetune.prove.random_base import save_base

    save_base(folder, geometry)


def write_rows(path: Path, length: int) -> Path:
    """Write the sample's conversations, and joined ones of two or more that fit in `length` tokens."""
    rows = [json.loads(line)["messages"] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    turns = [[message for message in row if message["role"] != "system"] for row in rows]
    with path.open("w", encoding="utf-8") as stream:
        for count in range(1, max(1, length // ROW_TOKENS) + 1):
            for first in range(len(turns) - count + 1):
                joined = [message for turn in turns[first : first + count] for message in turn]
                stream.write(json.dumps({"messages": joined}) + "\n")
    return path
