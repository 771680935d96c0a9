"""The config: base, file and `--set` become one frozen tree, or one list of everything that is wrong with them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from finetune import files
from finetune.config import load as config_load
from finetune.config.load import BASE_FILE, ROOT
from finetune.config.schema import Mark, marked
from finetune.errors import ConfigError
from finetune.machine.inspect import Machine
from support.configs import leaves, load, problems, written

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
        "  --set training.seed=1.5  training.seed: found 1.5 (number), expected a whole number\n"
        f"  {path}:2  platform: found 'h200' (text), expected h100 | m4 | cpu; did you mean h100?\n"
        f"  {path}:4  model.max_seq_length: found '512' (text), expected a whole number\n"
        f"  {path}:5  model.dtype: found 'bf16' (text), expected bfloat16 | float32; did you mean bfloat16?\n"
        f"  {path}:7  lora.rank: unknown key; did you mean lora.r?\n"
        f"  {path}:10  training.learning_rate: found 20000.0 (number), expected more than 0 and at most 1\n"
        f"  {path}:11  training.learning_rte: unknown key; did you mean training.learning_rate?\n"
        f"  {path}:12  output: found 'adapters' (text), expected a section with keys below it"
    )


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
    assert problems(path, *settings) == (f"{path}:{number}  {line}, expected a section with keys below it",)


def test_a_value_inside_a_section_that_is_set_is_blamed_on_the_setting(local_model: str) -> None:
    setting = "lora={r: x}"
    found = problems(str(BASE_FILE), local_model, setting)
    assert found == (f"--set {setting}  lora.r: found 'x' (text), expected a whole number",)


def test_all_settings_that_cannot_be_read_are_reported_at_once(local_model: str) -> None:
    found = problems(str(BASE_FILE), local_model, "a", "lora.r=8", "b=[1", "c")
    assert [line.split(":")[0] for line in found] == ["--set a", "--set b=[1", "--set c"]


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


@pytest.mark.parametrize(("flash_attn", "chosen"), [(True, "flash_attention_2"), (False, "torch_varlen")])
def test_auto_is_the_first_attention_that_is_installed_and_the_config_holds_its_name(
    flash_attn: bool, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_attn.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    if not flash_attn:
        monkeypatch.setitem(sys.modules, "flash_attn", None)
    tree, sentence = config_load.load_config("h100", ["model.attn_implementation=auto"])
    assert tree.model.attn_implementation == chosen
    assert sentence == (
        f"configs/training_config_h100.yaml (--config h100; model.attn_implementation auto: {chosen}, "
        "the first of flash_attention_2, torch_varlen, sdpa that is installed)"
    )


def test_auto_is_sdpa_where_there_is_no_choice(local_model: str) -> None:
    assert load("cpu", local_model, "model.attn_implementation=auto").model.attn_implementation == "sdpa"


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


def test_what_a_config_must_bring_is_in_the_base(local_model: str) -> None:
    assert len(marked(Mark.REQUIRED)) == 11
    load(str(BASE_FILE), local_model)


def test_every_missing_required_key_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = Path(written(tmp_path, "platform: cpu\nmodel: {}\nlora: {r: 8}\ntraining: {}\n"))
    monkeypatch.setattr(config_load, "BASE_FILE", bare)
    missing = [key for key in marked(Mark.REQUIRED) if key != "lora.r"]
    assert problems(str(bare)) == tuple(f"{key}: missing; add it to the config file" for key in missing)


def test_problems_of_the_file_and_of_each_set_are_told_together(tmp_path: Path, local_model: str) -> None:
    path = written(tmp_path, "lora:\n  r: 1\n  r: 2\nseed: 1\nseed: 2\n")
    assert problems(path, local_model, "foo", "lora.lora_alpha=abc") == (
        "--set foo: expected dotted.key=value, for example --set training.max_steps=50",
        "--set lora.lora_alpha=abc  lora.lora_alpha: found 'abc' (text), expected a whole number",
        f"{path}:3: duplicate key 'r' (first on line 2); keep one",
        f"{path}:5: duplicate key 'seed' (first on line 4); keep one",
    )
