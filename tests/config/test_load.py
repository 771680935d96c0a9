"""The config: base, file and `--set` become one frozen tree, or one list of everything that is wrong with them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune import files
from finetune.cli import command
from finetune.config import load as config_load
from finetune.config import rules, schema, typed
from finetune.config.load import BASE_FILE, ROOT
from finetune.config.schema import Config
from finetune.errors import ConfigError
from finetune.machine.inspect import Machine

MACHINES = {
    "h100": (
        Machine("Linux", "x86_64", ("NVIDIA H100 80GB HBM3",), 79.1, 1007.6, 950.0),
        "found NVIDIA H100 80GB HBM3",
    ),
    "m4": (
        Machine("Darwin", "arm64", (), None, 32.0, 20.5),
        "found Apple silicon with 32 GiB of unified memory",
    ),
    "cpu": (
        Machine("Linux", "x86_64", (), None, 15.6, 12.0),
        "found no NVIDIA driver and no Apple silicon (Linux x86_64)",
    ),
}


@pytest.fixture
def local_model(tmp_path: Path) -> str:
    """A setting that names a local base model, so that no test asks whether the demo model is made."""
    folder = tmp_path / "base-model"
    folder.mkdir()
    return f"model.name={folder}"


def written(folder: Path, text: str, name: str = "mine.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def load(choice: str, *settings: str) -> Config:
    return config_load.load_config(choice, settings)[0]


def problems(choice: str | None, *settings: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        config_load.load_config(choice, settings)
    return caught.value.problems


def leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted path -> value."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= leaves(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {f"{prefix}{key}": inner}
    return found


def test_six_faults_in_one_file_are_reported_at_once_in_the_order_of_its_lines(
    tmp_path: Path, local_model: str
) -> None:
    text = """\
# six faults
platform: h200
model:
  max_seq_length: "512"
  dtype: bf16
lora:
  rank: 8
training:
  bf16: yes
  learning_rate: 2e4
  learning_rte: 2e-4
output: adapters
"""
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        config_load.load_config(path, [local_model, "training.seed=1.5"])
    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        "config: 8 problems\n"
        "  --set training.seed=1.5  training.seed: found 1.5 (number), wanted a whole number\n"
        f"  {path}:2  platform: found 'h200' (text), wanted h100 | m4 | cpu; did you mean h100?\n"
        f"  {path}:4  model.max_seq_length: found '512' (text), wanted a whole number\n"
        f"  {path}:5  model.dtype: found 'bf16' (text), wanted bfloat16 | float32; did you mean bfloat16?\n"
        f"  {path}:7  lora.rank: unknown key; did you mean lora.r?\n"
        f"  {path}:10  training.learning_rate: found 20000.0 (number), wanted more than 0 and at most 1\n"
        f"  {path}:11  training.learning_rte: unknown key; did you mean training.learning_rate?\n"
        f"  {path}:12  output: found 'adapters' (text), wanted a section with keys below it"
    )


def test_all_rules_that_are_broken_are_reported_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, "quantization: {load_in_4bit: false}\ntraining: {fp16: true}\n")
    with pytest.raises(ConfigError) as caught:
        config_load.load_config(path, ["model.name=someone/else", "training.max_steps=0", "lora.target_modules=[q]"])
    assert str(caught.value) == (
        "config: 5 problems\n"
        "  --set lora.target_modules=[q]  lora.target_modules: found q, "
        "wanted some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj\n"
        "  --set model.name=someone/else  model.name: found 'someone/else' (text), "
        "wanted mistralai/Mistral-7B-Instruct-v0.2 or a local folder that holds it\n"
        "  --set training.max_steps=0  training.max_steps: "
        "0 trains nothing; set a number of steps, or -1 for num_train_epochs\n"
        f"  {path}:1  quantization.load_in_4bit: false, but QLoRA trains on a 4-bit base; set it to true\n"
        f"  {path}:2  training.fp16: Mistral's activations overflow fp16; set training.bf16: true and fp16: false"
    )


TARGETS = "wanted some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
NAMES = "wanted letters, digits, '.', '_' and '-', beginning with a letter or digit"
BFLOAT16 = ("model.dtype=bfloat16", "quantization.bnb_4bit_compute_dtype=bfloat16")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["training.optim=paged_adamw_32bit"],
            "training.optim: paged_adamw_32bit does not work on CPU only (cpu); wanted adamw_torch",
        ),
        (
            ["model.attn_implementation=flash_attention_2"],
            "model.attn_implementation: flash_attention_2 does not work on CPU only (cpu); wanted sdpa",
        ),
        (
            ["platform=m4", "training.optim=paged_adamw_8bit"],
            "training.optim: paged_adamw_8bit does not work on Apple silicon (m4); wanted adamw_torch",
        ),
        (
            ["platform=m4", "model.attn_implementation=flash_attention_2"],
            "model.attn_implementation: flash_attention_2 does not work on Apple silicon (m4); wanted sdpa",
        ),
        (
            ["platform=m4", "training.fused_kernels=true"],
            "training.fused_kernels: true does not work on Apple silicon (m4); set it to false",
        ),
        (
            ["model.dtype=bfloat16", "quantization.bnb_4bit_compute_dtype=bfloat16", "training.fused_lora=true"],
            "training.fused_lora: true beside model.dtype bfloat16 without autocast, so adapters would lose their "
            "precision; set training.bf16: true, or this to false",
        ),
        (
            ["training.fp16=true"],
            "training.fp16: Mistral's activations overflow fp16; set training.bf16: true and fp16: false",
        ),
        (
            ["training.bf16=true"],
            "training.bf16: true beside model.dtype float32; set model.dtype: bfloat16 or bf16: false",
        ),
        (
            ["quantization.bnb_4bit_compute_dtype=bfloat16"],
            "quantization.bnb_4bit_compute_dtype: bfloat16 beside model.dtype float32; set both to the same",
        ),
        (
            ["quantization.load_in_4bit=false"],
            "quantization.load_in_4bit: false, but QLoRA trains on a 4-bit base; set it to true",
        ),
        (["lora.target_modules=[q_proj, lm_head, x]"], f"lora.target_modules: found lm_head, x, {TARGETS}"),
        (["lora.target_modules=[]"], f"lora.target_modules: found an empty list, {TARGETS}"),
        (
            ["training.eval_steps=40", "training.save_steps=100"],
            "training.save_steps: 100 is not a multiple of training.eval_steps 40, "
            "so saved steps would have no eval_loss to rank by; set it to 80",
        ),
        (
            ["training.max_steps=0"],
            "training.max_steps: 0 trains nothing; set a number of steps, or -1 for num_train_epochs",
        ),
        (["tracking.run_name=../x"], f"tracking.run_name: found '../x' (text), {NAMES}"),
        (["tracking.run_name=a/b"], f"tracking.run_name: found 'a/b' (text), {NAMES}"),
        (["tracking.run_name=/etc"], f"tracking.run_name: found '/etc' (text), {NAMES}"),
        (["tracking.run_name=.."], f"tracking.run_name: found '..' (text), {NAMES}"),
        (["tracking.run_name=-x"], f"tracking.run_name: found '-x' (text), {NAMES}"),
        (["tracking.run_name=a b"], f"tracking.run_name: found 'a b' (text), {NAMES}"),
        (['tracking.run_name="a\\n"'], f"tracking.run_name: found 'a\\n' (text), {NAMES}"),
        (
            ["model.name=mistralai/Mistral-7B-v0.1"],
            "model.name: found 'mistralai/Mistral-7B-v0.1' (text), "
            "wanted mistralai/Mistral-7B-Instruct-v0.2 or a local folder that holds it",
        ),
    ],
)
def test_a_combination_that_cannot_work_is_refused(settings: list[str], message: str, local_model: str) -> None:
    key = message.split(":")[0]
    place = next(f"--set {setting}" for setting in reversed(settings) if setting.startswith(f"{key}="))
    assert problems(str(BASE_FILE), local_model, *settings) == (f"{place}  {message}",)


@pytest.mark.parametrize(
    "settings",
    [
        [*BFLOAT16, "training.bf16=true"],
        BFLOAT16,
        ["platform=h100", "training.optim=paged_adamw_8bit", "model.attn_implementation=flash_attention_2"],
        ["platform=h100", "training.optim=adamw_torch", "model.attn_implementation=sdpa"],
        ["platform=m4"],
        ["lora.target_modules=[q_proj]"],
        ["training.max_steps=1"],
        ["training.max_steps=-1"],
        ["tracking.run_name=a"],
        ["tracking.run_name=2024-01-31_lr.1"],
        ["tracking.run_name=" + "x" * 100],
        ["training.eval_steps=7", "training.save_steps=7"],
        ["model.name=mistralai/Mistral-7B-Instruct-v0.2"],
    ],
)
def test_a_combination_that_works_is_accepted(settings: list[str], local_model: str) -> None:
    load(str(BASE_FILE), local_model, *settings)


@pytest.mark.parametrize("name", ["", "x" * 101, "~", "a\\b", "é"])
def test_a_run_name_that_is_no_folder_name_is_refused(name: str, local_model: str) -> None:
    [line] = problems(str(BASE_FILE), local_model, f"tracking.run_name='{name}'")
    assert "  tracking.run_name: found " in line


@pytest.mark.parametrize(("save", "evaluate"), [(500, 7), (1, 100), (149, 100), (151, 100), (10, 3), (99, 100), (3, 2)])
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
    wanted = f"models/demo-135m is not there; type: {command('scripts/make_demo_model.py')}"
    assert problems(path) == (f"{path}:2  model.name: {wanted}",)
    (tmp_path / "models" / "demo-135m").mkdir(parents=True)
    assert load(path).model.name == "models/demo-135m"


def test_a_local_folder_is_accepted_as_base_model_absolute_or_from_the_root(tmp_path: Path) -> None:
    for name in (str(tmp_path), "data/sample"):
        assert schema.is_local(load(str(BASE_FILE), f"model.name={name}").model.name)
    assert not schema.is_local("mistralai/Mistral-7B-Instruct-v0.2")


@pytest.mark.parametrize("name", ["''", "~nobody-of-this-name/model", "x" * 300, "pyproject.toml"])
def test_a_base_model_that_is_no_folder_is_a_config_error_whatever_its_form(name: str) -> None:
    [line] = problems(str(BASE_FILE), f"model.name={name}")
    assert line.startswith(f"--set model.name={name}  model.name: found ")


@pytest.mark.parametrize("digits", ["1" + "0" * 400, "0x" + "f" * 5000, "9" * 5000])
@pytest.mark.parametrize("key", ["training.learning_rate", "lora.lora_alpha", "training.save_steps"])
def test_an_absurdly_large_number_is_a_config_error(key: str, digits: str, local_model: str) -> None:
    [line] = problems(str(BASE_FILE), local_model, "training.eval_steps=7", f"{key}={digits}")
    assert line.startswith(f"--set {key}=")


@pytest.mark.parametrize(
    ("text", "line"), [("model:\n", "model: found null"), ("seed: 1\nlora: 5\n", "lora: found 5 (whole number)")]
)
def test_a_section_without_keys_is_reported_as_that_and_not_as_missing_keys(
    text: str, line: str, tmp_path: Path, local_model: str
) -> None:
    path = written(tmp_path, text.replace("seed: 1", "system_prompt: hello"))
    settings = [] if text.startswith("model") else [local_model]
    number = text.count("\n")
    assert problems(path, *settings) == (f"{path}:{number}  {line}, wanted a section with keys below it",)


def test_a_value_inside_a_section_that_is_set_is_blamed_on_the_setting(local_model: str) -> None:
    setting = "lora={r: x}"
    found = problems(str(BASE_FILE), local_model, setting)
    assert found == (f"--set {setting}  lora.r: found 'x' (text), wanted a whole number",)


def test_a_dotted_key_in_a_file_is_told_apart_from_a_setting(tmp_path: Path, local_model: str) -> None:
    path = written(tmp_path, "lora.r: 8\n")
    [line] = problems(path, local_model)
    assert line.startswith(f"{path}:1  lora.r: unknown key")
    assert not line.endswith("did you mean lora.r?")


def test_a_setting_wins_over_the_file_and_the_file_over_the_base(tmp_path: Path, local_model: str) -> None:
    path = written(tmp_path, "lora: {r: 8, lora_alpha: 64}\n")
    base = load(str(BASE_FILE), local_model)
    tree = load(path, local_model, "lora.lora_alpha=128", "lora.lora_alpha=256")
    assert (base.lora.r, base.lora.lora_alpha, base.lora.lora_dropout) == (16, 32, 0.05)
    assert (tree.lora.r, tree.lora.lora_alpha, tree.lora.lora_dropout) == (8, 256, 0.05)
    before, after = leaves(base.as_dict()), leaves(tree.as_dict())
    changed = {key for key in after if after[key] != before[key]}
    assert changed == {"lora.r", "lora.lora_alpha", "tracking.run_name"}


def test_a_list_is_replaced_and_null_takes_a_value_away(tmp_path: Path, local_model: str) -> None:
    path = written(tmp_path, "lora: {target_modules: [v_proj]}\ntraining: {early_stopping_patience: null}\n")
    tree = load(path, local_model)
    assert tree.lora.target_modules == ("v_proj",)
    assert tree.training.early_stopping_patience is None


def test_no_file_is_touched(tmp_path: Path, local_model: str) -> None:
    files = [*sorted((ROOT / "configs").glob("*.yaml")), Path(written(tmp_path, "lora: {r: 8}\n"))]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    for path in files:
        load(str(path), local_model, "lora.r=4")
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in files] == before
    assert sorted(item.name for item in tmp_path.iterdir()) == ["base-model", "mine.yaml"]


@pytest.mark.parametrize("name", list(MACHINES))
def test_without_a_choice_the_detected_platforms_file_is_used_and_the_reason_told(
    name: str, local_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, reason = MACHINES[name]
    monkeypatch.setattr(config_load, "read_machine", lambda: machine)
    monkeypatch.chdir(ROOT)
    tree, sentence = config_load.load_config(None, [local_model])
    assert tree.platform == name
    assert sentence == f"configs/training_config_{name}.yaml ({reason})"


@pytest.mark.parametrize("name", list(MACHINES))
def test_a_platforms_name_means_its_file_and_looks_at_no_machine(
    name: str, local_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config_load, "read_machine", lambda: pytest.fail("looked at the machine"))
    monkeypatch.chdir(ROOT)
    tree, sentence = config_load.load_config(name, [local_model])
    assert tree.platform == name
    assert sentence == f"configs/training_config_{name}.yaml (--config {name})"


def test_a_path_is_taken_from_the_working_directory(
    tmp_path: Path, local_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, "lora: {r: 8}\n")
    monkeypatch.chdir(tmp_path)
    tree, sentence = config_load.load_config("mine.yaml", [local_model])
    assert tree.lora.r == 8
    assert sentence == "mine.yaml (--config mine.yaml)"


@pytest.mark.parametrize("choice", ["h200", "configs/none.yaml", "", "configs"])
def test_a_choice_that_is_no_file_comes_with_the_names_that_work(choice: str) -> None:
    assert problems(choice) == (f"--config {choice}: no such file; type a path or one of: h100, m4, cpu",)


def test_a_choice_that_is_too_long_for_a_path_is_a_config_error() -> None:
    [line] = problems("x" * 300)
    assert line.startswith("--config xxx")


def test_the_run_name_comes_from_the_files_name_where_no_one_gave_it(tmp_path: Path, local_model: str) -> None:
    assert load(written(tmp_path, "", "my-run.v2.yaml"), local_model).run_name == "my-run.v2"
    assert load(written(tmp_path, "tracking: {run_name: given}\n"), local_model).run_name == "given"
    assert load(str(BASE_FILE), local_model, "tracking.run_name=set").run_name == "set"


def test_relative_paths_are_from_the_projects_root_whatever_the_working_directory(
    tmp_path: Path, local_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = load(str(BASE_FILE), local_model, "tracking.run_name=x").run_folder
    monkeypatch.chdir(tmp_path)
    assert load(str(BASE_FILE), local_model, "tracking.run_name=x").run_folder == here == ROOT / "adapters" / "x"
    assert files.resolve("data/sample/train.jsonl") == ROOT / "data" / "sample" / "train.jsonl"
    assert files.resolve(str(tmp_path)) == tmp_path
    assert files.resolve("~/runs") == Path.home() / "runs"
    elsewhere = load(str(BASE_FILE), local_model, f"output.dir={tmp_path}", "tracking.run_name=x")
    assert elsewhere.run_folder == tmp_path / "x"


def other(value: Any) -> Any:
    """Some other value of the same kind."""
    if isinstance(value, dict):
        raise TypeError(value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return [*value, "more"] if isinstance(value, list | tuple) else f"{value}x"


def test_the_hash_changes_with_any_value(local_model: str) -> None:
    tree = load(str(BASE_FILE), local_model)
    hashes = {tree.sha256()}
    for path in leaves(tree.as_dict()):
        section, _, key = path.rpartition(".")
        changed: Any = getattr(tree, section) if section else tree
        changed = dataclasses.replace(changed, **{key: other(getattr(changed, key))})
        hashes.add((dataclasses.replace(tree, **{section: changed}) if section else changed).sha256())
    assert len(hashes) == 1 + len(leaves(tree.as_dict()))


def test_the_hash_does_not_change_with_comments_order_or_spelling(tmp_path: Path, local_model: str) -> None:
    one = written(tmp_path, "lora: {r: 8, lora_alpha: 16}\ntraining:\n  learning_rate: 0.0002\n  weight_decay: 0\n")
    first = load(one, local_model).sha256()
    two = written(
        tmp_path, "# notes\ntraining: {weight_decay: 0.0, learning_rate: 2e-4}\nlora: {lora_alpha: 16, r: 8}\n"
    )
    assert load(two, local_model).sha256() == first
    assert load(two, local_model, "lora.r=9").sha256() != first
    assert len(first) == 64


def test_the_tree_is_frozen_at_every_depth(local_model: str) -> None:
    tree = load(str(BASE_FILE), local_model)
    for path in typed.paths(Config):
        section, _, key = path.rpartition(".")
        holder: Any = getattr(tree, section) if section else tree
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(holder, key, None)
    assert hash(tree) == hash(load(str(BASE_FILE), local_model))


def test_the_tree_as_a_mapping_is_json_and_loads_again_to_the_same_tree(tmp_path: Path, local_model: str) -> None:
    settings = ["dataset.sample_prompts=['a: b', é, '2e-4 x']", "training.learning_rate=1e-5", "system_prompt=hello"]
    tree = load("m4", local_model, *settings)
    again = json.loads(json.dumps(tree.as_dict()))
    assert again == tree.as_dict()
    path = written(tmp_path, yaml.safe_dump(again))
    assert load(path) == tree
    assert load(written(tmp_path, json.dumps(again))) == tree


def test_a_step_takes_the_micro_batch_times_the_accumulation(local_model: str) -> None:
    settings = ["training.per_device_train_batch_size=3", "training.gradient_accumulation_steps=5"]
    assert load(str(BASE_FILE), local_model, *settings).effective_batch_size == 15


def test_what_a_config_must_bring_is_in_the_schema_and_in_the_base(local_model: str) -> None:
    assert set(config_load.REQUIRED) <= set(typed.paths(Config))
    assert len(config_load.REQUIRED) == 11
    load(str(BASE_FILE), local_model)


def test_every_missing_required_key_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = Path(written(tmp_path, "platform: cpu\nmodel: {}\nlora: {r: 8}\ntraining: {}\n"))
    monkeypatch.setattr(config_load, "BASE_FILE", bare)
    missing = [key for key in config_load.REQUIRED if key != "lora.r"]
    assert problems(str(bare)) == tuple(f"{key}: missing; add it to the config file" for key in missing)


def test_problems_of_the_file_and_of_each_set_are_told_together(tmp_path: Path, local_model: str) -> None:
    path = written(tmp_path, "lora:\n  r: 1\n  r: 2\nseed: 1\nseed: 2\n")
    assert problems(path, local_model, "foo", "lora.lora_alpha=abc") == (
        "--set foo: wanted dotted.key=value, for example --set training.max_steps=50",
        "--set lora.lora_alpha=abc  lora.lora_alpha: found 'abc' (text), wanted a whole number",
        f"{path}:3: duplicate key 'r' (first on line 2); keep one",
        f"{path}:5: duplicate key 'seed' (first on line 4); keep one",
    )


def test_a_constant_learning_rate_has_no_warm_up(local_model: str) -> None:
    assert problems("cpu", local_model, "training.lr_scheduler_type=constant")[0].endswith(
        "training.warmup_ratio: 0.03 beside lr_scheduler_type constant, which has no warm-up; set it to 0, "
        "or lr_scheduler_type: constant_with_warmup"
    )
    load("cpu", local_model, "training.lr_scheduler_type=constant", "training.warmup_ratio=0")
