"""What an unknown key may mean: a near spelling, another trainer's name, or an option that is not offered."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Names that other trainers use for our keys.
SYNONYMS = {
    "rank": "lora.r",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "alpha": "lora.lora_alpha",
    "dropout": "lora.lora_dropout",
    "lora_target_modules": "lora.target_modules",
    "base_model": "model.name",
    "model_name_or_path": "model.name",
    "torch_dtype": "model.dtype",
    "sequence_len": "model.max_seq_length",
    "max_length": "model.max_seq_length",
    "cutoff_len": "model.max_seq_length",
    "batch_size": "training.per_device_train_batch_size",
    "micro_batch_size": "training.per_device_train_batch_size",
    "epochs": "training.num_train_epochs",
    "num_epochs": "training.num_train_epochs",
    "lr": "training.learning_rate",
    "lr_scheduler": "training.lr_scheduler_type",
    "optimizer": "training.optim",
    "sample_packing": "training.packing",
    "val_set_size": "dataset.validation_split",
    "output_dir": "output.dir",
    "wandb_project": "tracking.project",
}

# Options of other trainers that this one lacks: what to use instead, or why.
NOT_OFFERED = {
    "use_rslora": "the scale is lora_alpha / r; set lora.lora_alpha",
    "use_dora": "the adapter is plain LoRA; for more capacity raise lora.r and lora.lora_alpha",
    "modules_to_save": "only LoRA weights are trained; lora.target_modules names the layers",
    "layers_to_transform": "every decoder layer gets an adapter; lora.target_modules names the modules",
    "init_lora_weights": "LoRA starts as PEFT's default does, from training.seed",
    "load_in_8bit": "the base is always in 4 bits (QLoRA); see quantization",
    "neftune_noise_alpha": "to limit overfitting, set lora.lora_dropout or training.early_stopping_patience",
    "label_smoothing_factor": "the loss is plain cross-entropy, so that eval_loss can be compared between runs",
    "max_grad_value": "gradients are clipped by their norm; set training.max_grad_norm",
    "warmup_steps": "warmup is a share of the steps; set training.warmup_ratio",
    "eval_strategy": "set training.eval_steps",
    "save_strategy": "set training.save_steps and training.save_minutes",
    "group_by_length": "training.packing leaves no padding to save",
    "use_liger_kernel": "set training.fused_kernels and training.fused_lora",
    "torch_compile": "set training.fused_kernels",
    "assistant_only_loss": "loss is always computed on assistant text only",
    "train_on_inputs": "loss is always computed on assistant text only",
    "chat_template": "conversations always use Mistral's own template",
    "resume_from_checkpoint": "the same command resumes from the newest checkpoint",
    "push_to_hub": "upload the run's folder with: hf upload",
    "deepspeed": "a run uses one GPU",
    "fsdp": "a run uses one GPU",
}


def unknown(path: str, everywhere: Iterable[str]) -> str:
    """The message for an unknown dotted path; `everywhere` has all known paths."""
    why = NOT_OFFERED.get(path.rsplit(".", 1)[-1])
    return f"not offered; {why}" if why else "unknown key" + did_you_mean(path, everywhere)


def did_you_mean(path: str, everywhere: Iterable[str]) -> str:
    """`; did you mean ...?` for an unknown dotted path, or nothing.

    Suggests the key spelled most like its last part, preferably in the same section; synonyms count as their keys.
    """
    everywhere = list(everywhere)
    section, _, leaf = path.rpartition(".")
    if path in everywhere:
        return f"; dots are for --set: write {leaf}: below {section}:"
    names = {synonym: key for synonym, key in SYNONYMS.items() if key in everywhere}
    near_last = sorted(everywhere, key=lambda known: known.startswith(f"{section}."))
    names = {known.rsplit(".", 1)[-1]: known for known in near_last} | names
    near = difflib.get_close_matches(leaf, names, 1, 0.6)
    return f"; did you mean {names[near[0]]}?" if near else ""
