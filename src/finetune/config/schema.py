"""The config's sections: type, bounds and marks of every key.

Marks say what else depends on a key: resume, receipt, model card and loading derive their lists from them. A key
without marks gets the strict default: it must not change on resume, must match the receipt, and has the same value in
the h100 and m4 files. Defaults live in configs/training_config.yaml.
"""

from __future__ import annotations

import hashlib
import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import BaseModel, ConfigDict, Field, Strict, StringConstraints
from pydantic.fields import FieldInfo

from finetune.files import resolve

Dtype = Literal["bfloat16", "float32"]
Attention = Literal["flash_attention_2", "torch_varlen", "sdpa", "auto"]
Fused = bool | Literal["auto"]
Count = Annotated[int, Ge(1)]
Share = Annotated[float, Ge(0), Le(1)]
Hours = Annotated[float, Gt(0), Le(10000)]
Text = Annotated[str, StringConstraints(min_length=1)]
Texts = Annotated[tuple[Text, ...], Strict(False)]  # YAML has lists only


class Expected(str):
    """Describes in words what a key may be, where its type does not."""


class Mark(Enum):
    """What else depends on a key."""

    REQUIRED = "if it is missing, the error names it"
    MAY_CHANGE = "may change on resume: it affects no token or weight, or the token hashes cover it"
    BY_DESIGN = "in a receipt, but expected to differ between platforms"
    NOT_COMPARED = "not in a receipt: it affects no weight, or its content is compared"
    IN_CARD = "in the model card's table of settings"
    PER_PLATFORM = "the h100 and m4 files have different values"


class Section(BaseModel):
    """Strict, frozen, and without unknown keys."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class ModelConfig(Section):
    """The base model."""

    name: Annotated[Text, Mark.REQUIRED, Mark.NOT_COMPARED]
    revision: Annotated[Text | None, Mark.NOT_COMPARED]
    dtype: Annotated[Dtype, Mark.BY_DESIGN, Mark.IN_CARD]
    attn_implementation: Annotated[Attention, Mark.BY_DESIGN, Mark.IN_CARD, Mark.PER_PLATFORM]
    max_seq_length: Annotated[int, Ge(16), Le(32768), Mark.REQUIRED, Mark.BY_DESIGN, Mark.IN_CARD, Mark.PER_PLATFORM]


class QuantizationConfig(Section):
    """bitsandbytes' names; `storage` says whether NF4 stays packed in memory or is expanded once at load."""

    load_in_4bit: bool
    bnb_4bit_quant_type: Annotated[Literal["nf4", "fp4"], Mark.IN_CARD]
    bnb_4bit_use_double_quant: Annotated[bool, Mark.IN_CARD]
    bnb_4bit_compute_dtype: Annotated[Dtype, Mark.BY_DESIGN]
    storage: Annotated[Literal["packed", "expanded"], Mark.BY_DESIGN, Mark.IN_CARD, Mark.PER_PLATFORM]


class LoraConfig(Section):
    """PEFT's names."""

    r: Annotated[int, Ge(1), Le(1024), Mark.REQUIRED, Mark.IN_CARD]
    lora_alpha: Annotated[Count, Mark.REQUIRED, Mark.IN_CARD]
    lora_dropout: Annotated[float, Ge(0), Le(0.9), Mark.REQUIRED, Mark.IN_CARD]
    target_modules: Annotated[Texts, Mark.REQUIRED, Mark.IN_CARD]
    bias: Annotated[Literal["none"], Mark.REQUIRED]
    task_type: Annotated[Literal["CAUSAL_LM"], Mark.REQUIRED]
    init_from: Annotated[Text | None, Mark.MAY_CHANGE, Mark.NOT_COMPARED]  # its weights may not, and are compared


class TrainingConfig(Section):
    """transformers' TrainingArguments' names, and some of our own."""

    num_train_epochs: Annotated[float, Gt(0), Le(1000), Mark.IN_CARD]
    max_steps: Annotated[int, Ge(-1), Mark.IN_CARD]
    per_device_train_batch_size: Annotated[Count, Mark.REQUIRED, Mark.BY_DESIGN, Mark.PER_PLATFORM]
    per_device_eval_batch_size: Annotated[Count, Mark.REQUIRED, Mark.MAY_CHANGE, Mark.BY_DESIGN, Mark.PER_PLATFORM]
    gradient_accumulation_steps: Annotated[Count, Mark.REQUIRED, Mark.BY_DESIGN, Mark.PER_PLATFORM]
    learning_rate: Annotated[float, Gt(0), Le(1), Mark.IN_CARD]
    lr_scheduler_type: Annotated[Literal["cosine", "linear", "constant", "constant_with_warmup"], Mark.IN_CARD]
    warmup_ratio: Annotated[float, Ge(0), Le(0.9), Mark.IN_CARD]
    weight_decay: Annotated[Share, Mark.IN_CARD]
    max_grad_norm: Annotated[float, Gt(0), Le(1000), Mark.IN_CARD]
    optim: Annotated[
        Literal["paged_adamw_32bit", "paged_adamw_8bit", "adamw_torch_fused", "adamw_torch"],
        *(Mark.BY_DESIGN, Mark.IN_CARD, Mark.PER_PLATFORM),
    ]
    bf16: Annotated[bool, Mark.BY_DESIGN]
    fp16: bool
    gradient_checkpointing: Annotated[bool, Mark.BY_DESIGN]
    # Does not change the bits if a recomputed layer has the same bits (the check device.recompute).
    checkpointed_layers: Annotated[
        Literal["all", "auto"] | Annotated[int, Ge(0)], Mark.MAY_CHANGE, Mark.NOT_COMPARED, Mark.PER_PLATFORM
    ]
    packing: Annotated[bool, Mark.BY_DESIGN, Mark.IN_CARD]
    fused_lora: Annotated[Fused, Mark.BY_DESIGN, Mark.PER_PLATFORM]  # the same training except for rounding
    fused_kernels: Annotated[Fused, Mark.BY_DESIGN, Mark.PER_PLATFORM]
    logging_steps: Annotated[Count, Mark.MAY_CHANGE, Mark.NOT_COMPARED, Mark.PER_PLATFORM]
    eval_steps: Annotated[Count, Mark.BY_DESIGN, Mark.PER_PLATFORM]  # a step takes seconds on an H100, 936 s on an M4
    save_steps: Annotated[Count, Mark.BY_DESIGN, Mark.PER_PLATFORM]
    save_minutes: Annotated[Hours | None, Mark.MAY_CHANGE, Mark.NOT_COMPARED]
    save_total_limit: Annotated[Count, Mark.MAY_CHANGE, Mark.NOT_COMPARED]
    metric_for_best_model: Literal["eval_loss"]
    load_best_model_at_end: bool
    early_stopping_patience: Count | None
    time_budget_hours: Annotated[Hours | None, Mark.MAY_CHANGE, Mark.NOT_COMPARED]
    time_budget_partial: Annotated[bool, Mark.MAY_CHANGE, Mark.NOT_COMPARED]
    seed: Annotated[int, Ge(0), Le(2**32 - 1), Mark.IN_CARD]


class TrainFile(Section):
    """One of several training files; `weight` 2 trains on its rows twice, 0.5 on half of them."""

    path: Annotated[Text, Field(description="a file of conversations")]
    weight: Annotated[float, Gt(0), Le(100), Field(description="2: each row twice an epoch; 0.5: half of the rows")] = (
        1.0
    )


TRAIN_FILES = Expected("a path, or a list of paths and {path: FILE, weight: N}, N above 0 and at most 100")


class DatasetConfig(Section):
    """The conversations, and what happens to long and bad rows."""

    train_file: Annotated[
        Text | Annotated[tuple[Text | TrainFile, ...], Strict(False), MinLen(1)],
        *(TRAIN_FILES, Mark.MAY_CHANGE, Mark.NOT_COMPARED),
    ]
    validation_file: Annotated[Text | None, Mark.MAY_CHANGE, Mark.NOT_COMPARED]
    validation_split: Annotated[float, Gt(0), Le(0.5), Mark.NOT_COMPARED]
    max_rows: Annotated[int, Ge(2)] | None
    max_validation_rows: Annotated[int, Ge(1)] | None
    train_on: Annotated[Literal["all", "last"], Mark.IN_CARD]
    truncation: Annotated[bool, Mark.BY_DESIGN]
    padding_side: Literal["right", "left"]
    on_bad_row: Literal["fail", "drop"]
    max_bad_share: Annotated[Share, Mark.MAY_CHANGE, Mark.NOT_COMPARED]
    on_duplicate: Literal["keep", "drop"]
    certificate: Annotated[Literal["every_row"] | bool, Mark.MAY_CHANGE, Mark.NOT_COMPARED]
    sample_prompts: Annotated[Texts | None, Mark.MAY_CHANGE, Mark.NOT_COMPARED]

    @property
    def train_files(self) -> tuple[TrainFile, ...]:
        """`train_file` as a list, each file with its weight."""
        files = (self.train_file,) if isinstance(self.train_file, str) else self.train_file
        return tuple(TrainFile(path=file) if isinstance(file, str) else file for file in files)

    @property
    def train_files_named(self) -> str:
        """`train_file` in a sentence."""
        weights = (f" (weight {file.weight:g})" if file.weight != 1 else "" for file in self.train_files)
        return ", ".join(f"{file.path}{weight}" for file, weight in zip(self.train_files, weights, strict=True))

    @property
    def rows_read(self) -> str | None:
        """A sentence about `max_rows`, if it is set."""
        if self.max_rows is None:
            return None
        file = self.train_file if isinstance(self.train_file, str) else "each training file"
        return f"only the first {self.max_rows} rows of {file} are read"


class TrackingConfig(Section):
    """Where metrics go besides metrics.jsonl, and the machine's price per hour."""

    report_to: Annotated[Literal["wandb", "tensorboard", "none"], Mark.MAY_CHANGE, Mark.NOT_COMPARED]
    project: Annotated[Text, Mark.MAY_CHANGE, Mark.NOT_COMPARED]
    run_name: Annotated[Text | None, Mark.MAY_CHANGE, Mark.NOT_COMPARED, Mark.PER_PLATFORM]
    cost_per_hour: Annotated[Annotated[float, Gt(0)] | None, Mark.MAY_CHANGE, Mark.NOT_COMPARED]


class OutputConfig(Section):
    """Where runs are written."""

    dir: Annotated[Text, Mark.MAY_CHANGE, Mark.NOT_COMPARED]
    copy_to: Annotated[Text | None, Mark.MAY_CHANGE, Mark.NOT_COMPARED]
    copy_checkpoints: Annotated[bool, Mark.MAY_CHANGE, Mark.NOT_COMPARED]


HUB = "hf://"  # of output.copy_to
DEFAULT_VALIDATION_FILE = "data/processed/val.jsonl"


class Config(Section):
    """The whole config of a run."""

    platform: Annotated[Literal["h100", "m4", "cpu"], Mark.BY_DESIGN, Mark.PER_PLATFORM]
    model: ModelConfig
    quantization: QuantizationConfig
    lora: LoraConfig
    training: TrainingConfig
    dataset: DatasetConfig
    system_prompt: Text | None
    tracking: TrackingConfig
    output: OutputConfig

    def changed(self, section: str, **values: object) -> Self:
        """This config with other values in one section. Raises ValidationError for an invalid key or value."""
        before = getattr(self, section)
        return self.model_copy(update={section: type(before).model_validate(dict(before) | values)})

    def as_dict(self) -> dict[str, Any]:
        """The tree as plain mappings and lists, for YAML and JSON."""
        return self.model_dump(mode="json")

    def sha256(self) -> str:
        """Hash of the resolved values."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()

    @property
    def effective_batch_size(self) -> int:
        """Sequences per optimizer step."""
        return self.training.per_device_train_batch_size * self.training.gradient_accumulation_steps

    @property
    def run_name(self) -> str:
        """`tracking.run_name`; `load` sets it if the file has null."""
        assert self.tracking.run_name is not None
        return self.tracking.run_name

    @property
    def run_folder(self) -> Path:
        """`output.dir`/`run_name`, absolute."""
        return resolve(self.output.dir) / self.run_name


def keys(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, FieldInfo]:
    """The field at every dotted path, including sections, in the order of the tree."""
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        found[f"{prefix}{name}"] = field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= keys(field.annotation, f"{prefix}{name}.")
    return found


def marked(mark: Mark) -> tuple[str, ...]:
    """The dotted paths of all keys with `mark`, in the order of the tree."""
    return tuple(path for path, field in keys().items() if mark in field.metadata)
