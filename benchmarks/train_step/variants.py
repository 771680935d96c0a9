"""The trainers that benchmarks/train_step compares, one row each, on the same random base and rows."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine

from finetune.config.base_model import MISTRAL
from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.machine.device import capacity_gib
from finetune.machine.platforms import Platform
from finetune.plan.model_shape import MISTRAL_7B, Geometry
from train_step.rows import Shape, Step, one_by_one, packed_by_trl, packed_by_us


@dataclass(frozen=True)
class Job:
    """One training of a few steps, in its own process.

    `task` is speed (the variant's own dropout) or losses (dropout 0). `steps` are timed, after `warmup` untimed ones;
    `profiled` adds one step in the profiler. `bf16`: in bfloat16 on a CPU, too.
    """

    variant: str
    task: str
    data: str
    geometry: str
    platform: str
    shape: Shape
    warmup: int
    steps: int
    profiled: bool
    bf16: bool = False

    @property
    def all_steps(self) -> int:
        return self.warmup + self.steps + self.profiled


@dataclass(frozen=True)
class Work:
    """What a trainer is created from. `folder` is empty and may be written."""

    variant: Variant
    job: Job
    config: Config
    geometry: Geometry
    platform: Platform
    steps: list[Step]
    folder: Path


@dataclass(frozen=True)
class Variant:
    """A trainer with `settings` as for `--set`; with a `library`, which also needs an NVIDIA GPU.

    `packed`: rows share sequences; otherwise the rows of a micro-batch are padded to its longest.
    """

    name: str
    what: str
    make: Callable[[Work], Any]
    packed: bool
    settings: tuple[str, ...] = ()
    library: str | None = None

    def missing(self, platform: Platform) -> str | None:
        """Return why it cannot run here, or None."""
        if self.library is None:
            return None
        if platform.name != "h100":
            return "needs CUDA"
        return None if importlib.util.find_spec(self.library) else f"{self.library} is not installed"


GEOMETRIES = {
    "7b": MISTRAL_7B,
    "demo": Geometry(576, 1536, 30, 9, 3, 49152, True),  # SmolLM2-135M
    "tiny": Geometry(64, 192, 2, 4, 2, 1000, False),
}


# None of our options for speed; a variant's own settings override these.
PLAIN = ("training.checkpointed_layers=all", "training.fused_lora=false", "training.fused_kernels=false")
PACKING = {
    "packing": True,
    "dataset_kwargs": {"skip_prepare_dataset": True},
}  # the rows are packed already


def job_config(job: Job, variant: Variant, attention: str = "auto") -> Config:
    """Return the platform's config with the job's steps; checkpointing as in configs/training_config_h100.yaml.

    Attention is flash-attn if installed, else torch's variable-length one, on a CPU SDPA with a mask.
    """
    settings = [
        f"model.name={MISTRAL}",  # never read: the weights are random
        f"model.max_seq_length={job.shape.length}",
        f"model.attn_implementation={attention}",
        f"training.per_device_train_batch_size={job.shape.micro_batch}",
        f"training.gradient_accumulation_steps={job.shape.accumulation}",
        f"training.max_steps={job.all_steps}",
        "training.gradient_checkpointing=true",
        "training.eval_steps=1000000",
        "training.save_steps=1000000",
        "tracking.report_to=none",
        *PLAIN,
        *variant.settings,
    ]
    if job.bf16:
        settings += ["model.dtype=bfloat16", "quantization.bnb_4bit_compute_dtype=bfloat16", "training.bf16=true"]
    if job.task == "losses":
        settings += ["lora.lora_dropout=0", "training.learning_rate=1.0e-3"]
        settings += ["training.lr_scheduler_type=constant", "training.warmup_ratio=0"]
    return load_config(job.platform, settings)[0]


# Trainers -------------------------------------------------------------------------------------------------------------


def _base(work: Work) -> Any:
    from finetune.prove.random_base import make_base

    return make_base(work.config, work.geometry, work.platform)


def _lora(config: Config) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.lora_alpha,
        lora_dropout=config.lora.lora_dropout,
        target_modules=list(config.lora.target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )


def _common(work: Work) -> dict[str, Any]:
    """Return the arguments that decide what is computed, which all trainers share."""
    training, shape = work.config.training, work.job.shape
    sequences = shape.sequences if work.variant.packed else len(work.steps[0].rows)
    return {
        "output_dir": str(work.folder),
        "max_steps": work.job.all_steps,
        "per_device_train_batch_size": shape.micro_batch,
        "gradient_accumulation_steps": sequences // shape.micro_batch,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.lr_scheduler_type,
        "warmup_steps": training.warmup_ratio,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "bf16": training.bf16,
        "seed": training.seed,
        "train_sampling_strategy": "sequential",
        "use_cpu": work.platform.device == "cpu",
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def transformers_trainer(work: Work) -> Any:
    """Follow the QLoRA tutorials: everything except NF4 cast to fp32, padded batches, a paged optimizer."""
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    base = prepare_model_for_kbit_training(
        _base(work), use_gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    set_seed(work.config.training.seed)
    optimizer = "paged_adamw_32bit" if work.platform.name == "h100" else "adamw_torch"
    return Trainer(
        model=get_peft_model(base, _lora(work.config)),
        args=TrainingArguments(**_common(work), **checkpointing, optim=optimizer),
        data_collator=DataCollatorForSeq2Seq(machine.tokenizer(), padding=True),
        train_dataset=one_by_one(work.steps),
    )


def trl_trainer(work: Work, **more: Any) -> Any:
    """Use SFTTrainer's own defaults: checkpointing, loss in tiles, bf16 adapter weights on a quantized base."""
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    packed, steps = work.variant.packed, work.steps
    if packed:
        more |= PACKING
    set_seed(work.config.training.seed)
    return SFTTrainer(
        model=_base(work),
        args=SFTConfig(**_common(work), max_length=work.job.shape.length, **more),
        train_dataset=packed_by_trl(steps, work.job.shape) if packed else one_by_one(steps),
        processing_class=machine.tokenizer(),
        peft_config=_lora(work.config),
    )


def liger_trainer(work: Work) -> Any:
    """Add Liger's kernels for norms, SwiGLU and RoPE to TRL; TRL rejects its fused loss, as it has its own."""
    return trl_trainer(work, use_liger_kernel=True)


def our_trainer(work: Work) -> Any:
    """Use src/train.py's model and trainer on the random base."""
    from finetune.model import load
    from finetune.plan import checkpointed_layers
    from finetune.runs.folder import Run
    from finetune.training import trainer
    from finetune.training.arguments import training_arguments

    config = work.config
    choice = checkpointed_layers.by_formula(config, work.geometry, capacity_gib(work.platform), "no rehearsal here")
    peft_model = load.adapt(_base(work), config)
    run = Run(work.folder / "run", False, None)
    arguments = training_arguments(config.training, run, work.platform, evaluate_first=False)
    arguments.train_sampling_strategy = "sequential"  # the rows' order is part of the benchmark
    arguments.eval_strategy = arguments.save_strategy = "no"  # what happens between steps is not
    rows = packed_by_us(work.steps)
    examples = trainer.Examples(rows, rows)
    return trainer.make_trainer(peft_model, machine.tokenizer(), examples, arguments, choice.layers)


def unsloth_trainer(work: Work) -> Any:
    """Use unsloth's loader, LoRA and checkpointing with TRL's trainer, as in its documentation; not run yet."""
    from unsloth import FastLanguageModel  # isort: skip  # first, as it patches transformers and trl
    from trl import SFTConfig, SFTTrainer

    saved = work.folder / "base"
    _base(work).save_pretrained(saved)  # in NF4, 4 GB for 7B: unsloth accepts only files
    machine.tokenizer().save_pretrained(saved)
    model, _ = FastLanguageModel.from_pretrained(
        str(saved), max_seq_length=work.job.shape.length, load_in_4bit=True, local_files_only=True
    )
    lora, seed = work.config.lora, work.config.training.seed
    model = FastLanguageModel.get_peft_model(
        model,
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=list(lora.target_modules),
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=seed,
    )
    arguments = SFTConfig(**_common(work), max_length=work.job.shape.length, **PACKING)
    rows = packed_by_trl(work.steps, work.job.shape)
    return SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=machine.tokenizer())


OURS, TUNED = "D", "D-all"
ALL_LEVERS = ("training.checkpointed_layers=auto", "training.fused_lora=true", "training.fused_kernels=true")
VARLEN = ("model.attn_implementation=torch_varlen",)
VARIANTS = {
    row.name: row
    for row in (  # most important first, in case time is short; losses are compared with the first
        Variant(OURS, "ours, no lever", our_trainer, packed=True),
        Variant(TUNED, "ours, all three levers", our_trainer, True, ALL_LEVERS),
        Variant("B-packed", "TRL SFTTrainer, packing=True", trl_trainer, packed=True),
        Variant("B", "TRL SFTTrainer as it comes", trl_trainer, packed=False),
        Variant("C-packed", "B-packed with Liger's kernels", liger_trainer, packed=True, library="liger_kernel"),
        Variant("C", "B with Liger's kernels", liger_trainer, packed=False, library="liger_kernel"),
        Variant("A", "transformers Trainer + PEFT + bitsandbytes, as copied", transformers_trainer, packed=False),
        # Each of our options alone.
        Variant("D-auto", "ours, few layers checkpointed", our_trainer, True, ("training.checkpointed_layers=auto",)),
        Variant("D-lora", "ours, fused LoRA", our_trainer, True, ("training.fused_lora=true",)),
        Variant("D-kernels", "ours, fused kernels", our_trainer, True, ("training.fused_kernels=true",)),
        Variant("D-expanded", "ours, NF4 unpacked once", our_trainer, True, ("quantization.storage=expanded",)),
        Variant("D-varlen", "ours, torch's varlen attention", our_trainer, True, VARLEN, "torch.nn.attention.varlen"),
        Variant("E", "unsloth", unsloth_trainer, packed=True, library="unsloth"),
        Variant("E-0", "unsloth, dropout 0", unsloth_trainer, True, ("lora.lora_dropout=0",), "unsloth"),
    )
}
