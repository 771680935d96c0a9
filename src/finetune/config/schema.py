"""The sections of the config, with the type and bounds of every key. Defaults live in configs/training_config.yaml."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from finetune.config.typed import Bounds
from finetune.files import resolve

Dtype = Literal["bfloat16", "float32"]
Count = Annotated[int, Bounds(least=1)]
Share = Annotated[float, Bounds(least=0, most=1)]


@dataclass(frozen=True)
class ModelConfig:
    """The base model and how it is held."""

    name: str
    revision: str | None
    dtype: Dtype
    attn_implementation: Literal["flash_attention_2", "sdpa"]
    max_seq_length: Annotated[int, Bounds(least=16, most=32768)]


@dataclass(frozen=True)
class QuantizationConfig:
    """bitsandbytes' names; `storage` says whether NF4 stays packed in memory or is expanded once at load."""

    load_in_4bit: bool
    bnb_4bit_quant_type: Literal["nf4", "fp4"]
    bnb_4bit_use_double_quant: bool
    bnb_4bit_compute_dtype: Dtype
    storage: Literal["packed", "expanded"]


@dataclass(frozen=True)
class LoraConfig:
    """PEFT's names."""

    r: Annotated[int, Bounds(least=1, most=1024)]
    lora_alpha: Count
    lora_dropout: Annotated[float, Bounds(least=0, most=0.9)]
    target_modules: tuple[str, ...]
    bias: Literal["none"]
    task_type: Literal["CAUSAL_LM"]


@dataclass(frozen=True)
class TrainingConfig:
    """transformers' TrainingArguments' names, and those of our own beside them."""

    num_train_epochs: Annotated[float, Bounds(above=0, most=1000)]
    max_steps: Annotated[int, Bounds(least=-1)]
    per_device_train_batch_size: Count
    per_device_eval_batch_size: Count
    gradient_accumulation_steps: Count
    learning_rate: Annotated[float, Bounds(above=0, most=1)]
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"]
    warmup_ratio: Annotated[float, Bounds(least=0, most=0.9)]
    weight_decay: Share
    max_grad_norm: Annotated[float, Bounds(above=0, most=1000)]
    optim: Literal["paged_adamw_32bit", "paged_adamw_8bit", "adamw_torch_fused", "adamw_torch"]
    bf16: bool
    fp16: bool
    gradient_checkpointing: bool
    checkpointed_layers: Literal["all", "auto"] | Annotated[int, Bounds(least=0)]
    packing: bool
    fused_lora: bool
    fused_kernels: bool
    logging_steps: Count
    eval_steps: Count
    save_steps: Count
    save_minutes: Annotated[float, Bounds(above=0, most=10000)] | None
    save_total_limit: Count
    metric_for_best_model: Literal["eval_loss"]
    load_best_model_at_end: bool
    early_stopping_patience: Count | None
    time_budget_hours: Annotated[float, Bounds(above=0, most=10000)] | None
    time_budget_partial: bool
    seed: Annotated[int, Bounds(least=0, most=2**32 - 1)]


@dataclass(frozen=True)
class DatasetConfig:
    """Where the conversations are and what happens to a row that is too long or bad."""

    train_file: str
    validation_file: str | None
    validation_split: Annotated[float, Bounds(above=0, most=0.5)]
    max_rows: Annotated[int, Bounds(least=2)] | None
    truncation: bool
    padding_side: Literal["right", "left"]
    on_bad_row: Literal["fail", "drop"]
    certificate: bool
    sample_prompts: tuple[str, ...] | None


@dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go besides metrics.jsonl, and what an hour of the machine costs, in any currency."""

    report_to: Literal["wandb", "tensorboard", "none"]
    project: str
    run_name: str | None
    cost_per_hour: Annotated[float, Bounds(above=0)] | None


@dataclass(frozen=True)
class OutputConfig:
    """Where runs are written."""

    dir: str


MISTRAL = "mistralai/Mistral-7B-Instruct-v0.2"
DEFAULT_VALIDATION_FILE = "data/processed/val.jsonl"


@dataclass(frozen=True)
class Config:
    """The whole tree; what a run is."""

    platform: Literal["h100", "m4", "cpu"]
    model: ModelConfig
    quantization: QuantizationConfig
    lora: LoraConfig
    training: TrainingConfig
    dataset: DatasetConfig
    system_prompt: str | None
    tracking: TrackingConfig
    output: OutputConfig

    def as_dict(self) -> dict[str, Any]:
        """The tree as plain mappings and lists, as YAML and JSON hold it."""
        tree: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return tree

    def sha256(self) -> str:
        """Hash of the resolved values."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()

    @property
    def effective_batch_size(self) -> int:
        """Sequences per optimizer step."""
        return self.training.per_device_train_batch_size * self.training.gradient_accumulation_steps

    @property
    def run_name(self) -> str:
        """`tracking.run_name`, which `load` fills in where a file leaves it null."""
        assert self.tracking.run_name is not None
        return self.tracking.run_name

    @property
    def run_folder(self) -> Path:
        """`output.dir`/`run_name`, absolute."""
        return resolve(self.output.dir) / self.run_name


def is_local(name: str) -> bool:
    """Whether `model.name` is a folder here rather than a Hub id."""
    try:
        return resolve(name).is_dir()
    except OSError:  # too long, or not ours to look at
        return False
