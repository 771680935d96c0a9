"""A table of faults, each planted on a machine that is otherwise healthy, with what is to be found and typed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import bitsandbytes

from finetune.checks import host, paths, preflight
from finetune.checks.device import REPEATABLE
from finetune.checks.numerics import linear, loss, optimizer
from finetune.cli import PYTHON
from finetune.data import certificate, template, tokenizer
from finetune.data.jsonl import convert_command
from finetune.files import write_json
from finetune.machine.inspect import Machine
from finetune.model import hub
from finetune.runs import receipt
from finetune.runs.checkpoints import set_aside
from support.bench import Bench, Clock, conversations, watermarks
from support.recorded import A100_80, BUSY, GH200, INTEL_MAC, LINUX, M2_32, M4, M4_16, ROSETTA, RTX_4090, T4
from support.stand_ins import (
    across_documents,
    install_flash_attn,
    install_varlen_attn,
    keep_no_random_numbers,
    see_the_future,
    write_side_by_side,
)


class Found(NamedTuple):
    """What a check is to find."""

    id: str
    status: str
    detail: str
    fix: str


class Fault(NamedTuple):
    """What is wrong, on which platform, what plants it, what is to be found, and the command's exit code."""

    name: str
    platform: str
    plant: Callable[[Bench], object]
    findings: tuple[Found, ...]
    exit_code: int


def warn(id_: str, detail: str, fix: str) -> Found:
    return Found(id_, "warn", detail, fix)


def fail(id_: str, detail: str, fix: str) -> Found:
    return Found(id_, "fail", detail, fix)


def fault(
    name: str, platform: str, plant: Callable[[Bench], object], *findings: Found, exit_code: int | None = None
) -> Fault:
    """The exit code is 3 where something fails, unless it is the data."""
    if exit_code is None:
        exit_code = 3 if any(finding.status == "fail" for finding in findings) else 0
    return Fault(name, platform, plant, findings, exit_code)


# What plants a fault that takes more than a line --------------------------------------------------------------------


DIRECT = ("accelerate", "bitsandbytes", "datasets", "peft", "trl")


def nameless_user(bench: Bench) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    bench.patch.setattr(host.getpass, "getuser", nobody)
    bench.patch.setattr(host.os, "getuid", lambda: 1234)


def clock_of_1970(bench: Bench) -> None:
    bench.patch.setattr(Clock, "time", datetime(1970, 1, 1, 0, 4, tzinfo=UTC))


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


OTHER_TOKENIZER = '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"hello": 0}, "unk_token": "?"}}'


ROW = '{"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]}'


def shards(base: Path) -> Path:
    """Weights in two files, of 4 bytes each behind their headers; the second's path."""
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (base / "model.safetensors").unlink(missing_ok=True)
    (base / hub.INDEX).write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1]}}))
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    for name in names:
        (base / name).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    return base / names[1]


def cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-1])


def silent_hub(bench: Bench) -> None:
    """Takes the connection and says nothing."""
    server = bench.open.enter_context(socket.create_server(("127.0.0.1", 0)))
    address = f"http://127.0.0.1:{server.getsockname()[1]}"
    bench.places[address] = "http://silent"
    bench.patch.setenv("HF_ENDPOINT", address)
    bench.patch.setattr(hub, "PROBE_SECONDS", 0.1)


class OtherReference(tokenizer.Reference):
    """Ends every conversation with one more token."""

    def encode(self, messages: template.Messages) -> tuple[list[int], list[int]]:
        input_ids, labels = super().encode(messages)
        return [*input_ids, 2], [*labels, 2]


def ampere(bench: Bench, machine: Machine) -> None:
    bench.has(machine)
    bench.torch_says(capability=(8, 0))


def ada(bench: Bench, machine: Machine) -> None:
    bench.has(machine)
    bench.torch_says(capability=(8, 9))


def marks(bench: Bench, low: str | None, high: str | None) -> None:
    for name, value in watermarks(low, high).items():
        if value is None:
            bench.patch.delenv(name)
        else:
            bench.patch.setenv(name, value)


def small_disk_for_the_packed_base(bench: Bench) -> None:
    shards(bench.cached_base())
    disk(bench, 6.0)
    bench.patch.setattr(paths, "quantized_on", lambda _: "another")  # the bench's only device is the CPU


def nf4_gives_zeros(bench: Bench) -> None:
    real = bitsandbytes.functional.dequantize_4bit
    bench.patch.setattr(bitsandbytes.functional, "dequantize_4bit", lambda *packed: real(*packed) * 0)


def half_of_every_product(bench: Bench) -> None:
    real = bitsandbytes.nn.Linear4bit.forward
    bench.patch.setattr(bitsandbytes.nn.Linear4bit, "forward", lambda layer, x: real(layer, x) / 2)


def triton_cannot_load_what_it_made(bench: Bench) -> None:
    """As from a folder that is mounted noexec (pytorch#123054)."""

    def made(*_: object) -> float:
        raise ImportError("cuda_utils.so: failed to map segment from shared object")

    bench.patch.setattr(loss, "chunked_loss", made)


def flash_attention_of_another_torch(bench: Bench) -> None:
    """A module that fails on import, as a shared library does."""
    text = 'raise ImportError("flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEab\\nand more")'
    (bench.folder / "flash_attn.py").write_text(text)
    bench.patch.delitem(sys.modules, "flash_attn")
    bench.patch.syspath_prepend(bench.folder)


def torch_varlen_across_documents(bench: Bench) -> None:
    bench.set("model.attn_implementation=torch_varlen")
    install_varlen_attn(bench.patch, function=across_documents)


def disk(bench: Bench, free_gib: float) -> None:
    bench.free_gib = free_gib


def another_users_download(bench: Bench) -> None:
    """Of which only `blobs` cannot be written; a download of another base does not matter."""
    for name in ("models--mistralai--Mistral-7B-Instruct-v0.2", "models--other--base"):
        (paths.caches()["HF_HOME"] / "hub" / name / "blobs").mkdir(parents=True)
    bench.patch.setattr(
        paths.os, "access", lambda path, *_, **__: Path(path).name not in ("blobs", "models--other--base")
    )


def copy_of_another_run(bench: Bench) -> None:
    run = bench.folder / "copies" / "demo-cpu"
    run.mkdir(parents=True)
    write_json(run / "manifest.json", {"starts": [{"started": "yesterday"}]})
    bench.set(f"output.copy_to={bench.folder}/copies")


def copy_of_another_run_on_the_hub(bench: Bench) -> None:
    there = {("me/copies", "demo-cpu/manifest.json"): b'{"starts": [{"started": "yesterday"}]}'}
    bench.patch.setattr(paths.hub, "read_for_copies", lambda *asked: there[asked])
    bench.set("output.copy_to=hf://me/copies")


def small_disk_for_the_base(bench: Bench) -> None:
    """The Hub's cache on a disk of its own, with 5 GiB free."""

    class Elsewhere(type(Path())):  # type: ignore[misc]
        def stat(self, **_: Any) -> Any:
            return SimpleNamespace(st_dev=-1)

    bench.patch.setattr(paths, "nearest_folder", Elsewhere)
    bench.free_gib = 5.0


def long_conversations(bench: Bench) -> None:
    """Of 40 rows, 20 go on for a second turn that is too long."""
    more = [("user", "Tell me more."), ("assistant", "more " * 300)]
    rows = conversations()
    bench.write_rows(*(row + more * (number % 2) for number, row in enumerate(rows)))
    bench.set("model.max_seq_length=256")


def long_prompts(bench: Bench) -> None:
    bench.write_rows(*([("user", f"{number}" + " word" * 150), ("assistant", "Yes.")] for number in range(40)))


def long_answers(bench: Bench) -> None:
    last = [("user", "And?"), ("assistant", "Yes.")]
    bench.write_rows(*([("user", f"{number}"), ("assistant", "word " * 150), *last] for number in range(40)))


def shouted(rows: list[list[tuple[str, str]]]) -> list[list[tuple[str, str]]]:
    return [[(role, f" {text.upper()}") for role, text in row] for row in rows]


def answered_otherwise(rows: list[list[tuple[str, str]]]) -> list[list[tuple[str, str]]]:
    return [[*row[:-1], ("assistant", "I do not know.")] for row in rows]


def takes(hours: float, budget: float) -> Callable[[Bench], None]:
    def plant(bench: Bench) -> None:
        make_plan = preflight.make_plan
        bench.patch.setattr(preflight, "make_plan", lambda *known: replace(make_plan(*known), hours=hours))
        bench.set(f"training.time_budget_hours={budget}")

    return plant


def two_nights(bench: Bench) -> None:
    make_plan = preflight.make_plan
    sizes = {"tokens_train": 1_008_000, "rows_train": 10_000, "hours_expected": (16.8, 33.6)}
    bench.patch.setattr(preflight, "make_plan", lambda *known: replace(make_plan(*known), **sizes))


def damage(checkpoint: Path) -> Path:
    (checkpoint / "adapter_model.safetensors").write_bytes(b"weightz")
    return checkpoint


def receipt_of_another_training(bench: Bench) -> None:
    there = bench.preflight()
    made = receipt.make(there.config, there.prepared)
    made["must_agree"]["training.learning_rate"] = 0.0002
    made["by_design"]["model.max_seq_length"] = 4096
    bench.receipt = bench.folder / "receipt.json"
    write_json(bench.receipt, made)


# The table ------------------------------------------------------------------------------------------------------------

# What is typed, or said, for more than one of them.
BUILD = (
    f"{PYTHON} -m pip install --require-hashes -r requirements/flash-attn.lock && "
    f'{PYTHON} -m pip install --no-deps "$(PATH={Path(PYTHON).parent}:$PATH docker/flash_attn.sh docker/wheels)"  '
    "or without it: --set model.attn_implementation=torch_varlen"
)
REINSTALL = f"{PYTHON} -m pip install --force-reinstall --require-hashes -r requirements/h100.lock"
INSTALL = f"{PYTHON} -m pip install --require-hashes -r requirements/h100.lock"
NEW_VENV = "rm -r .venv; scripts/make_venv.sh"
COPY = "copy the folder again, or --set model.name=mistralai/Mistral-7B-Instruct-v0.2"
LOCAL = "or put its files in a folder: --set model.name=FOLDER"
ARCHES = (
    "flash-attn built for 9.0 does not run on this GPU: rebuild it with FLASH_ATTN_CUDA_ARCHS, or --set "
    "model.attn_implementation=torch_varlen"
)
MARKS = "export PYTORCH_MPS_LOW_WATERMARK_RATIO=1.0 PYTORCH_MPS_HIGH_WATERMARK_RATIO=1.2"
SPACE = "free some, --set training.save_total_limit=1, or --set output.dir=FOLDER on another disk"
SYNC = f"{Path(PYTHON).with_name('wandb')} sync adapters/RUN/wandb/offline-run-* sends it later"
FILES = "TensorBoard files and metrics.jsonl are written"
APART = "30 to train on, 10 held out (no validation file: 25% of the rows, chosen by content, are held out)"
NEW_HOME = "export USER=trainer HOME=/tmp/trainer; mkdir -p $HOME"
CLOCK = "1970-01-01 00:04 UTC, earlier than this program's release (2026-11): web certificates look invalid"
APPLE = "the m4 config needs Apple silicon"
LESS = "--set training.per_device_train_batch_size=8 --set training.gradient_accumulation_steps=8"

# PEAK stands for the expected memory, which has tests of its own; /bench and /base for folders of the test.
# fmt: off
FAULTS = (
    # The machine
    fault("a Mac trains with the H100's config", "h100", lambda b: b.has(M4),
          fail("host.system", "macOS 15.1 on arm64; the h100 config needs Linux",
               "--config m4 on a Mac, or rent a Linux machine")),
    fault("a Grace Hopper, whose processor is not x86_64 and whose driver does not tell its memory", "h100",
          lambda b: b.has(GH200),
          warn("host.system", "Linux 5.15.0-119-generic on aarch64; requirements/h100.lock was resolved for x86_64",
               "rent an x86_64 machine"),
          warn("gpu.memory", "PEAK GiB expected; this driver does not report free memory", "nvidia-smi")),
    fault("an Intel Mac", "m4", lambda b: b.has(INTEL_MAC),
          fail("host.system", f"macOS 15.1 on x86_64; {APPLE}", "--config cpu for the demo, --config h100 to train")),
    fault("Python under Rosetta", "m4", lambda b: b.has(ROSETTA),
          fail("host.system", "macOS 15.1 on x86_64: this Python is an Intel build, run by Rosetta, which has no GPU",
               "rm -r .venv; PYTHON=/opt/homebrew/bin/python3.11 scripts/make_venv.sh")),
    fault("macOS 13", "m4", lambda b: b.has(release="13.6.1"),
          fail("host.system", "macOS 13.6.1 on arm64; PyTorch's bfloat16 needs macOS 14",
               "softwareupdate --install --all --restart")),
    fault("macOS 14", "m4", lambda b: b.has(release="14.6.1"),
          warn("host.system", "macOS 14.6.1 on arm64; macOS 15 or later is expected",
               "softwareupdate --install --all --restart")),
    fault("Linux trains with the Mac's config", "m4", lambda b: b.has(LINUX),
          fail("host.system", f"Linux 6.8.0-45-generic on x86_64; {APPLE}",
               "--config cpu for the demo, --config h100 to train")),
    fault("Python 3.10", "cpu", lambda b: b.has(python="3.10.12"),
          fail("host.python", "Python 3.10.12, expected 3.11 to 3.13",
               "rm -r .venv; PYTHON=/path/to/python3.11 scripts/make_venv.sh")),
    fault("Python 3.14", "cpu", lambda b: b.has(python="3.14.0"),
          fail("host.python", "Python 3.14.0, expected 3.11 to 3.13",
               "rm -r .venv; PYTHON=/path/to/python3.11 scripts/make_venv.sh")),
    fault("a container with little memory", "h100", lambda b: b.has(memory_limit_gib=8.0, memory_free_gib=7.5),
          warn("host.memory",
               "8.0 GiB of memory (this container's limit), 7.5 free; loading the base is expected to need 16",
               "raise mem_limit in compose.yaml")),
    fault("a machine with little memory", "h100",
          lambda b: b.has(container=False, memory_gib=12.0, memory_free_gib=9.5),
          warn("host.memory", "12.0 GiB of memory, 9.5 free; loading the base is expected to need 16",
               "rent a machine with more memory")),
    fault("a user id without a name", "h100", nameless_user,
          fail("host.user", "user id 1234 has no user name, which torch's caches need", NEW_HOME)),
    fault("a HOME that is not there", "cpu", lambda b: b.patch.setenv("HOME", "/dev/null/trainer"),
          warn("host.user", "trainer, HOME /dev/null/trainer is not writable", NEW_HOME)),
    fault("the clock is at 1970 on Linux", "h100", clock_of_1970,
          fail("host.clock", CLOCK, "sudo timedatectl set-ntp true")),
    fault("the clock is at 1970 on a Mac", "m4", clock_of_1970,
          fail("host.clock", CLOCK, "sudo sntp -sS time.apple.com")),
    fault("Docker's small /dev/shm", "h100", lambda b: b.has(shm_gib=0.0625),
          warn("container.shm", "64 MiB of /dev/shm, expected 256",
               "docker run --shm-size=1g, or shm_size: 1gb in compose.yaml")),
    fault("no init in the container", "h100", lambda b: b.has(process_1=True),
          warn("container.init",
               "this program is process 1, which must reap child processes and has no default signal handlers",
               "docker run --init, or init: true in compose.yaml")),

    # Libraries
    fault("a library is missing", "h100", lambda b: b.installed.pop("trl"),
          fail("libraries.versions", "not installed: trl", INSTALL)),
    fault("a library is older than tested", "cpu", lambda b: b.installed.update(transformers="5.22.0"),
          fail("libraries.versions", "older than tested: transformers 5.22.0 (locked: 5.23.0)",
               "rm .venv/installed; scripts/make_venv.sh")),
    fault("a library is newer than tested", "h100", lambda b: b.installed.update(torch="2.11.0+cu130"),
          warn("libraries.versions", "not the locked versions: torch 2.11.0+cu130 (locked: 2.10.0)", INSTALL)),
    fault("another version of a library that decides nothing", "m4",
          lambda b: b.installed.update(tensorboard="2.20.0", wandb="0.32.0"),
          warn("libraries.versions",
               "not the locked versions: tensorboard 2.20.0 (locked: 2.21.0), wandb 0.32.0 (locked: 0.31.0)",
               "rm .venv/installed; scripts/make_venv.sh")),
    fault("many libraries are missing", "cpu", lambda b: [b.installed.pop(name) for name in (*DIRECT, "wandb")],
          fail("libraries.versions", "not installed: accelerate, bitsandbytes, datasets, peft, trl and 1 more",
               "rm .venv/installed; scripts/make_venv.sh")),
    fault("a library cannot be imported", "h100",
          lambda b: b.broken.update(bitsandbytes="libcudart.so.12: cannot open shared object file"),
          fail("libraries.imports",
               "cannot be imported: bitsandbytes: libcudart.so.12: cannot open shared object file",
               REINSTALL)),
    fault("two libraries cannot be imported", "cpu", lambda b: b.broken.update(torch="no _C", trl=""),
          fail("libraries.imports", "cannot be imported: torch: no _C; trl: ImportError", NEW_VENV)),

    # The base model
    fault("no revision is pinned", "h100", lambda b: b.set("model.revision=null"),
          warn("model.name", "mistralai/Mistral-7B-Instruct-v0.2 without a revision: it may change between runs",
               "set model.revision to the commit in configs/training_config_h100.yaml")),
    fault("a base of another architecture", "cpu",
          lambda b: change_json(b.own_base() / "config.json", architectures=["LlamaForCausalLM"]),
          fail("model.geometry",
               "model.name: /bench/base/config.json is a ['LlamaForCausalLM'], expected ['MistralForCausalLM']",
               "fix it, or set another value with --set")),
    fault("a config.json that is not JSON", "cpu", lambda b: (b.own_base() / "config.json").write_text("{"),
          fail("model.geometry",
               "model.name: /bench/base/config.json is not JSON: Expecting property name enclosed in double "
               "quotes: line 1 column 2 (char 1)",
               "fix it, or set another value with --set")),
    fault("fewer words in the model than in its tokenizer", "cpu",
          lambda b: change_json(b.own_base() / "config.json", vocab_size=1000),
          fail("model.geometry", "the tokenizer has 32,000 tokens, the model 1,000",
               "use the tokenizer and weights of one model")),
    fault("a small model on the H100", "h100", lambda b: b.own_base(),
          fail("model.geometry",
               "model.name: /bench/base/config.json is not Mistral-7B: hidden_size 64 (expected 4096), "
               "intermediate_size 128 (expected 14336), num_hidden_layers 2 (expected 32), num_attention_heads 4 "
               "(expected 32), num_key_value_heads 2 (expected 8)",
               "train other models on platform cpu")),
    fault("a tokenizer that is not Mistral's", "cpu",
          lambda b: (b.own_base() / "tokenizer.json").write_text(OTHER_TOKENIZER),
          fail("model.geometry",
               "model.name: /bench/base/tokenizer.json is not Mistral-7B-Instruct-v0.2's tokenizer: 1 tokens, "
               "expected 32000",
               "fix it, or set another value with --set")),
    fault("nothing where the adapter to begin with should be", "cpu", lambda b: b.set("lora.init_from=/bench/none"),
          fail("model.adapter",
               "lora.init_from: /bench/none is not a complete PEFT adapter: /bench/none/adapter_config.json: "
               "No such file or directory",
               "name the folder of a finished run of this base with these settings, or null for a new adapter")),
    fault("weights that are not there", "cpu", lambda b: (b.own_base() / "model.safetensors").unlink(),
          fail("model.files", "/bench/base: model.safetensors is missing", COPY)),
    fault("a shard is missing", "cpu", lambda b: shards(b.own_base()).unlink(),
          fail("model.files", "/bench/base: model-00002-of-00002.safetensors is missing", COPY)),
    fault("a shard is cut short", "cpu", lambda b: cut(shards(b.own_base())),
          fail("model.files", "/bench/base: model-00002-of-00002.safetensors has 72 bytes, its header says 73", COPY)),
    fault("weights that are not safetensors", "cpu",
          lambda b: (b.own_base() / "model.safetensors").write_bytes(b"<!DOCTYPE html><html>"),
          fail("model.files", "/bench/base: model.safetensors is not a safetensors file", COPY)),
    fault("weights that are pickles only", "cpu",
          lambda b: (b.own_base() / "model.safetensors").rename(b.folder / "base" / "pytorch_model.bin"),
          fail("model.files", "/bench/base: model.safetensors is missing, and pickles (*.bin) are never read", COPY)),
    fault("an index that cannot be read", "cpu",
          lambda b: (b.own_base() / "model.safetensors.index.json").write_text("{"),
          fail("model.files", "/bench/base: model.safetensors.index.json cannot be read", COPY)),
    fault("a cached shard that was cut short", "h100",
          lambda b: (b.cached_base() / "model.safetensors").write_bytes(bytes(8) + b"{}"),
          fail("model.files", "in the Hub's cache: model.safetensors is not a safetensors file",
               "hf download mistralai/Mistral-7B-Instruct-v0.2 --revision 63a8b081895390a26e140280378bc85ec8bce07a "
               "--include '*.safetensors' '*.json' --force-download")),
    fault("the Hub wants a token", "h100", lambda b: b.hub_answers(401),
          fail("model.access", "http://hub/401 requires a token (401 GatedRepo)", f"export HF_TOKEN=hf_...; {LOCAL}")),
    fault("the license was not accepted", "h100", lambda b: b.hub_answers(403),
          fail("model.access", "http://hub/403 rejects this token (403 GatedRepo)",
               f"accept the terms at http://hub/403/mistralai/Mistral-7B-Instruct-v0.2; {LOCAL}")),
    fault("the revision does not exist", "h100", lambda b: b.hub_answers(404),
          fail("model.access",
               "http://hub/404 has no mistralai/Mistral-7B-Instruct-v0.2 at "
               "63a8b081895390a26e140280378bc85ec8bce07a (404 RevisionNotFound)",
               "set model.revision to the commit in configs/training_config_h100.yaml")),
    fault("the Hub is out of order", "m4", lambda b: b.hub_answers(500),
          fail("model.access", "http://hub/500 answers 500 Internal Server Error", f"try again later; {LOCAL}")),
    fault("the Hub does not answer", "h100", silent_hub,
          fail("model.access", "http://silent does not answer: timed out",
               f"set HTTPS_PROXY or HF_ENDPOINT if you need one; {LOCAL}")),
    fault("the Hub is switched off, and nothing is cached", "h100", lambda b: b.patch.setenv("HF_HUB_OFFLINE", "1"),
          fail("model.access", "HF_HUB_OFFLINE is set, and the base is not in the Hub's cache",
               f"unset HF_HUB_OFFLINE; {LOCAL}")),
    fault("the fixed conversations have other tokens than Mistral's", "h100",
          lambda b: b.patch.setattr(tokenizer, "Reference", OtherReference),
          fail("tokens.certificate", "conversation 1 of 6 has different ids or labels in mistral-common",
               REINSTALL)),
    fault("the saved tokenizer has other tokens than Mistral's", "h100",
          lambda b: b.patch.setattr(tokenizer.Chat, "encode_as_saved", lambda *_: [template.Encoded([], [], [])]),
          fail("tokens.certificate", "conversation 1 of 6 has different ids or labels in the saved tokenizer",
               REINSTALL),
          fail("data.rows",
               "certificate: /bench/train.jsonl:1: token 0 is 1 733 16289, the saved tokenizer says the end",
               "Report this row: no run may start on it.")),

    # The NVIDIA GPU
    fault("no driver outside a container", "h100", lambda b: b.has(driver=None, gpus=(), container=False),
          fail("gpu.driver", "nvidia-smi is missing or does not answer: no working NVIDIA driver",
               "sudo apt install nvidia-driver-570-server, then restart; or --config cpu for the demo")),
    fault("no driver in a container", "h100", lambda b: b.has(driver=None, gpus=()),
          fail("gpu.driver", "nvidia-smi is missing or does not answer: no working NVIDIA driver",
               "docker compose run --rm validate, which requests the GPU; on a rented pod: choose one with a GPU")),
    fault("a driver of 2021", "h100", lambda b: b.has(driver="470.256.02"),
          fail("gpu.driver", "driver 470.256.02; CUDA 12 needs 525 or newer",
               "sudo apt install nvidia-driver-570-server, then restart (on the host, not in a container)")),
    fault("torch is built without CUDA", "h100",
          lambda b: b.torch_says(version="2.10.0+cpu", built_for=None, sees_nvidia=False, capability=None),
          fail("gpu.torch", "torch 2.10.0+cpu is built without CUDA", INSTALL)),
    fault("torch is built for CUDA 11.8", "h100", lambda b: b.torch_says(version="2.10.0+cu118", built_for="11.8"),
          fail("gpu.torch", "torch 2.10.0+cu118 is built for CUDA 11.8, expected 12.1 or newer", INSTALL)),
    fault("the driver is there, and torch sees no GPU", "h100",
          lambda b: b.torch_says(sees_nvidia=False, capability=None),
          fail("gpu.torch", "torch 2.10.0+cu128 for CUDA 12.8 sees no GPU; the driver is 550.90.07",
               "unset CUDA_VISIBLE_DEVICES; if that fails, update the driver or restart the machine")),
    fault("an A100 with 80 GB", "h100", lambda b: ampere(b, A100_80),
          warn("gpu.device",
               "NVIDIA A100-SXM4-80GB, compute capability 8.0; settings and time estimates are for an H100 (9.0)",
               ARCHES)),
    fault("a batch that 24 GB do not hold", "h100",
          lambda b: (ada(b, RTX_4090), b.set("training.per_device_train_batch_size=16")),
          warn("gpu.device", "NVIDIA GeForce RTX 4090, compute capability 8.9; PEAK GiB expected, "
               "24.0 GiB in total",
               f"{LESS}; {ARCHES}"),
          fail("gpu.memory", "PEAK GiB expected, 23.5 GiB free of 24.0", LESS)),
    fault("a T4, which has no bfloat16", "h100", lambda b: (b.has(T4), b.torch_says(capability=(7, 5))),
          fail("gpu.device", "Tesla T4, compute capability 7.5; it lacks bfloat16",
               "rent an H100, or another GPU of compute capability 8.0 or higher")),
    fault("a GPU that is full", "h100", lambda b: b.has(gpu_free_gib=9.0),
          fail("gpu.memory", "PEAK GiB expected, 9.0 GiB free of 79.6",
               "stop the programs that nvidia-smi lists on the host, or --set "
               "training.per_device_train_batch_size=2 --set training.gradient_accumulation_steps=8")),
    fault("a GPU that is quite full", "h100", lambda b: b.has(gpu_free_gib=2.0),
          fail("gpu.memory", "PEAK GiB expected, 2.0 GiB free of 79.6",
               "stop the programs that nvidia-smi lists on the host")),
    fault("another program on the GPU", "h100", lambda b: b.has(gpu_processes=BUSY[:1], gpu_free_gib=17.5),
          warn("gpu.processes", "1 other program on the GPU: 4711 python 61.5 GiB",
               "kill 4711, if yours; other programs slow the run and use its memory")),
    fault("other programs fill the GPU", "h100", lambda b: b.has(gpu_processes=BUSY, gpu_free_gib=2.0),
          fail("gpu.memory", "PEAK GiB expected, 2.0 GiB free of 79.6",
               "kill 4711 4712, if yours"),
          warn("gpu.processes", "2 other programs on the GPU: 4711 python 61.5 GiB, 4712 /usr/bin/ollama",
               "kill 4711 4712, if yours; other programs slow the run and use its memory")),
    fault("no compiler", "h100", lambda b: (b.folder / "bin" / "gcc").unlink(),
          fail("gpu.compiler", "no C compiler; Triton needs one for its kernels", "sudo apt install build-essential")),
    fault("no Python headers", "h100", lambda b: (b.folder / "Python.h").unlink(),
          fail("gpu.compiler", "no Python.h; Triton needs it for its kernels", "sudo apt install python3.11-dev")),

    # The Mac
    fault("torch is built without MPS", "m4",
          lambda b: b.torch_says(mps_built=False, sees_mps=False, working_set_gib=None),
          fail("mac.torch", "torch 2.14.1 is built without MPS", NEW_VENV)),
    fault("torch cannot use MPS", "m4", lambda b: b.torch_says(sees_mps=False, working_set_gib=None),
          fail("mac.torch", "torch 2.14.1 is built with MPS but cannot use it",
               "log in to the Mac's own desktop once, update macOS, then try again")),
    fault("a Mac with 16 GB", "m4", lambda b: (b.has(M4_16), b.torch_says(working_set_gib=11.5)),
          warn("mac.chip", "Apple M4, 16 GiB of unified memory; the m4 config is made for 32",
               "--set quantization.storage=packed"),
          fail("mac.memory",
               "PEAK GiB expected, 9.0 GiB free, 11.5 GiB in the GPU's working set, beyond which macOS swaps; "
               "the Mac has only 16",
               "--set quantization.storage=packed")),
    fault("a Mac with an older chip", "m4", lambda b: b.has(M2_32),
          warn("mac.chip", "Apple M2 Max, 32 GiB of unified memory; the m4 config is made for an Apple M4",
               "nothing to change; its estimates of hours do not apply")),
    fault("a run that would swap", "m4", lambda b: b.torch_says(working_set_gib=16.0),
          warn("mac.memory", "PEAK GiB expected, 20.5 GiB free, 16.0 GiB in the GPU's working set, "
               "beyond which macOS swaps",
               "--set quantization.storage=packed")),
    fault("a Mac on which much is open", "m4", lambda b: b.has(memory_free_gib=12.0),
          warn("mac.memory", "PEAK GiB expected, 12.0 GiB free, 21.3 GiB in the GPU's working set, "
               "beyond which macOS swaps",
               "close other programs, or --set quantization.storage=packed")),
    fault("a Mac that is full", "m4", lambda b: b.has(memory_free_gib=2.0),
          warn("mac.memory", "PEAK GiB expected, 2.0 GiB free, 21.3 GiB in the GPU's working set, "
               "beyond which macOS swaps",
               "close other programs")),
    fault("a run that is larger than the Mac", "m4", lambda b: b.set("model.max_seq_length=32768"),
          fail("mac.memory",
               "PEAK GiB expected, 20.5 GiB free, 21.3 GiB in the GPU's working set, beyond which macOS swaps; "
               "the Mac has only 32",
               "--set quantization.storage=packed --set model.max_seq_length=4096")),
    fault("no watermarks", "m4", lambda b: marks(b, None, None),
          warn("mac.watermarks",
               "not set: torch may use more memory than the Mac has, which then swaps instead of failing",
               MARKS)),
    fault("a watermark that takes every limit away", "m4", lambda b: marks(b, "0.0", "0.0"),
          fail("mac.watermarks",
               "PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 removes every limit: the Mac may freeze",
               MARKS)),
    fault("a low watermark above the high one", "m4", lambda b: marks(b, None, "1.2"),
          fail("mac.watermarks", "the low watermark 1.4 is above the high one 1.2: torch refuses to start", MARKS)),
    fault("a watermark that is no number", "m4", lambda b: marks(b, "low", "1.2"),
          fail("mac.watermarks",
               "PYTORCH_MPS_LOW_WATERMARK_RATIO=low PYTORCH_MPS_HIGH_WATERMARK_RATIO=1.2: not numbers",
               MARKS)),
    fault("memory pressure", "m4", lambda b: b.has(pressure=4, swap_used_gib=6.3),
          warn("mac.pressure", "memory pressure critical, 6.3 GiB in swap",
               "close the programs that Activity Monitor lists first under Memory, or restart the Mac")),
    fault("low power mode", "m4", lambda b: b.has(low_power="lowpowermode"),
          warn("mac.power", "low power mode is on: the GPU is slower", "sudo pmset -a lowpowermode 0")),
    fault("low power mode of a Pro or Max", "m4", lambda b: b.has(low_power="powermode"),
          warn("mac.power", "low power mode is on: the GPU is slower", "sudo pmset -a powermode 0")),

    # What the device computes
    fault("NF4 unpacks to zeros", "m4", nf4_gives_zeros,
          fail("device.qlora", "NF4 loses 100.0% of normal weights, expected 6% to 13%", NEW_VENV)),
    fault("the QLoRA step is wrong", "h100", half_of_every_product,
          fail("device.qlora",
               "a QLoRA step in bfloat16, packed, is 1.9e-01 from fp32, expected at most 0.03",
               REINSTALL)),
    fault("the QLoRA step is wrong on a CPU", "cpu", half_of_every_product,
          fail("device.qlora",
               "a QLoRA step in float32, packed, is 1.9e-01 from fp32, expected at most 0.0001",
               NEW_VENV)),
    fault("bfloat16 is wrong", "m4", lambda b: b.patch.setattr(linear, "bfloat16_product", lambda *_: 0.5),
          fail("device.bfloat16", "a bfloat16 product is 5.0e-01 from fp32, expected at most 0.03", NEW_VENV)),
    fault("the paged optimizer is wrong", "h100",
          lambda b: b.patch.setattr(optimizer, "optimizer_step", lambda *_: float("inf")),
          fail("device.optimizer",
               "three steps of paged_adamw_32bit are inf from PyTorch's AdamW, expected at most 0.0001",
               REINSTALL)),
    fault("layers computed again draw other dropout masks", "m4", lambda b: keep_no_random_numbers(b.patch),
          fail("device.recompute",
               "the gradient through recomputed layers is 2.3e-01 from that without recomputing, expected at "
               "most 0.0001",
               f"{NEW_VENV}  or train without dropout: --set lora.lora_dropout=0")),
    fault("a cache that programs may not be run from", "h100", triton_cannot_load_what_it_made,
          fail("device.triton",
               "Triton's kernels cannot be compiled: cuda_utils.so: failed to map segment from shared object",
               f"sudo apt install build-essential python{sysconfig.get_python_version()}-dev (compiler and headers), "
               "sudo ldconfig (libcuda.so.1), or export TRITON_CACHE_DIR=FOLDER (a disk that is not full, read-only or "
               "noexec)")),
    fault("Triton's kernels compute something else", "h100",
          lambda b: b.patch.setattr(loss, "chunked_loss", lambda *_: 0.5),
          fail("device.triton", "TRL's loss in float32 is 5.0e-01 from plain cross entropy, expected at most 0.0001",
               REINSTALL)),
    fault("products into a strided tile are written side by side", "m4", lambda b: write_side_by_side(b.patch),
          fail("device.loss",
               "TRL's loss in bfloat16 is 2.0e-01 from plain cross entropy, expected at most 0.03",
               NEW_VENV)),
    fault("causal attention sees the future", "m4", lambda b: see_the_future(b.patch),
          fail("device.attention",
               "torch's attention in bfloat16 is 1.1e+00 from fp32, expected at most 0.03",
               NEW_VENV)),
    fault("flash-attn is not installed", "h100", lambda b: install_flash_attn(b.patch, None),
          fail("device.flash_attention", "flash-attn is not installed", BUILD)),
    fault("flash-attn is built for another torch", "h100", flash_attention_of_another_torch,
          fail("device.flash_attention",
               "flash-attn is installed but does not work: flash_attn_2_cuda.so: undefined symbol: "
               "_ZN3c104cuda9SetDeviceEab",
               BUILD)),
    fault("torch_varlen attends across documents", "h100", torch_varlen_across_documents,
          fail("device.flash_attention",
               "torch's varlen_attn over two packed documents is 9.8e-01 from attention over each alone, expected at "
               "most 0.03",
               f"{REINSTALL}  or without it: --set model.attn_implementation=sdpa")),
    fault("flash-attn attends across documents", "h100", lambda b: install_flash_attn(b.patch, across_documents),
          fail("device.flash_attention",
               "flash-attn over two packed documents is 9.8e-01 from attention over each alone, expected at most 0.03",
               BUILD)),
    fault("flash-attn adds up in any order", "h100",
          lambda b: b.patch.setenv("FLASH_ATTENTION_DETERMINISTIC", "0"),
          warn("device.deterministic",
               "flash_attention_2 over packed documents: different bits each time in "
               "attention's gradient of the input, attention's gradient of q_proj.lora_A, "
               "attention's gradient of q_proj.lora_B and 3 more",
               REPEATABLE)),

    # Folders and disk
    fault("output.dir cannot be made", "cpu", lambda b: b.set(f"output.dir={b.train_file}/adapters"),
          fail("paths.output", "/bench/train.jsonl/adapters cannot be written: Not a directory",
               "sudo chown -R $(id -u) /bench/train.jsonl/adapters, or --set output.dir=FOLDER")),
    fault("a cache cannot be made", "h100", lambda b: b.patch.setenv("HF_HOME", f"{b.train_file}/hf"),
          fail("paths.caches", "/bench/train.jsonl/hf cannot be written: Not a directory", "export HF_HOME=FOLDER")),
    fault("two caches cannot be made", "h100",
          lambda b: [b.patch.setenv(name, f"{b.train_file}/it") for name in ("HF_HOME", "TRITON_CACHE_DIR")],
          fail("paths.caches",
               "/bench/train.jsonl/it cannot be written: Not a directory; /bench/train.jsonl/it cannot be written: "
               "Not a directory",
               "export HF_HOME=FOLDER TRITON_CACHE_DIR=FOLDER")),
    fault("a download of the base was begun by another user", "h100", another_users_download,
          fail("paths.caches",
               "/bench/hf/hub/models--mistralai--Mistral-7B-Instruct-v0.2/blobs cannot be written: it belongs to "
               f"uid {os.getuid()}",
               "export HF_HOME=FOLDER")),
    fault("the disk for copies is not mounted", "cpu", lambda b: b.set(f"output.copy_to={b.folder}/absent"),
          fail("paths.copy", "/bench/absent does not exist", "mount the disk, or mkdir -p /bench/absent")),
    fault("copies would be on the same disk", "cpu", lambda b: b.set(f"output.copy_to={b.folder}"),
          warn("paths.copy", "/bench is on the same disk as output.dir, so the copy is lost with it",
               "--set output.copy_to=FOLDER on another disk, or hf://OWNER/NAME")),
    fault("another run was copied there", "cpu", copy_of_another_run,
          fail("paths.copy", "/bench/copies/demo-cpu contains another run",
               "cp -r /bench/copies/demo-cpu /bench/adapters, which resumes that one, "
               "or --set tracking.run_name=NAME")),
    fault("another run was copied to that repository", "cpu", copy_of_another_run_on_the_hub,
          fail("paths.copy", "hf://me/copies/demo-cpu contains another run",
               "hf download me/copies --include 'demo-cpu/*' --local-dir /bench/adapters, which resumes that one, "
               "or --set tracking.run_name=NAME")),
    fault("the disk is too small for base and checkpoints", "h100", lambda b: disk(b, 10.0),
          fail("paths.disk",
               "10.0 GiB free in /bench/adapters, 16.16 needed (2.66 for checkpoints, adapter and data, 13.5 for "
               "the base)",
               SPACE)),
    fault("the disk is too small for checkpoints", "h100", lambda b: (shards(b.cached_base()), disk(b, 2.0)),
          fail("paths.disk", "2.0 GiB free in /bench/adapters, 2.66 needed (2.66 for checkpoints, adapter and data)",
               SPACE)),
    fault("the disk of a Mac is too small for the packed base", "m4", small_disk_for_the_packed_base,
          fail("paths.disk", "6.0 GiB free in /bench/adapters, 6.50 needed (2.66 for checkpoints, adapter and data, "
               "3.84 for the packed base)", SPACE)),
    fault("the base's own disk is too small", "h100", small_disk_for_the_base,
          fail("paths.disk", "5.0 GiB free in /bench/hf, 13.5 needed for the base",
               "free some, or export HF_HOME=FOLDER on another disk")),

    # The data
    fault("a bad row", "cpu", lambda b: b.write_rows(*conversations(), more='{"messages": []}'),
          fail("data.rows",
               "data: 1 bad row\n  /bench/train.jsonl:41: \"messages\" is an empty list, expected a list of messages",
               "Fix them, or leave them out with --set dataset.on_bad_row=drop"), exit_code=4),
    fault("bad rows that are left out", "cpu",
          lambda b: (b.write_rows(*conversations(), more="{\n[]"), b.set("dataset.on_bad_row=drop")),
          warn("data.rows",
               f"{APART}; 2 bad rows dropped:\n  /bench/train.jsonl:41: not JSON: Expecting property name enclosed in "
               "double quotes at column 2\n  /bench/train.jsonl:42: found an empty list, expected an object "
               "{\"messages\": [...]}", "--set dataset.on_bad_row=fail lists them")),
    fault("more bad rows than are left out", "cpu",
          lambda b: (b.write_rows(*conversations(), more="{\n" * 6), b.set("dataset.on_bad_row=drop")),
          fail("data.rows",
               "data: 6 bad rows of 46 (13%), above dataset.max_bad_share (10%)\n" + "\n".join(
                   f"  /bench/train.jsonl:{line}: not JSON: Expecting property name enclosed in double quotes at "
                   "column 2" for line in range(41, 46)) + "\n  ... and 1 more",
               "Fix them, or leave them out with --set dataset.max_bad_share=0.14"), exit_code=4),
    fault("another format", "cpu",
          lambda b: b.train_file.write_text('{"instruction": "Why?", "input": "", "output": "Because."}\n'),
          fail("data.rows", "data: /bench/train.jsonl: this looks like Alpaca (instruction/input/output)",
               f"Convert it: {convert_command(Path('/bench/train.jsonl'))}"),
          exit_code=4),
    fault("keys that are not read, and a system prompt outside of the messages", "cpu",
          lambda b: b.write_rows(*conversations(), more='{"id": 7, "system": "Be short.", ' + ROW[1:]),
          warn("data.keys", "system became the system message of 1 row; ignored keys: 'id' in 1 row",
               "nothing, if intended; training reads only messages")),
    fault("a system prompt outside of the messages", "cpu",
          lambda b: b.write_rows(*conversations(), more='{"system": "Be short.", ' + ROW[1:]),
          warn("data.keys", "system became the system message of 1 row", "nothing, if intended")),
    fault("no data", "h100", lambda b: b.train_file.unlink(),
          fail("data.rows", "/bench/train.jsonl: No such file or directory",
               "put your JSONL there, or try with --set dataset.train_file=data/sample/train.jsonl"), exit_code=2),
    fault("nothing can be held out", "cpu",
          lambda b: b.write_rows(*([("user", "Go on."), ("assistant", f"Part {part}.")] for part in range(8))),
          fail("data.rows", "data: /bench/train.jsonl leaves no row for validation (8 to train on)",
               "all have the same system and first user message and stay together: name a dataset.validation_file"),
          exit_code=4),
    fault("a row is in both train and validation", "cpu", lambda b: b.write_validation(*conversations()[3:5]),
          fail("data.rows",
               "data: 2 rows are in both train and validation, the first: /bench/train.jsonl:4 is "
               "/bench/val.jsonl:1",
               "remove them from one"), exit_code=4),
    fault("a row has other tokens than Mistral's", "m4",
          lambda b: b.patch.setattr(certificate, "Reference", OtherReference),
          fail("data.rows", "certificate: /bench/train.jsonl:1: token 22 is the end, mistral-common says 2+",
               "Report this row: no run may start on it.")),
    fault("many rows are too long", "cpu", lambda b: b.set("model.max_seq_length=32"),
          warn("data.lengths",
               "349 tokens; half the rows have at most 27, 95 % 32, all 32; 0 cut and 22 dropped at 32",
               "--set model.max_seq_length=64 keeps more of them, if memory allows")),
    fault("many rows are cut", "cpu", long_conversations,
          warn("data.lengths",
               "1,046 tokens; half the rows have at most 48, 95 % 360, all 361; 14 cut and 0 dropped at 256",
               "--set model.max_seq_length=512 keeps 95 % whole, if memory allows")),
    fault("little of it carries loss", "cpu", long_prompts,
          warn("data.labels", "90 tokens carry loss (1.8%): what the assistant says, and its end",
               "shorten the prompts, or put several questions about one document into one conversation")),
    fault("little of it carries loss, since only last messages do", "cpu",
          lambda b: (long_answers(b), b.set("dataset.train_on=last")),
          warn("data.labels", "90 tokens carry loss (1.7%): the assistant's last message of each row, and its end",
               "--set dataset.train_on=all also trains on the earlier answers")),
    fault("a row of weight 0", "cpu",
          lambda b: b.write_rows(*conversations(), more=ROW.replace('"assistant"', '"assistant", "weight": 0')),
          warn("data.labels",
               "574 tokens carry loss (54.9%): what the assistant says, and its end; 1 row dropped because no turn "
               "carries loss",
               "nothing, if intended; otherwise remove weight 0 from the answers to train on")),
    fault("copies", "cpu", lambda b: b.write_rows(*conversations(), conversations()[0]),
          warn("data.duplicates", "copies of other rows: 1 in train, the first on line 41",
               "unless they are intended: --set dataset.on_duplicate=drop")),
    fault("a row is in two training files", "cpu",
          lambda b: (shutil.copy(b.train_file, b.folder / "more.jsonl"),
                     b.set(f"dataset.train_file=[{b.train_file}, {b.folder}/more.jsonl]")),
          warn("data.duplicates", "copies of other rows: 30 in train, 10 in validation, the first /bench/more.jsonl:1",
               "unless they are intended: --set dataset.on_duplicate=drop")),
    fault("validation rows differ from training rows in case only", "cpu",
          lambda b: b.write_validation(*shouted(conversations()[3:5])),
          warn("data.leakage",
               "2 validation rows differ from training rows only in spaces and case; line 4 of /bench/train.jsonl "
               "matches line 1 of /bench/val.jsonl",
               "remove them from one of the two: they make eval_loss look better than it is")),
    fault("validation rows begin like training rows", "cpu",
          lambda b: b.write_validation(*answered_otherwise(conversations()[3:5])),
          warn("data.leakage",
               "2 validation rows have the system and first user message of a training row, for example line 4 of "
               "/bench/train.jsonl and line 1 of /bench/val.jsonl",
               "remove them from one of the two: they make eval_loss look better than it is")),
    fault("control tokens as text", "cpu",
          lambda b: b.write_rows(*conversations(), [("user", "Write </s>"), ("assistant", "Done.")]),
          warn("data.control_tokens",
               "the template's control tokens appear as text in 1 row, the first /bench/train.jsonl:41",
               f"{PYTHON} scripts/inspect_data.py /bench/train.jsonl --rows 41-41 shows how they are encoded")),

    # The run
    fault("fewer steps than eval_steps", "cpu", lambda b: b.set("training.eval_steps=100", "training.save_steps=100"),
          warn("plan.steps",
               "10 steps of 2, 1 of warmup, evaluations 2, checkpoints 1; 10 steps, but training.eval_steps is "
               "100: evaluated only before and after",
               "--set training.eval_steps=2 --set training.save_steps=2 evaluates every 2")),
    fault("a run larger than this machine's free memory", "cpu", lambda b: b.has(memory_free_gib=2.5),
          fail("plan.memory", "PEAK GiB expected, 2.5 GiB free",
               "close other programs, or --set training.per_device_eval_batch_size=2")),
    fault("a run that nothing makes small enough", "cpu", lambda b: b.has(memory_free_gib=0.5),
          fail("plan.memory", "PEAK GiB expected, 0.5 GiB free", "close other programs")),
    fault("a run longer than its budget", "h100", takes(30.0, budget=2),
          warn("plan.hours", "30.0 h expected, training.time_budget_hours is 2",
               "--set training.num_train_epochs=0.2, or --set training.time_budget_hours=33")),
    fault("a run of minutes that is longer than its budget", "cpu", takes(0.04, budget=0.02),
          warn("plan.hours", "2 min expected, training.time_budget_hours is 0.02",
               "--set training.num_train_epochs=1, or --set training.time_budget_hours=0.05")),
    fault("more tokens than a Mac trains on in a night", "m4", two_nights,
          warn("plan.hours", "3,024,000 tokens over all epochs take 16.8-33.6 h on m4 (25-50 tokens/s and 75-150 in "
               "evaluations, by arithmetic for 10 GPU cores, not measured); 12 h are 1.1-2.2 million",
               "--set dataset.max_rows=3571 fits into that, or train on the H100 (--config h100)")),
    fault("wandb without a key", "h100", lambda b: b.patch.delenv("WANDB_API_KEY"),
          warn("tracking.wandb", f"wandb will be offline: no WANDB_API_KEY; {FILES}",
               f"export WANDB_API_KEY=..., or {SYNC}")),
    fault("wandb without a network", "h100", lambda b: b.patch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9"),
          warn("tracking.wandb",
               f"wandb will be offline: 127.0.0.1 does not answer: [Errno 111] Connection refused; {FILES}",
               SYNC)),
    fault("wandb switched off", "m4", lambda b: b.patch.setenv("WANDB_MODE", "offline"),
          warn("tracking.wandb", f"wandb will be offline: WANDB_MODE=offline; {FILES}", SYNC)),
    fault("another process writes the run", "cpu", lambda b: b.locked_run(),
          fail("state.run",
               "/bench/adapters/demo-cpu is being written by pid 4711 on gpu-1, started 2027-03-01 10:00 CET; "
               "wait for it, or stop it with: kill 4711",
               "--fresh starts another run next to it")),
    fault("the newest checkpoint is damaged", "cpu", lambda b: (b.checkpoint(4), damage(b.checkpoint(8))),
          warn("state.run",
               "would resume from checkpoint-4; checkpoint-8 is damaged (adapter_model.safetensors is not what "
               "was saved (sha256 differs)) and would be set aside",
               f"{PYTHON} src/train.py --fresh starts a new run")),
    fault("no checkpoint is whole", "cpu", lambda b: damage(b.checkpoint(8)),
          fail("state.run",
               "every checkpoint in /bench/adapters/demo-cpu/checkpoints is damaged: checkpoint-8 is damaged "
               "(adapter_model.safetensors is not what was saved (sha256 differs)) and would be set aside",
               f"{PYTHON} src/train.py --fresh")),
    fault("every checkpoint was set aside by the start before", "cpu",
          lambda b: set_aside(damage(b.checkpoint(8))),
          fail("state.run",
               "every checkpoint in /bench/adapters/demo-cpu/checkpoints is damaged: set aside before: "
               "damaged-checkpoint-8.1 (adapter_model.safetensors is not what was saved (sha256 differs))",
               f"{PYTHON} src/train.py --fresh")),
    fault("a checkpoint was set aside by a start before", "cpu",
          lambda b: (set_aside(damage(b.checkpoint(4))), b.checkpoint(8)),
          warn("state.run",
               "would resume from checkpoint-8; set aside before: damaged-checkpoint-4.1 "
               "(adapter_model.safetensors is not what was saved (sha256 differs))",
               f"{PYTHON} src/train.py --fresh starts a new run")),
    fault("the best adapter is lost", "cpu",
          lambda b: (b.checkpoint(4), shutil.rmtree(b.checkpoint(8).with_name("best"))),
          warn("state.run",
               "would resume from checkpoint-4; checkpoint-8 would be set aside: the best adapter, of step 8, is lost "
               "and would be trained again",
               f"{PYTHON} src/train.py --fresh starts a new run")),
    fault("a checkpoint holds a pickle that would run code", "cpu",
          lambda b: (b.checkpoint(4), b.checkpoint(8, Path("a class, not a tensor"))),
          warn("state.run",
               "would resume from checkpoint-4; checkpoint-8 is damaged (optimizer.pt holds more than tensors and "
               "plain values) and would be set aside",
               f"{PYTHON} src/train.py --fresh starts a new run")),
    fault("the config changed since the checkpoint", "cpu", lambda b: (b.checkpoint(8), b.set("lora.r=8")),
          fail("state.run", "would resume from checkpoint-8, but changed since: config.lora.r: 16 -> 8",
               f"{PYTHON} src/train.py --fresh, or --resume-changed")),
    fault("a receipt of another training", "cpu", receipt_of_another_training,
          fail("receipt",
               "not the same training: training.learning_rate: 0.0002 -> 0.001; by design: model.max_seq_length: "
               "4096 -> 512",
               "use the same data and config as that run")),
)
# fmt: on
