"""Compare predicted with measured training memory, part by part: random Mistral models, the project's own trainer.

    .venv/bin/python benchmarks/memory.py --output benchmarks/results/NAME.json

Each case takes two optimizer steps and evaluates, in its own process. On a CPU the profiler records every allocation
and release of torch's allocator, which gives the sum at every moment; weights, adapter and optimizer state are the
sizes of their tensors.

    docker compose run --rm --volume "$PWD/benchmarks:/app/benchmarks" --entrypoint "as-owner python" train-h100 \\
        benchmarks/memory.py --platform h100 --output benchmarks/results/NAME.json

does the same on an NVIDIA GPU, in the image, with random weights of Mistral-7B's shape and the settings of
configs/training_config_h100.yaml, compared with torch.cuda.max_memory_allocated; nothing is downloaded or written, the
model is created on the device. Not run yet. The last line says whether every prediction is within 10 %; if not, the
exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine

from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.files import GIB
from finetune.machine.device import peak_memory_gib
from finetune.machine.platforms import PLATFORMS
from finetune.plan.memory import checkpointed_layers, memory_parts, moments
from finetune.plan.model_shape import MISTRAL_7B, Geometry

BOUND = 0.10  # of a measured peak
PEAKS = ("peak", "loss", "backward", "evaluation")


@dataclass(frozen=True)
class Case:
    """A model and its training settings; `more` are further ones, as for `--set`."""

    name: str
    geometry: Geometry
    length: int
    rows: int
    checkpointing: bool
    storage: str
    packing: bool
    more: tuple[str, ...] = ()

    def settings(self) -> list[str]:
        """The settings of the case, as for `--set`."""
        return [
            f"model.max_seq_length={self.length}",
            f"training.per_device_train_batch_size={self.rows}",
            f"training.per_device_eval_batch_size={self.rows}",
            "training.gradient_accumulation_steps=2",
            "training.max_steps=2",
            "training.eval_steps=2",
            "training.save_steps=1000",
            f"training.gradient_checkpointing={str(self.checkpointing).lower()}",
            f"quantization.storage={self.storage}",
            f"training.packing={str(self.packing).lower()}",
            *self.more,
        ]


SMALL = Geometry(256, 704, 4, 4, 2, 8000, False)
DEEP = Geometry(256, 704, 12, 4, 4, 1000, False)
WIDE = Geometry(1536, 4096, 2, 12, 4, 1000, False)
DEMO = Geometry(576, 1536, 30, 9, 3, 49152, True)
FUSED = ("training.fused_lora=true", "training.fused_kernels=true")


def layers(count: int) -> str:
    """Return the setting that checkpoints the first `count` decoder layers."""
    return f"training.checkpointed_layers={count}"


CASES = {
    "cpu": (
        Case("small", SMALL, 512, 2, False, "packed", True),
        Case("small, checkpointed", SMALL, 512, 2, True, "packed", True),
        Case("deep, not packed", DEEP, 256, 4, False, "expanded", False),
        Case("deep, checkpointed", DEEP, 512, 2, True, "packed", False),
        Case("wide", WIDE, 512, 1, False, "packed", True),
        Case("wide, checkpointed", WIDE, 512, 2, True, "expanded", True),
        Case("wide, long", WIDE, 1024, 1, True, "packed", True),
        Case("wide, no dropout", WIDE, 512, 2, False, "packed", True, ("lora.lora_dropout=0",)),
        Case("wide, fused LoRA", WIDE, 512, 2, False, "packed", True, ("training.fused_lora=true",)),
        Case("fused LoRA, checkpointed", WIDE, 512, 2, True, "packed", True, ("training.fused_lora=true",)),
        Case("fused kernels", WIDE, 512, 2, False, "packed", True, ("training.fused_kernels=true",)),
        Case("wide, evaluation", WIDE, 256, 1, True, "packed", True, ("training.per_device_eval_batch_size=4",)),
        Case("demo", DEMO, 512, 1, False, "packed", True),
        Case("small, 2 of 4", SMALL, 512, 2, True, "packed", True, (layers(2),)),
        Case("deep, 8 of 12", DEEP, 512, 2, True, "packed", False, (layers(8),)),
        Case("deep, 11 of 12", DEEP, 512, 2, True, "expanded", True, (layers(11),)),
        Case("wide, 1 of 2", WIDE, 512, 2, True, "packed", True, (layers(1), "lora.lora_dropout=0")),
        Case("wide, 0 of 2", WIDE, 512, 1, True, "packed", True, (layers(0),)),
    ),
    "h100": (
        Case("4 x 4096, as shipped", MISTRAL_7B, 4096, 4, True, "packed", True),
        Case("4 x 4096, 24 of 32", MISTRAL_7B, 4096, 4, True, "packed", True, (layers(24),)),
        Case("4 x 4096, fused, 8 layers", MISTRAL_7B, 4096, 4, True, "packed", True, (layers(8), *FUSED)),
        Case("4 x 4096, expanded", MISTRAL_7B, 4096, 4, True, "expanded", True),
        Case("4 x 4096, fused LoRA", MISTRAL_7B, 4096, 4, True, "packed", True, FUSED[:1]),
        Case("4 x 4096, fused kernels", MISTRAL_7B, 4096, 4, True, "packed", True, FUSED[1:]),
        Case("8 x 4096", MISTRAL_7B, 4096, 8, True, "packed", True),
        Case("8 x 4096, fused LoRA", MISTRAL_7B, 4096, 8, True, "packed", True, FUSED[:1]),
        Case("8 x 4096, fused kernels", MISTRAL_7B, 4096, 8, True, "packed", True, FUSED[1:]),
        Case("4 x 2048, 24 of 32", MISTRAL_7B, 2048, 4, True, "packed", True, (layers(24),)),
        Case("8 x 2048, 24, expanded", MISTRAL_7B, 2048, 8, True, "expanded", True, (layers(24),)),
        Case("1 x 2048, 0 of 32", MISTRAL_7B, 2048, 1, False, "packed", True),
        Case("2 x 2048, sdpa", MISTRAL_7B, 2048, 2, True, "packed", True, ("model.attn_implementation=sdpa",)),
    ),
}


def config_of(case: Case, platform: str, folder: Path) -> Config:
    """Return the config of a case whose model is in `folder`."""
    return load_config(platform, [f"model.name={folder}", f"output.dir={folder}", *case.settings()])[0]


def make_model(geometry: Geometry, dtype: str, folder: Path) -> None:
    """Write a random model of this shape to `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, MistralConfig

    sizes = {**vars(geometry), "max_position_embeddings": 32768, "sliding_window": None}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MistralConfig(**sizes), dtype=getattr(torch, dtype))
    model.save_pretrained(folder)


def examples(count: int, length: int, vocab: int, packed: bool) -> Any:
    """Return `count` rows of `length` tokens, half of them supervised; a packed row has two documents.

    Unpacked rows differ by one token in length, so that batches are padded, as real ones are.
    """
    from datasets import Dataset

    rows = []
    for index in range(count):
        tokens = length - (0 if packed else index % 2)
        ids = [(7 * index + 11 * place) % (vocab - 3) + 3 for place in range(tokens)]
        labels = [-100 if place % 2 else token for place, token in enumerate(ids)]
        documents = {"seq_lengths": [tokens // 2, tokens - tokens // 2]} if packed else {}
        rows.append({"input_ids": ids, "labels": labels, "lines": [index], **documents})
    return Dataset.from_list(rows)


def make_trainer(case: Case, config: Config, folder: Path) -> Any:
    """Return the project's trainer on the case's model, as src/train.py does."""
    from finetune.machine.device import prepare_device
    from finetune.model import load
    from finetune.runs.folder import Run
    from finetune.training import trainer
    from finetune.training.arguments import training_arguments

    platform = PLATFORMS[config.platform]
    prepare_device(platform)
    if config.platform == "h100":
        from finetune.prove.random_base import make_base

        base = make_base(config, case.geometry, platform)
    else:
        base = load.load_base(config.model, config.quantization, platform.device)
    peft_model = load.adapt(base, config)
    run = Run(folder / "run", False, None)
    arguments = training_arguments(config.training, run, platform, evaluate_first=True)
    vocab, training = case.geometry.vocab_size, config.training
    train_rows = examples(2 * config.effective_batch_size, case.length, vocab, case.packing)
    eval_rows = examples(training.per_device_eval_batch_size, case.length, vocab, False)
    checkpointed = checkpointed_layers(config, case.geometry)
    rows = trainer.Examples(train_rows, eval_rows)
    return trainer.make_trainer(peft_model, machine.tokenizer(), rows, arguments, checkpointed)


def tensor_bytes(tensors: Iterable[Any]) -> int:
    """Return the bytes of the storages of `tensors`, each counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def weight_tensors(model: Any) -> Iterator[Any]:
    """Yield the base model's tensors: parameters, buffers and NF4's scales."""
    yield from model.buffers()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            continue
        yield parameter.data
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            yield from (value for value in vars(part).values() if hasattr(value, "untyped_storage")) if part else ()


def optimizer_tensors(optimizer: Any) -> Iterator[Any]:
    """Yield the tensors of the optimizer's state."""
    for state in optimizer.state.values():
        yield from (value for value in state.values() if hasattr(value, "untyped_storage"))


@contextmanager
def marks(model: Any) -> Iterator[None]:
    """Mark in the profile where the decoder begins, where the loss begins, and where its gradient is known."""
    from torch.profiler import record_function

    def mark(name: str) -> None:
        with record_function(f"mark {name}"):
            pass

    def begin(module: Any, _arguments: Any) -> None:
        mark("forward" if module.training else "evaluation")

    def end(module: Any, _arguments: Any, output: Any) -> None:
        if module.training:
            mark("loss")
            output.last_hidden_state.register_hook(lambda _gradient: mark("backward"))

    decoder = model.get_base_model().model
    hooks = [decoder.register_forward_pre_hook(begin), decoder.register_forward_hook(end)]
    yield
    for hook in hooks:
        hook.remove()


def timeline(profile: Any) -> list[tuple[str, int]]:
    """Return ("memory", bytes allocated or released) and ("mark NAME", 0), ordered by time."""
    events = [
        (event.start_ns(), "memory" if event.name() == "[memory]" else event.name(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]" or event.name().startswith("mark ")
    ]
    return [(name, size) for _, name, size in sorted(events, key=lambda event: event[0])]


def peaks(events: list[tuple[str, int]]) -> tuple[dict[str, int], dict[str, int]]:
    """Return by mark, for the time until the next mark: the largest running sum, and the sum at its beginning."""
    total, mark = 0, "start"
    most: dict[str, int] = {}
    first: dict[str, int] = {}
    for name, size in events:
        if name == "memory":
            total += size
        else:
            mark = name.removeprefix("mark ")
            first[mark] = max(first.get(mark, 0), total)
        most[mark] = max(most.get(mark, 0), total)
    return most, first


def measure_cpu(trainer: Any) -> dict[str, float]:
    """Train, and return in GiB: the parts with known tensors, what is kept at the loss, and the three peaks."""
    import torch

    frozen = tensor_bytes(weight_tensors(trainer.model))
    adapter = tensor_bytes(parameter.data for parameter in trainer.model.parameters() if parameter.requires_grad)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with marks(trainer.model), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        trainer.train()
    most, first = peaks(timeline(profile))
    optimizer = tensor_bytes(optimizer_tensors(trainer.optimizer))
    sizes = {
        "weights": frozen,
        "lora": 2 * adapter,  # and their gradients
        "optimizer": optimizer,
        "activations": first["loss"] - optimizer - adapter,
        "logits": most["loss"] - first["loss"],
        **{name: most[name] + frozen + adapter for name in ("loss", "backward", "evaluation")},
    }
    return {name: size / GIB for name, size in sizes.items()}


def measure_gpu(trainer: Any) -> dict[str, float]:
    """Train, and return the peak of allocated and paged memory in GiB."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    return {"peak": peak_memory_gib(PLATFORMS["h100"])}


def predict(config: Config, geometry: Geometry) -> dict[str, float]:
    """Return the predictions of plan/memory.py in GiB, by the names of the measured figures, so without `program`."""
    if config.platform == "h100":
        return {"peak": sum(memory_parts(config, geometry).values())}
    found = moments(config, geometry)
    loss = found["loss"]
    named = {name: loss[name] for name in ("weights", "lora", "optimizer", "logits")}
    named["activations"] = loss["activations"] + loss.get("attention_mask", 0)
    return named | {name: sum(parts.values()) - parts["program"] for name, parts in found.items()}


def resident_gib() -> float:
    """Return this process's resident memory."""
    import psutil

    return float(psutil.Process().memory_info().rss / GIB)


def run_case(case: Case, platform: str, folder: Path) -> dict[str, Any]:
    """Train the model in `folder`, in the child process; return predicted and measured memory."""
    from finetune.cli import quiet_libraries

    quiet_libraries()
    config = config_of(case, platform, folder)
    trainer = make_trainer(case, config, folder)
    program = resident_gib() - tensor_bytes(weight_tensors(trainer.model)) / GIB
    measured = (measure_gpu if platform == "h100" else measure_cpu)(trainer)
    predicted = predict(config, case.geometry)
    return {
        "settings": case.settings(),
        "geometry": vars(case.geometry),
        "program_gib": round(program, 3),
        "gib": {name: {"predicted": predicted[name], "measured": measured[name]} for name in measured},
    }


def in_a_process(case: Case, platform: str) -> dict[str, Any]:
    """Create the model in one process and train it in another, whose memory then has no trace of the first."""
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        command = [sys.executable, __file__, "--platform", platform, "--case", case.name, "--folder", folder]
        for extra in [[]] if platform == "h100" else [["--make"], []]:
            done = subprocess.run([*command, *extra], capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{case.name} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def show(name: str, result: dict[str, Any]) -> None:
    """Print a line per figure to stderr: case, part, predicted, measured, error."""
    for part, gib in result["gib"].items():
        error = gib["predicted"] / gib["measured"] - 1
        print(
            f"{name:<26}{part:<14}{gib['predicted']:>10.4f}{gib['measured']:>10.4f} GiB{error:>+8.1%}", file=sys.stderr
        )


def verdict(results: dict[str, dict[str, Any]]) -> tuple[bool, str]:
    """Return whether every predicted peak is within BOUND of the measured one, and a line that says so."""
    errors = {
        (name, part): abs(gib["predicted"] / gib["measured"] - 1)
        for name, result in results.items()
        for part, gib in result["gib"].items()
        if part in PEAKS
    }
    name, part = max(errors, key=lambda key: errors[key])
    worst = f"the worst is {part} of {name!r}, {errors[name, part]:.1%} off"
    within = errors[name, part] <= BOUND
    return within, f"{'all' if within else 'NOT all'} {len(errors)} peaks are within {BOUND:.0%}: {worst}"


def main() -> int:
    parser = machine.parser(__doc__)
    parser.add_argument("--platform", choices=CASES, default="cpu")
    parser.add_argument("--case", help="only the case with this name")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    cases = [case for case in CASES[options.platform] if options.case in (None, case.name)]
    if options.make:
        dtype = config_of(cases[0], options.platform, options.folder).model.dtype
        make_model(cases[0].geometry, dtype, options.folder)
        return 0
    if options.folder:
        print(json.dumps(run_case(cases[0], options.platform, options.folder)))
        return 0
    results = {}
    for case in cases:
        results[case.name] = in_a_process(case, options.platform)
        show(case.name, results[case.name])
    command = f"benchmarks/memory.py --platform {options.platform}"
    document = machine.record(options.output, command, machine.PACKAGES, memory=results)
    if options.json:
        print(json.dumps(document))
    within, line = verdict(results)
    print(line, file=sys.stderr)
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
