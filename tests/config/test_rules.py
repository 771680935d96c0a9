"""Values that do not go together are refused, with what to set."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune import files
from finetune.cli import command
from finetune.config import base_model, rules
from finetune.config import load as config_load
from finetune.config.load import BASE_FILE
from finetune.errors import ConfigError
from support.configs import load, problems, written


def test_all_rules_that_are_broken_are_reported_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, "quantization: {load_in_4bit: false}\ntraining: {fp16: true}\n")
    with pytest.raises(ConfigError) as caught:
        config_load.load_config(path, ["model.name=someone/else", "training.max_steps=0", "lora.target_modules=[q]"])
    assert str(caught.value) == (
        "config: 5 problems\n"
        "  --set lora.target_modules=[q]  lora.target_modules: found q, "
        "expected some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj\n"
        "  --set model.name=someone/else  model.name: found 'someone/else' (text), "
        "expected mistralai/Mistral-7B-Instruct-v0.2 or a local folder that holds it\n"
        "  --set training.max_steps=0  training.max_steps: "
        "0 trains nothing; set a number of steps, or -1 for num_train_epochs\n"
        f"  {path}:1  quantization.load_in_4bit: false, but QLoRA trains on a 4-bit base; set it to true\n"
        f"  {path}:2  training.fp16: Mistral's activations overflow fp16; set training.bf16: true and fp16: false"
    )


TARGETS = "expected some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
NAMES = "expected letters, digits, '.', '_' and '-', beginning with a letter or digit"
BFLOAT16 = ("model.dtype=bfloat16", "quantization.bnb_4bit_compute_dtype=bfloat16")
TWICE = "dataset.train_file=[data/a.jsonl, b.jsonl, {path: ./data/x/../a.jsonl, weight: 2}]"
CONSTANT = "training.lr_scheduler_type=constant"
REFUSED: list[tuple[tuple[str, ...], str]] = [
    (("training.optim=paged_adamw_32bit",),
        "training.optim: paged_adamw_32bit does not work on CPU only (cpu); expected adamw_torch"),
    (("model.attn_implementation=flash_attention_2",),
        "model.attn_implementation: flash_attention_2 does not work on CPU only (cpu); expected sdpa"),
    (("platform=m4", "training.optim=paged_adamw_8bit"),
        "training.optim: paged_adamw_8bit does not work on Apple silicon (m4); expected adamw_torch"),
    (("platform=m4", "training.fused_kernels=true"),
        "training.fused_kernels: true does not work on Apple silicon (m4); set it to false"),
    ((*BFLOAT16, "training.fused_lora=true"),
        "training.fused_lora: true does not work with model.dtype bfloat16 and no autocast (training.bf16: "
        "false): adapters would lose their precision; set it to false"),
    (("training.fp16=true",),
        "training.fp16: Mistral's activations overflow fp16; set training.bf16: true and fp16: false"),
    (("training.bf16=true",),
        "training.bf16: true, but model.dtype is float32; set model.dtype: bfloat16 or bf16: false"),
    (("platform=h100", "model.attn_implementation=torch_varlen", "training.optim=adamw_torch"),
        "model.attn_implementation: torch_varlen does not support model.dtype float32; "
        "set model.dtype: bfloat16, or this to sdpa"),
    (("quantization.bnb_4bit_compute_dtype=bfloat16",),
        "quantization.bnb_4bit_compute_dtype: bfloat16, but model.dtype is float32; set both to the same"),
    (("quantization.load_in_4bit=false",),
        "quantization.load_in_4bit: false, but QLoRA trains on a 4-bit base; set it to true"),
    (("lora.target_modules=[q_proj, lm_head, x]",), f"lora.target_modules: found lm_head, x, {TARGETS}"),
    (("lora.target_modules=[]",), f"lora.target_modules: found an empty list, {TARGETS}"),
    (("training.eval_steps=40", "training.save_steps=100"),
        "training.save_steps: 100 is not a multiple of training.eval_steps 40, "
        "so saved steps would have no eval_loss to rank by; set it to 80"),
    (("training.max_steps=0",),
        "training.max_steps: 0 trains nothing; set a number of steps, or -1 for num_train_epochs"),
    (("platform=m4", "model.max_seq_length=4096", "training.per_device_train_batch_size=9"),
        "training.per_device_train_batch_size: 9 x model.max_seq_length 4096 is 36,864 tokens in one backward "
        "pass; above 32,768, gradients are wrong on Apple silicon (m4), pytorch#177116; set it to 8"),
    (("tracking.run_name=../x",), f"tracking.run_name: found '../x' (text), {NAMES}"),
    (("tracking.run_name=a/b",), f"tracking.run_name: found 'a/b' (text), {NAMES}"),
    (('tracking.run_name="a\\n"',), f"tracking.run_name: found 'a\\n' (text), {NAMES}"),
    (("model.name=mistralai/Mistral-7B-v0.1",),
        "model.name: found 'mistralai/Mistral-7B-v0.1' (text), "
        "expected mistralai/Mistral-7B-Instruct-v0.2 or a local folder that holds it"),
    ((TWICE,),
        "dataset.train_file: data/a.jsonl is listed twice; list it once, or to repeat its rows type "
        "{path: data/a.jsonl, weight: 2}"),
    ((CONSTANT, "training.warmup_ratio=0.03"),
        "training.warmup_ratio: 0.03, but lr_scheduler_type constant has no warmup; set it to 0, "
        "or lr_scheduler_type: constant_with_warmup"),
    (("output.copy_to=hf://me",), "output.copy_to: found 'hf://me' (text), expected hf://OWNER/NAME or a folder"),
    (("output.copy_to=hf://a/b/c",), "output.copy_to: found 'hf://a/b/c' (text), expected hf://OWNER/NAME or a folder"),
    (("output.copy_to=adapters",), "output.copy_to: is output.dir itself; name a folder on another disk"),
    (("output.copy_checkpoints=true",),
        "output.copy_checkpoints: true has no effect without output.copy_to; set that, or this to false"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_a_combination_that_cannot_work_is_refused(settings: tuple[str, ...], message: str, local_model: str) -> None:
    key = message.split(":")[0]
    place = next(f"--set {setting}" for setting in reversed(settings) if setting.startswith(f"{key}="))
    assert problems(str(BASE_FILE), local_model, *settings) == (f"{place}  {message}",)


@pytest.mark.parametrize(
    "settings",
    [
        [*BFLOAT16, "training.bf16=true"],
        BFLOAT16,
        ["platform=h100", "training.optim=paged_adamw_8bit", "model.attn_implementation=flash_attention_2"],
        ["platform=m4", "model.max_seq_length=4096", "training.per_device_train_batch_size=8"],
        ["platform=h100", "model.max_seq_length=4096", "training.per_device_train_batch_size=9"],
        ["tracking.run_name=2024-01-31_lr.1"],
        ["tracking.run_name=" + "x" * 100],
        ["training.eval_steps=7", "training.save_steps=7"],
        ["model.name=mistralai/Mistral-7B-Instruct-v0.2"],
        [CONSTANT, "training.warmup_ratio=0"],
        ["output.copy_to=/mnt/disk"],
        ["output.copy_to=hf://me/copies", "output.copy_checkpoints=true"],
    ],
)
def test_a_combination_that_works_is_accepted(settings: list[str], local_model: str) -> None:
    load(str(BASE_FILE), local_model, *settings)


@pytest.mark.parametrize("name", ["", "x" * 101, "..", "-x", "a b", "é"])
def test_a_run_name_that_is_no_folder_name_is_refused(name: str, local_model: str) -> None:
    [line] = problems(str(BASE_FILE), local_model, f"tracking.run_name='{name}'")
    assert "  tracking.run_name: found " in line


@pytest.mark.parametrize(("save", "evaluate"), [(500, 7), (1, 100), (151, 100)])
def test_the_save_steps_that_the_message_suggests_are_accepted(save: int, evaluate: int, local_model: str) -> None:
    settings = [local_model, f"training.eval_steps={evaluate}"]
    [line] = problems(str(BASE_FILE), *settings, f"training.save_steps={save}")
    suggested = int(line.rsplit(" ", 1)[1])
    assert load(str(BASE_FILE), *settings, f"training.save_steps={suggested}").training.save_steps == suggested
    assert abs(suggested - save) <= evaluate


def test_the_demo_model_that_is_not_made_yet_comes_with_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in (files, rules):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    path = written(tmp_path, "model:\n  name: models/demo-135m\n")
    wanted = f"models/demo-135m does not exist; run: {command('scripts/make_demo_model.py')}"
    assert problems(path) == (f"{path}:2  model.name: {wanted}",)
    (tmp_path / "models" / "demo-135m").mkdir(parents=True)
    assert load(path).model.name == "models/demo-135m"


def test_a_local_folder_is_accepted_as_base_model_absolute_or_from_the_root(tmp_path: Path) -> None:
    for name in (str(tmp_path), "data/sample"):
        assert base_model.is_local(load(str(BASE_FILE), f"model.name={name}").model.name)
    assert not base_model.is_local("mistralai/Mistral-7B-Instruct-v0.2")


@pytest.mark.parametrize("name", ["''", "~nobody-of-this-name/model", "x" * 300, "pyproject.toml"])
def test_a_base_model_that_is_no_folder_is_a_config_error_whatever_its_form(name: str) -> None:
    [line] = problems(str(BASE_FILE), f"model.name={name}")
    assert line.startswith(f"--set model.name={name}  model.name: found ")
