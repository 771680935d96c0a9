"""The config as transformers' and TRL's arguments."""

from __future__ import annotations

from trl import SFTConfig

from finetune.config.schema import TrainingConfig
from finetune.machine.platforms import Platform
from finetune.runs.folder import Run


def training_arguments(training: TrainingConfig, run: Run, platform: Platform, evaluate_first: bool) -> SFTConfig:
    """Convert the config to TRL's SFTConfig; `evaluate_first`: evaluate before the first step."""
    sft = SFTConfig(
        output_dir=str(run.checkpoints),
        run_name=run.name,
        report_to=[],  # we add the trackers as callbacks
        num_train_epochs=training.num_train_epochs,
        max_steps=training.max_steps,
        per_device_train_batch_size=training.per_device_train_batch_size,
        per_device_eval_batch_size=training.per_device_eval_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=training.warmup_ratio,  # below 1, transformers takes it as a ratio
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim=training.optim,
        bf16=training.bf16,
        fp16=training.fp16,
        # The name that every transformers 5 accepts; 5.17 has no activation_checkpointing.
        gradient_checkpointing=training.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if training.gradient_checkpointing else None,
        logging_strategy="steps",
        logging_steps=training.logging_steps,
        logging_nan_inf_filter=False,  # it would log NaN as 0
        eval_strategy="steps",
        eval_steps=training.eval_steps,
        eval_on_start=evaluate_first,
        save_strategy="steps",
        save_steps=training.save_steps,
        metric_for_best_model=training.metric_for_best_model,
        greater_is_better=False,
        load_best_model_at_end=False,  # Keeper keeps the best adapter, also between saves
        seed=training.seed,
        use_cpu=not platform.accelerated,
        dataloader_pin_memory=platform.pin_memory,
        remove_unused_columns=False,
        disable_tqdm=True,
        max_length=None,  # rows are already truncated and packed
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    sft._n_gpu = min(sft.n_gpu, 1)  # with more, transformers would split each batch over all of them
    return sft
