"""Measure rows per second and peak memory of data preparation (read, check, tokenize, label, pack), ours and TRL's.

    .venv/bin/python benchmarks/prepare_data.py --rows 100000 --repeats 3 --output benchmarks/results/NAME.json

Every variant prepares the same file in its own process. Time is from the file on disk to packed training sequences,
without imports. Memory is the peak proportional set size of the process and its children together.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import machine
import psutil

from finetune.files import ROOT

if TYPE_CHECKING:
    from finetune.data.certificate import Certificate

MAX_SEQ_LENGTH = 4096
VARIANTS = (
    *("ours", "ours, every row compared", "ours, no row compared", "ours, a quarter of the rows"),
    *("TRL", "TRL, 2 processes"),
)
CERTIFICATES: dict[str, Certificate] = {"ours, every row compared": "every_row", "ours, no row compared": False}
PACKAGES = ("trl", "transformers", "datasets", "tokenizers", "mistral-common", "pyarrow")


def write_rows(path: Path, count: int) -> None:
    """Write `count` conversations of words from data/sample, about 190 Mistral tokens each; the same on every call."""
    chance = random.Random(1)
    sample = (ROOT / "data" / "sample" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    words = [word for line in sample for message in json.loads(line)["messages"] for word in message["content"].split()]
    with path.open("w", encoding="utf-8") as stream:
        for _ in range(count):
            length = max(8, int(chance.lognormvariate(4.45, 0.5)))
            texts = " ".join(chance.choices(words, k=max(4, length // 3))), " ".join(chance.choices(words, k=length))
            messages = [
                {"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)
            ]
            stream.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def prepare_ours(path: Path, cache: Path, certificate: Certificate) -> dict[str, float]:
    from finetune.config.load import load_config
    from finetune.data import prepare
    from finetune.data.cache import Cache
    from finetune.data.encode import Recipe

    config, _ = load_config("h100", [f"dataset.train_file={path}", "dataset.validation_file=null"])
    started = time.perf_counter()
    recipe = Recipe(None, None, MAX_SEQ_LENGTH, truncation=True, certificate=certificate)
    prepared = prepare.prepare(config.dataset, recipe, packing=True, cache=Cache(cache))
    seconds = time.perf_counter() - started
    counts = prepared.statistics.values()
    return {"seconds": seconds, "rows": sum(c.rows for c in counts), "tokens": sum(c.tokens for c in counts)}


def prepare_trl(path: Path, cache: Path, processes: int | None) -> dict[str, float]:
    import datasets
    from transformers import MistralConfig, MistralForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = machine.tokenizer()
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    model = MistralForCausalLM(MistralConfig(num_attention_heads=2, num_key_value_heads=1, **sizes))
    arguments = SFTConfig(
        output_dir=str(cache), packing=True, max_length=MAX_SEQ_LENGTH, assistant_only_loss=True, report_to=[],
        dataset_num_proc=processes, use_cpu=True, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    started = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(cache))
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    seconds = time.perf_counter() - started
    tokens = sum(sum(lengths) for lengths in trainer.train_dataset["seq_lengths"])
    return {"seconds": seconds, "rows": len(rows), "tokens": tokens}


def run_variant(name: str, path: Path) -> None:
    """Prepare the data, in the child process, and print one line of JSON."""
    with tempfile.TemporaryDirectory(prefix="prepare-") as folder:
        cache = Path(folder)
        if name.startswith("ours"):
            result = prepare_ours(path, cache, CERTIFICATES.get(name, True))
        else:
            result = prepare_trl(path, cache, 2 if "2 processes" in name else None)
    print(json.dumps(result))


def tree_bytes(process: psutil.Process) -> int:
    """Return the proportional (else unique) set size of a process and its children."""
    total = 0
    for member in (process, *process.children(recursive=True)):
        try:
            memory = member.memory_full_info()
        except psutil.Error:
            continue
        total += getattr(memory, "pss", memory.uss)
    return total


def measure(name: str, path: Path) -> dict[str, float]:
    """Run one variant in its own process; return its result and its peak memory in MiB."""
    command = [sys.executable, __file__, "--variant", name, "--file", str(path)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peak, watching = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        process = psutil.Process(child.pid)
        while not watching.wait(0.1):
            try:
                peak = max(peak, tree_bytes(process))
            except psutil.Error:
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = child.communicate()
    watching.set()
    watcher.join()
    if child.returncode:
        raise SystemExit(f"{name} ended with {child.returncode}; run it alone: {' '.join(command)}")
    return {**json.loads(output.splitlines()[-1]), "peak_mib": peak / 2**20}


def summarize(rounds: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Return the medians of each variant."""
    summary = {}
    for name, results in rounds.items():
        seconds = statistics.median(result["seconds"] for result in results)
        rows, tokens = results[0]["rows"], results[0]["tokens"]
        peak = statistics.median(result["peak_mib"] for result in results)
        summary[name] = {
            "rows": rows,
            "rows_per_second": round(rows / seconds),
            "tokens_per_second": round(tokens / seconds),
            "peak_mib": round(peak),
        }
    return summary


def main() -> None:
    parser = machine.parser(__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        run_variant(options.variant, options.file)
        return

    with tempfile.TemporaryDirectory(prefix="rows-") as folder:
        whole, quarter = Path(folder) / "rows.jsonl", Path(folder) / "quarter.jsonl"
        write_rows(whole, options.rows)
        write_rows(quarter, options.rows // 4)
        rounds = machine.in_rounds(
            options.repeats, VARIANTS, lambda name: measure(name, quarter if "quarter" in name else whole)
        )
    summary = summarize(rounds)
    show(summary)
    command = f"benchmarks/prepare_data.py --rows {options.rows} --repeats {options.repeats}"
    machine.record(options.output, command, PACKAGES, medians=summary, rounds=rounds)


def show(summary: dict[str, dict[str, float]]) -> None:
    """Print the table, and ours against TRL's."""
    print(f"{'':<30}{'rows/s':>10}{'tokens/s':>12}{'peak MiB':>10}")
    for name, row in summary.items():
        print(f"{name:<30}{row['rows_per_second']:>10,}{row['tokens_per_second']:>12,}{row['peak_mib']:>10,}")
    ours = summary["ours"]
    for name in ("TRL", "TRL, 2 processes"):
        faster = ours["rows_per_second"] / summary[name]["rows_per_second"]
        print(f"ours / {name}: {faster:.2f} x rows/s, {ours['peak_mib'] / summary[name]['peak_mib']:.2f} x memory")


if __name__ == "__main__":
    main()
