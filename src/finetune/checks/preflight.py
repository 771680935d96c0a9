"""What checks and plan read: config, machine and everything derived from them, each computed once, on demand."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.config.base_model import is_local
from finetune.errors import CheckFailed
from finetune.files import resolve
from finetune.machine.device import Torch, read_torch
from finetune.machine.inspect import Machine
from finetune.machine.platforms import PLATFORMS, WORKING_SET_SHARE, Platform, memory_limits
from finetune.plan.fit import Fitting, compare
from finetune.plan.model_shape import Geometry, read_geometry
from finetune.plan.plan import Data, Plan, make_plan
from finetune.wording import SILENT, Report

if TYPE_CHECKING:
    from finetune.config.schema import Config
    from finetune.data.prepare import Prepared
    from finetune.data.tokenizer import Chat


class Preflight:
    """One config on one machine. A fact that cannot be computed raises its UserError on each access.

    `receipt` is the receipt file of the run to compare with; `report` receives progress of slow work.
    """

    def __init__(self, config: Config, machine: Machine, receipt: Path | None = None, report: Report = SILENT) -> None:
        self.config, self.machine, self.receipt, self.report = config, machine, receipt, report

    @property
    def platform(self) -> Platform:
        """The facts of the config's platform."""
        return PLATFORMS[self.config.platform]

    @cached_property
    def torch(self) -> Torch:
        """What the installed torch can use."""
        return read_torch()

    @cached_property
    def working_set_gib(self) -> float | None:
        """What a Mac's GPU may use before macOS swaps, from torch or from the Mac's size; None elsewhere.

        With the m4 config on another machine: that of a Mac with 32 GB.
        """
        if not self.platform.unified_memory:
            return None
        if not self.machine.apple_silicon:
            return self.platform.memory_gib
        try:
            known_gib = self.torch.working_set_gib
        except CheckFailed:
            known_gib = None
        return known_gib or WORKING_SET_SHARE * self.machine.memory_gib

    @cached_property
    def geometry(self) -> Geometry:
        """The base model's shape."""
        return read_geometry(self.config)

    @cached_property
    def fitting(self) -> Fitting:
        """The expected peak against the available memory."""
        limits = memory_limits(self.platform, self.machine, self.working_set_gib)
        return compare(self.config, self.geometry, limits)

    @property
    def tokenizer_folder(self) -> Path | None:
        """The folder of a local base; None for the Hub's, whose tokenizer is known without it."""
        return resolve(self.config.model.name) if is_local(self.config.model.name) else None

    @cached_property
    def chat(self) -> Chat:
        """The base's tokenizer and template."""
        from finetune.data.tokenizer import load_chat

        return load_chat(self.tokenizer_folder)

    @cached_property
    def prepared(self) -> Prepared:
        """The data, read, checked, split and encoded, or taken from the cache."""
        from finetune.data.cache import Cache
        from finetune.data.encode import Recipe
        from finetune.data.prepare import prepare

        config = self.config
        recipe = Recipe(
            tokenizer_folder=str(self.tokenizer_folder) if self.tokenizer_folder else None,
            system_prompt=config.system_prompt,
            max_seq_length=config.model.max_seq_length,
            truncation=config.dataset.truncation,
            certificate=config.dataset.certificate,
            train_on=config.dataset.train_on,
        )
        return prepare(
            config.dataset, recipe, config.training.packing, Cache(resolve(config.output.dir) / ".cache", self.report)
        )

    @cached_property
    def plan(self) -> Plan:
        """What the run will cost."""
        from finetune.data.batches import example_lengths, train_load

        prepared, batch_size = self.prepared, self.config.training.per_device_train_batch_size
        lengths = example_lengths(prepared)
        tokens = train_load(lengths, batch_size, flat=False).tokens
        train, validation = prepared.statistics["train"], prepared.statistics["validation"]
        evaluated = prepared.validation.lengths
        data = Data(train, validation, len(lengths), tokens, len(evaluated), int(evaluated.sum()))
        return make_plan(self.config, data, self.geometry, self.machine, self.working_set_gib)
