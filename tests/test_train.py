"""`python src/train.py` from the outside: what a run leaves, and what interruption, damage and change do to it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel

from finetune.cli import PYTHON
from finetune.config.base_model import MISTRAL
from finetune.config.load import load_config
from finetune.data.tokenizer import load_chat
from finetune.files import read_seal
from finetune.model.load import load_base
from finetune.results.model_card import model_card
from support.train_command import ENVIRONMENT, FILES, STEPS, Command

VERSIONED = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes", "tokenizers")


@dataclass(frozen=True)
class Finished:
    """One finished run, made with --json."""

    command: Command
    done: subprocess.CompletedProcess[str]

    @property
    def folder(self) -> Path:
        return self.command.output / "run"

    @property
    def manifest(self) -> dict[str, Any]:
        return read_manifest(self.folder)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def read_manifest(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return content


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="session")
def finished(tiny_mistral: Path, train_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    command = Command(tiny_mistral, train_file, tmp_path_factory.mktemp("finished"))
    done = command("--json")
    assert done.returncode == 0, done.stderr
    return Finished(command, done)


# --- what a finished run leaves


def test_a_finished_run_leaves_these_files_and_no_others(finished: Finished) -> None:
    assert names(finished.folder) == sorted(FILES)
    assert names(finished.folder / "checkpoints") == ["best", "checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_every_file_has_the_mode_that_the_umask_gives(finished: Finished) -> None:
    umask = os.umask(0)
    os.umask(umask)
    modes = {str(path): oct(path.stat().st_mode & 0o777) for path in finished.folder.rglob("*") if path.is_file()}
    assert modes == dict.fromkeys(modes, oct(0o666 & ~umask))


def test_no_pickle_of_arguments_lies_anywhere(finished: Finished) -> None:
    found = {path.name for path in finished.folder.rglob("*")}
    assert "training_args.bin" not in found
    assert {name for name in found if name.endswith((".pt", ".pth", ".bin", ".pkl"))} == {
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
    }
    assert not [name for name in names(finished.folder) if name.endswith((".pt", ".pth", ".bin", ".pkl"))]


MANIFEST: dict[str, type | tuple[type, ...]] = {
    "status": str,
    "config_sha256": str,
    "data": dict,
    "tokens": dict,
    "rows": dict,
    "base_model": dict,
    "init_adapter": dict,
    "versions": dict,
    "environment": dict,
    "hardware": dict,
    "git_commit": (str, type(None)),
    "copy_to": (str, type(None)),
    "skipped_checks": list,
    "same_bits": (str, type(None)),
    "plan": dict,
    "fused_kernels": bool,
    "fused_lora": bool,
    "checkpointed_layers": int,
    "starts": list,
    "steps": int,
    "train_loss": float,
    "eval_loss_before": float,
    "eval_loss": float,
    "best_step": int,
    "stopped_early": bool,
    "tokens_per_second": float,
    "peak_memory_gib": float,
    "seconds": float,
    "adapter_sha256": str,
    "self_test": dict,
    "samples": list,
}


def test_the_manifest_has_these_fields_of_these_types(finished: Finished) -> None:
    manifest = finished.manifest
    assert list(manifest) == list(MANIFEST)
    wrong = {name: manifest[name] for name, kind in MANIFEST.items() if not isinstance(manifest[name], kind)}
    assert wrong == {}


def test_the_manifest_says_what_the_run_was(finished: Finished) -> None:
    manifest = finished.manifest
    config = load_config("cpu", finished.command.settings())[0]
    assert manifest["status"] == "complete"
    assert manifest["config_sha256"] == config.sha256()
    path = finished.command.train_file
    assert manifest["data"] == {"train": {"path": str(path), "sha256": sha256(path), "rows": 60}}
    assert manifest["base_model"] == {"name": finished.command.base.name, "revision": None}
    assert set(VERSIONED) < set(manifest["versions"])
    assert manifest["adapter_sha256"] == sha256(finished.folder / "adapter_model.safetensors")
    assert (manifest["steps"], manifest["stopped_early"], manifest["samples"]) == (STEPS, False, [])
    assert manifest["hardware"]["platform"] == "cpu"
    assert manifest["same_bits"] is None  # only a GPU is asked
    assert min(manifest[name] for name in ("tokens_per_second", "peak_memory_gib", "seconds")) > 0


def test_the_manifest_holds_the_plan_and_the_one_start(finished: Finished) -> None:
    manifest = finished.manifest
    assert (manifest["plan"]["steps"], manifest["plan"]["rows_train"]) == (STEPS, manifest["tokens"]["train"]["rows"])
    (start,) = manifest["starts"]
    assert {name: start[name] for name in ("from_step", "step", "end")} == {
        "from_step": 0,
        "step": STEPS,
        "end": "complete",
    }
    (variant,) = start["rehearsal"].pop("variants")
    assert (variant["name"].split(";")[0], variant["peak_gib"], variant["verdict"]) == ("plain", None, "used")
    left_gib = start["rehearsal"].pop("left_gib")  # of paged optimizer state
    assert start["rehearsal"].keys() == {"peak_memory_gib", "capacity_gib", "hours", "tokens_per_second"}
    assert (left_gib, all(number > 0 for number in start["rehearsal"].values())) == (0, True)
    assert start["started"] < start["ended"]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", start[name]) for name in ("started", "ended"))


def test_the_manifests_tokens_are_those_of_the_encoded_rows(finished: Finished) -> None:
    chat, tokens = load_chat(None), finished.manifest["tokens"]
    rows = [json.loads(line)["messages"] for line in finished.command.train_file.read_text().splitlines()]
    encoded = chat.encode(rows)
    assert tokens["train"]["rows"] + tokens["validation"]["rows"] == 60
    total = sum(len(row.input_ids) for row in encoded)
    supervised = sum(label != -100 for row in encoded for label in row.labels)
    assert sum(split["total"] for split in tokens.values()) == total
    assert sum(split["supervised"] for split in tokens.values()) == supervised
    assert all(
        re.fullmatch("[0-9a-f]{64}", split[name]) for split in tokens.values() for name in ("input_ids", "labels")
    )
    certified = [split["certified"] for split in finished.manifest["rows"].values()]
    assert sum(certified) == 60


def test_config_yaml_loads_to_the_same_config(finished: Finished) -> None:
    loaded = load_config(str(finished.folder / "config.yaml"))[0]
    assert loaded == load_config("cpu", finished.command.settings())[0]
    tree = yaml.safe_load((finished.folder / "config.yaml").read_text(encoding="utf-8"))
    assert tree == loaded.as_dict()


def test_the_adapter_loads_with_plain_peft_into_a_base_that_is_not_quantized_and_changes_it(finished: Finished) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(finished.command.base)
    ids = torch.tensor([load_chat(None).encode_prompt([{"role": "user", "content": "What comes after 5?"}])])
    with torch.no_grad():
        before = base.eval()(input_ids=ids).logits
        model = PeftModel.from_pretrained(base, finished.folder).eval()
        after = model(input_ids=ids).logits
        with model.disable_adapter():
            off = model(input_ids=ids).logits
    assert (after - before).abs().max() > 1e-3
    assert torch.equal(off, before)


def test_every_tensor_of_the_adapter_is_fp32_and_belongs_to_lora(finished: Finished) -> None:
    import torch
    from safetensors.torch import load_file

    tensors = load_file(finished.folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2  # layers, targets, A and B
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(".lora_A." in name or ".lora_B." in name for name in tensors)
    assert all(tensor.abs().sum() > 0 for tensor in tensors.values())


def test_the_adapter_is_the_best_one_and_the_seals_hold(finished: Finished) -> None:
    checkpoints = finished.folder / "checkpoints"
    assert sha256(checkpoints / "best" / "adapter_model.safetensors") == finished.manifest["adapter_sha256"]
    seals = {folder.name: read_seal(folder) for folder in sorted(checkpoints.iterdir())}
    losses = {entry["step"]: entry["eval_loss"] for entry in finished.metrics if "eval_loss" in entry}
    assert {name: seal["eval_loss"] for name, seal in seals.items() if name != "best"} == {
        f"checkpoint-{step}": losses[step] for step in (2, 4, 6)
    }
    best = min(losses, key=lambda step: losses[step])
    assert (seals["best"]["step"], seals["best"]["eval_loss"]) == (best, losses[best])
    assert (finished.manifest["best_step"], finished.manifest["eval_loss"]) == (best, losses[best])


def test_the_tokenizer_reloads_with_transformers_and_its_template_gives_our_ids(finished: Finished) -> None:
    from transformers import AutoTokenizer

    tokenizer, chat = AutoTokenizer.from_pretrained(finished.folder), load_chat(None)
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "What comes  after 5?\n"},
        {"role": "assistant", "content": "Six, naïvely 🙂"},
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": "Seven."},
    ]
    encoded = chat.encode([messages])[0]
    wanted = encoded.input_ids
    found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert found["input_ids"] == wanted
    assert found["assistant_masks"] == [int(label != -100) for label in encoded.labels]
    prompt = tokenizer.apply_chat_template(messages[:4], add_generation_prompt=True, return_dict=True)
    assert prompt["input_ids"] == chat.encode_prompt(messages[:4])
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (1, 2, 0, 32000)


def test_the_model_card_is_that_of_the_manifest(finished: Finished) -> None:
    card = (finished.folder / "README.md").read_text(encoding="utf-8")
    assert card == model_card(load_config("cpu", finished.command.settings())[0], finished.manifest)
    assert str(finished.command.base) not in card


def test_the_folder_of_the_best_adapter_has_a_card_and_the_tokenizer(finished: Finished) -> None:
    """So a copy that was made before the end can be used by itself."""
    best = finished.folder / "checkpoints" / "best"
    card = (best / "README.md").read_text(encoding="utf-8")
    facts = {"status": "interrupted", "self_test": None}
    assert card == model_card(load_config("cpu", finished.command.settings())[0], finished.manifest | facts)
    for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        assert (best / name).read_bytes() == (finished.folder / name).read_bytes()


def test_the_model_cards_code_loads_the_adapter_and_answers(finished: Finished, tmp_path: Path) -> None:
    card = (finished.folder / "README.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
    for folder in (finished.folder, finished.command.base):
        (tmp_path / folder.name).symlink_to(folder)
    assert "max_new_tokens=200" in code
    code = code.replace("max_new_tokens=200", "max_new_tokens=20, min_new_tokens=20")  # so few steps teach it no words
    line = [sys.executable, "-W", "error::UserWarning", "-c", code]
    done = subprocess.run(line, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    config = load_config("cpu", finished.command.settings())[0]
    base = load_base(config.model, config.quantization, "cpu")
    model, chat = PeftModel.from_pretrained(base, finished.folder), load_chat(finished.command.base)
    prompt = torch.tensor([chat.encode_prompt([{"role": "user", "content": "Your question"}])])
    ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, min_new_tokens=20)
    reply = chat.tokenizer.decode(ids[0, prompt.shape[1] :].tolist(), skip_special_tokens=True)
    assert (done.stdout, len(reply) > 20) == (f"{reply}\n", True)


def test_training_lowers_eval_loss(finished: Finished) -> None:
    assert finished.manifest["eval_loss"] < finished.manifest["eval_loss_before"] - 0.05


def test_metrics_are_json_lines_that_begin_before_the_first_step(finished: Finished) -> None:
    metrics = finished.metrics
    assert metrics[0]["step"] == 0
    assert metrics[0]["eval_loss"] == finished.manifest["eval_loss_before"]
    assert [entry["step"] for entry in metrics if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in metrics if "eval_loss" in entry] == [0, 2, 4, 6]
    times = [entry["time"] for entry in metrics]
    assert times == sorted(times)
    assert all(entry["tokens_per_second"] > 0 for entry in metrics if "loss" in entry)
    memory = [entry["memory_gib"] for entry in metrics if "loss" in entry]
    assert memory[0] > 0 and memory == sorted(memory)  # on a CPU it is the most so far
    assert memory[-1] <= finished.manifest["peak_memory_gib"] + 0.01
    rates = [entry["learning_rate"] for entry in metrics if "learning_rate" in entry]
    assert rates[0] == 0 and max(rates) == rates[1] == 1e-3 and rates[-1] < 2e-4  # warm-up, then cosine


def test_json_prints_one_document_on_stdout_and_it_is_the_manifest(finished: Finished) -> None:
    assert json.loads(finished.done.stdout) == finished.manifest


def test_what_is_printed_is_plain_lines(finished: Finished) -> None:
    text = finished.done.stderr
    assert [character for character in text if not character.isprintable() and character != "\n"] == []
    steps = [line for line in text.splitlines() if line.startswith("step ")]
    number, seconds = r"\d+\.\d+", r"\d+ s"
    patterns = [
        rf"step \d/6: loss {number}, [\d,]+ tokens/s, {seconds} left, ends about [\w:+ -]+, peak {number} GiB",
        rf"step \d/6: eval_loss {number}",
    ]
    assert [line for line in steps if not any(re.fullmatch(pattern, line) for pattern in patterns)] == []
    assert [int(line[5]) for line in steps] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]


def test_nothing_but_our_own_lines_is_printed(finished: Finished) -> None:
    """Libraries' warnings and bars are silenced; what a person reads is what terminal.py wrote."""
    begins = ("config: ", "data: ", "plan", "  ", "checks: ", "rehearsal: ", "step ", "self-test: ", "done: ")
    begins += ("encoding ", "loading ")  # where they take more than a second, or than ten
    begins += ("rehearsing the largest batches", "testing the adapter as it was saved")
    lines = finished.done.stderr.splitlines()
    assert [line for line in lines if line and not line.startswith(begins)] == []
    manifest, folder = finished.manifest, finished.folder
    losses = f"{manifest['eval_loss_before']:.4f} -> {manifest['eval_loss']:.4f}"
    opener = "open" if sys.platform == "darwin" else "xdg-open"
    uploaded = '--include README.md --include "adapter_*" --include "*token*" --include chat_template.jinja'
    assert lines[-7:] == [
        "self-test: 7 of 7 checks passed on the adapter reloaded from disk",
        f"done: eval_loss {losses} (step {manifest['best_step']})",
        f"  adapter  {folder}/adapter_model.safetensors",
        f"  look     {opener} {folder}/report.html",
        f"  talk     {PYTHON} scripts/chat.py {folder}",
        f'  code     {folder}/README.md, under "Use"',
        f"  upload   {Path(PYTHON).with_name('hf')} upload YOU/NAME {folder} . {uploaded}",
    ]


def test_the_plan_was_what_happened(finished: Finished) -> None:
    done = finished.command("--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    plan, metrics, tokens = json.loads(done.stdout), finished.metrics, finished.manifest["tokens"]
    assert plan["steps"] == finished.manifest["steps"] == STEPS
    assert plan["evaluations"] == sum("eval_loss" in entry for entry in metrics)
    assert plan["checkpoints"] == len(list((finished.folder / "checkpoints").glob("checkpoint-*")))
    assert plan["tokens_train"] == tokens["train"]["total"]
    assert plan["rows_validation"] == tokens["validation"]["rows"]
    rates = [entry["learning_rate"] for entry in metrics if "learning_rate" in entry]
    assert plan["warmup_steps"] == rates.index(max(rates))
    share = metrics[-1]["epoch"]
    assert plan["steps_per_epoch"] == pytest.approx(STEPS / share, abs=1)


@pytest.mark.slow
def test_checks_that_are_left_out_are_named_in_the_manifest_and_not_made(finished: Finished, tmp_path: Path) -> None:
    command = Command(finished.command.base, finished.command.train_file, tmp_path / "output")
    done = command("--skip", "host,rehearsal")
    assert done.returncode == 0, done.stderr
    left_out = read_manifest(command.output / "run")["skipped_checks"]
    assert left_out == ["host.clock", "host.memory", "host.python", "host.system", "host.user", "rehearsal"]
    assert not [line for line in done.stdout.splitlines() if line.startswith("rehearsal")]
    assert finished.manifest["skipped_checks"] == []


@pytest.mark.slow
def test_a_run_that_chooses_its_checkpointed_layers_has_the_same_bits_and_records_the_number(
    finished: Finished, tmp_path: Path
) -> None:
    command = Command(finished.command.base, finished.command.train_file, tmp_path / "output")
    auto = (f"training.{key}=auto" for key in ("checkpointed_layers", "fused_lora", "fused_kernels"))
    settings = ("training.gradient_checkpointing=true", *auto)
    done = command("--skip", "rehearsal", *(word for setting in settings for word in ("--set", setting)))
    assert done.returncode == 0, done.stderr
    [said] = [line for line in done.stdout.splitlines() if line.startswith("checkpointed layers: ")]
    assert re.fullmatch(
        r"checkpointed layers: 0 of 2: [\d.]+ GiB expected by the formula alone, at most [\d.]+ of [\d.]+; "
        r"the rehearsal is skipped",
        said,
    )
    manifest = read_manifest(command.output / "run")
    used = {"fused_kernels": False, "fused_lora": False, "checkpointed_layers": 0}
    assert "fused paths: none; the rehearsal, which would try them, is skipped" in done.stdout.splitlines()
    found = {name: manifest[name] for name in (*used, "adapter_sha256", "train_loss")}
    wanted = {name: finished.manifest[name] for name in ("adapter_sha256", "train_loss")}
    assert found == {**used, **wanted}


def test_a_check_that_does_not_exist_cannot_be_left_out(finished: Finished, tmp_path: Path) -> None:
    command = Command(finished.command.base, finished.command.train_file, tmp_path / "output")
    done = command("--skip", "rehersal")
    text = "config: 1 problem\n  --skip rehersal: no such check; did you mean rehearsal?\n"
    assert (done.returncode, done.stderr) == (
        2,
        f"{text}{PYTHON} scripts/validate_environment.py --list lists them all\n",
    )
    assert not command.output.exists()


def test_a_dry_run_looks_at_data_and_tokens_only(finished: Finished) -> None:
    """A base without weights does not stop it; a training it would."""
    done = finished.command("--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "checks: 9 passed, 0 warnings, 0 failed, 0 skipped"


# --- the same command again


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    return {str(path): (sha256(path), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_the_same_command_again_says_it_is_finished_and_changes_no_file(finished: Finished) -> None:
    before = snapshot(finished.command.output)
    done = finished.command()
    assert (done.returncode, done.stderr) == (0, "")
    said = f"{finished.folder} is finished; --fresh starts a new run next to it"
    assert done.stdout.splitlines()[1:] == [said]
    assert snapshot(finished.command.output) == before


# --- interrupted with Ctrl-C in step 3 of two micro-batches, after the checkpoint of step 2


@dataclass(frozen=True)
class Interrupted:
    """A --fresh run beside a finished one, stopped by SIGINT; `code` and `lines` are how it ended."""

    command: Command
    code: int
    lines: list[str]

    @property
    def step(self) -> int:
        """The last finished step: 2, or a later one where this process was slow to send the signal."""
        step = max(int(name.rpartition("-")[2]) for name in self.checkpoints() if name != "best")
        assert step in (2, 3, 4)
        return step

    def checkpoints(self) -> list[str]:
        return names(self.command.output / "run-2" / "checkpoints")


@pytest.fixture(scope="session")
def interrupted(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    command = finished.command.elsewhere(tmp_path_factory.mktemp("interrupted") / "output")
    line = command.line("--fresh")
    with subprocess.Popen(
        line, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        lines = []
        for text in process.stdout:
            lines.append(text.rstrip("\n"))
            if text.startswith("step 2/6: eval_loss"):
                os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the whole group
    return Interrupted(command, process.returncode, lines)


@pytest.mark.slow
def test_fresh_makes_a_run_beside_the_finished_one_and_leaves_that_alone(
    finished: Finished, interrupted: Interrupted
) -> None:
    assert names(interrupted.command.output) == [".cache", "run", "run-2"]
    assert sha256(interrupted.command.output / "run" / "manifest.json") == sha256(finished.folder / "manifest.json")


def test_ctrl_c_exits_130_and_leaves_checkpoints_but_no_adapter(interrupted: Interrupted) -> None:
    folder = interrupted.command.output / "run-2"
    assert interrupted.code == 130
    assert interrupted.lines[-1] == (
        f"stopped by SIGINT at step {interrupted.step}; "
        f"the same command without --fresh resumes from checkpoint-{interrupted.step}"
    )
    assert "SIGINT: stopping after this micro-batch; press Ctrl-C again to quit now" in interrupted.lines
    assert not [line for line in interrupted.lines if "Traceback" in line]
    assert read_manifest(folder)["status"] == "interrupted"
    left = ["checkpoints", "config.yaml", "lock", "manifest.json", "metrics.jsonl", "receipt.json", "report.html"]
    assert names(folder) == left
    assert names(folder / "checkpoints") == sorted({"best", "checkpoint-2", f"checkpoint-{interrupted.step}"})


def test_a_plain_command_goes_on_from_where_ctrl_c_stopped_to_the_same_bits_as_an_uninterrupted_run(
    finished: Finished, interrupted: Interrupted, tmp_path: Path
) -> None:
    command = interrupted.command.elsewhere(tmp_path / "output")
    done = command()
    assert done.returncode == 0, done.stderr
    assert f"resume: from checkpoint-{interrupted.step}, the newest intact checkpoint" in done.stdout.splitlines()
    adapter = command.output / "run-2" / "adapter_model.safetensors"
    assert sha256(adapter) == sha256(finished.folder / "adapter_model.safetensors")
    logged = (command.output / "run-2" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in logged] == [entry["step"] for entry in finished.metrics]
    starts = [
        (start["from_step"], start["step"], start["end"]) for start in read_manifest(command.output / "run-2")["starts"]
    ]
    assert starts == [(0, interrupted.step, "stopped"), (interrupted.step, STEPS, "complete")]


@pytest.mark.slow
def test_a_run_that_begins_with_an_adapter_has_its_eval_loss_first_and_goes_on_from_there(
    finished: Finished, tmp_path: Path
) -> None:
    command = Command(finished.command.base, finished.command.train_file, tmp_path / "output")
    began = ("--set", f"lora.init_from={finished.folder}")
    refused = command(*began, "--set", "lora.r=8")
    assert refused.returncode == 2
    first = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    assert refused.stderr == (
        "config: 2 problems\n"
        f"  lora.init_from: {finished.folder}: its r is 16, the run's is 8\n"
        f"  lora.init_from: {finished.folder}: 28 tensors of another shape, the first {first}: (16, 128), expected "
        "(8, 128)\nname the folder of a finished run of this base with these settings, or null for a new adapter\n"
    )
    assert not command.output.exists()
    done = command(*began)
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(command.output / "run")
    before = finished.manifest
    assert manifest["eval_loss_before"] == pytest.approx(before["eval_loss"], abs=1e-6)
    assert manifest["eval_loss"] < before["eval_loss"]
    assert manifest["init_adapter"] == {"folder": str(finished.folder), "sha256": before["adapter_sha256"]}
    assert f"whose weights have the sha256 `{before['adapter_sha256']}`" in (
        command.output / "run" / "README.md"
    ).read_text(encoding="utf-8")
    receipt = json.loads((command.output / "run" / "receipt.json").read_text(encoding="utf-8"))
    assert receipt["must_agree"]["adapter to begin with"] == before["adapter_sha256"]
    assert manifest["self_test"]["status"] == "pass"


@pytest.mark.slow
def test_a_changed_learning_rate_is_refused_on_resume_with_the_difference(
    interrupted: Interrupted, tmp_path: Path
) -> None:
    command = interrupted.command.elsewhere(tmp_path / "output")
    done = command("--set", "training.learning_rate=3e-4", "--set", "training.logging_steps=2")
    assert done.returncode == 2
    assert done.stderr == (
        "config: 1 problem\n"
        f"  changed since checkpoint-{interrupted.step}: config.training.learning_rate: 0.001 -> 0.0003\n"
        "--fresh starts a new run, --resume-changed resumes anyway\n"
    )
    assert "checks: " not in done.stdout  # refused before they run
    assert names(command.output / "run-2" / "checkpoints") == interrupted.checkpoints()  # nothing was set aside


def test_resume_changed_goes_on_and_says_with_what(interrupted: Interrupted, tmp_path: Path) -> None:
    command = interrupted.command.elsewhere(tmp_path / "output")
    done = command("--set", "training.learning_rate=3e-4", "--resume-changed")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert "warning: resuming although changed: config.training.learning_rate: 0.001 -> 0.0003" in said
    assert f"resume: from checkpoint-{interrupted.step}, the newest intact checkpoint" in said
    steps = [line.split(":")[0] for line in said if line.startswith("step ")]
    assert steps == [f"step {step}/6" for step in (3, 4, 4, 5, 6, 6) if step > interrupted.step]
    manifest = read_manifest(command.output / "run-2")
    change = "config.training.learning_rate: 0.001 -> 0.0003"
    assert (manifest["status"], [start["changed"] for start in manifest["starts"]]) == ("complete", [[], [change]])
    at = f"rom step {interrupted.step} on"
    assert f"- f{at} with changes: `{change}`" in (command.output / "run-2" / "README.md").read_text().splitlines()
    assert f"F{at}, trained with changes: {change}." in unescape((command.output / "run-2" / "report.html").read_text())


# --- what cannot be had


def test_an_output_folder_that_cannot_be_made_is_exit_2(finished: Finished, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    for options in (["--dry-run"], []):
        done = finished.command("--set", f"output.dir={tmp_path}/file/runs", *options)
        assert done.returncode == 2
        assert re.fullmatch(
            rf"config: 1 problem\n  output\.dir: {tmp_path}/file/runs/\S+: Not a directory; "
            r"set it to a writable folder\n",
            done.stderr,
        )


@pytest.mark.slow
def test_a_base_without_weights_is_exit_3_and_leaves_no_run_folder(finished: Finished, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    shutil.copy(finished.command.base / "config.json", base)
    command = Command(base, finished.command.train_file, tmp_path / "output")
    done = command()
    assert done.returncode == 3
    assert done.stderr == (
        "checks: 1 failed\n"
        f"  model.files: {base}: model.safetensors is missing\n"
        "    copy the folder again, or --set model.name=mistralai/Mistral-7B-Instruct-v0.2\n"
        "fix it, or skip it with --skip model.files\n"
    )
    assert names(tmp_path / "output") == [".cache"]


# --- the Hub


def test_beside_a_silent_hub_a_base_in_its_cache_is_trained_on_and_nothing_is_asked(
    finished: Finished, hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for name, value in {"HF_HOME": str(hub_cache.parent), "HF_ENDPOINT": address, "no_proxy": "127.0.0.1"}.items():
            monkeypatch.setitem(ENVIRONMENT, name, value)
        for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "CI"):
            monkeypatch.delitem(ENVIRONMENT, name, raising=False)
        done = Command(Path(MISTRAL), finished.command.train_file, tmp_path / "output")()
        assert done.returncode == 0, done.stderr
        silent.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody has come
            silent.accept()


# --- trackers


@pytest.mark.slow
def test_wandb_without_a_key_asks_nothing_and_logs_offline_beside_tensorboard(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENVIRONMENT, "HOME", str(tmp_path))
    for key in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delitem(ENVIRONMENT, key, raising=False)
    command = Command(finished.command.base, finished.command.train_file, tmp_path / "output")
    done = command("--set", "tracking.report_to=wandb", "--set", "training.max_steps=2")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "output" / "run"
    later = f"{Path(PYTHON).with_name('wandb')} sync {folder}/wandb/offline-run-*"
    assert f"tracking: wandb is offline (no WANDB_API_KEY); to upload later: {later}" in done.stdout.splitlines()
    assert len(list(folder.glob("wandb/offline-run-*/run-*.wandb"))) == 1
    assert len(list(folder.glob("tensorboard/events.out.tfevents.*"))) == 1
    assert "wandb:" not in done.stdout + done.stderr
