"""The parts of a proof that the whole program works on a machine; each returns its figures."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import checks
from finetune.checks.issue_block import THE_USERS_OWN, nameless
from finetune.checks.preflight import Preflight
from finetune.checks.runner import run
from finetune.checks.show import tally
from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.errors import CheckFailed, UserError
from finetune.files import ROOT, SEAL, read_json, sha256, write_json
from finetune.machine.inspect import read_machine
from finetune.machine.platforms import Platform
from finetune.model import hub
from finetune.plan.automatic import settled, used
from finetune.plan.memory import checkpointed_layers, peak_gib
from finetune.plan.model_shape import DEMO_135M, Geometry, read_geometry
from finetune.plan.throughput import conditions
from finetune.prove.flops import utilization
from finetune.prove.process import Ended, run_alone

if TYPE_CHECKING:
    from finetune.training.job import Job

SAMPLE, DEMO = ROOT / "data" / "sample" / "train.jsonl", ROOT / "models" / "demo-135m"
TINY = Geometry(64, 192, 2, 4, 2, 32000, False)
STEPS, KILL_AFTER, SPEED_STEPS = 20, 10, 3
ROW_TOKENS = 500  # estimate per joined sample row, so that a sequence still holds several
USED = "used.json"  # the rehearsal's choice
ATTENTION = "model.attn_implementation=auto"  # the checks report what the config asks for and is missing
VERSIONS = "libraries.versions"  # the result lists them, and the other parts show whether they work
NO_NETWORK = ("model.files", "model.access")  # random weights need nothing from the Hub


class LeftOut(Exception):
    """A part that cannot run here; the message says why."""


@dataclass(frozen=True)
class Work:
    """What to run, on which platform, and until when (in time.monotonic()).

    `config` and `settings` are for the base that is trained for hours there, and `base` names it; `small` are the
    settings that replace it by a small one. `random`: use random weights, created on the device for a 7B.
    """

    platform: Platform
    config: str
    settings: tuple[str, ...]
    small: tuple[str, ...]
    base: str
    random: bool
    folder: Path
    until: float

    @property
    def seconds_left(self) -> float:
        """The seconds left."""
        return max(0.0, self.until - time.monotonic())

    def config_of(self, *more: str) -> Config:
        """Return the config of the large base with these settings."""
        return load_config(self.config, [*self.settings, ATTENTION, *more])[0]

    def alone(self, function: Callable[[Any], Any], argument: Any) -> Any:
        """Run `function(argument)` in its own process within the time left, and return the result."""
        return run_alone(function, argument, not self.platform.accelerated, self.seconds_left)


def make_work(platform: Platform, random: bool, tiny: bool, folder: Path, until: float) -> Work:
    """Prepare the work; the small base is the demo's, or a random one of its shape if that is missing or unwanted."""
    config, small, name = str(ROOT / platform.demo) if platform.demo else platform.name, DEMO, "the demo's base"
    random = random or tiny
    if random or hub.missing_weights(DEMO):
        small, name = folder / "base", "random weights of " + ("a tiny model" if tiny else "the demo's shape")
        run_alone(partial(_save_base, small), TINY if tiny else DEMO_135M, not platform.accelerated)
    if platform.nvidia:
        name = "Mistral-7B" + random * "'s shape, random weights"
    common = [f"output.dir={folder}", "tracking.report_to=none", "dataset.sample_prompts=[]"]
    common += ["dataset.validation_file=null", "dataset.validation_split=0.1", "training.num_train_epochs=1"]
    if tiny:
        common += ["model.max_seq_length=160", "training.gradient_accumulation_steps=1"]
        common += [
            f"training.{key}" for key in ("gradient_checkpointing=true", "checkpointed_layers=auto", "fused_lora=auto")
        ]
    to_small = (f"model.name={small}", "model.revision=null")
    mine = () if platform.nvidia else to_small
    length = load_config(config, [*common, *mine])[0].model.max_seq_length
    common.append(f"dataset.train_file={write_rows(folder / 'rows.jsonl', length)}")
    return Work(platform, config, (*common, *mine), to_small, name, random, folder, until)


def _save_base(folder: Path, geometry: Geometry) -> None:
    from finetune.prove.random_base import save_base

    save_base(folder, geometry)


def write_rows(path: Path, length: int) -> Path:
    """Write the sample's conversations, and joins of two or more as long as a sequence of `length` tokens has room."""
    rows = [json.loads(line)["messages"] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    turns = [[message for message in row if message["role"] != "system"] for row in rows]
    with path.open("w", encoding="utf-8") as stream:
        for count in range(1, max(1, length // ROW_TOKENS) + 1):
            for first in range(len(turns) - count + 1):
                joined = [message for turn in turns[first : first + count] for message in turn]
                stream.write(json.dumps({"messages": joined}) + "\n")
    return path


def make(name: str, work: Work) -> dict[str, Any]:
    """Run a part; return its status (done, skipped, failed), its seconds, and its figures or why it has none."""
    begun, result = time.monotonic(), {"status": "done"}
    try:
        if not work.seconds_left:
            raise TimeoutError
        result |= PARTS[name](work)
        if result.get("failed"):
            result["status"] = "failed"
    except TimeoutError:
        result = {"status": "skipped", "why": f"{name}: no time was left; allow more with --minutes N"}
    except LeftOut as reason:
        result = {"status": "skipped", "why": f"{name}: {reason}"}
    except (UserError, Ended) as error:
        result = {"status": "failed", "why": nameless(str(error))}
    return {**result, "seconds": round(time.monotonic() - begun, 1)}


# The parts ------------------------------------------------------------------------------------------------------------


def look(work: Work) -> dict[str, Any]:
    """Run every check except the rehearsal."""
    return dict(work.alone(_checks, work))


def _checks(work: Work) -> dict[str, Any]:
    config = load_config(work.config, work.settings)[0]
    skipped = [*checks.TRAINING_DOES, VERSIONS, *(NO_NETWORK if work.random else ())]
    results = list(run(checks.select(config.platform, skip=skipped), Preflight(config, read_machine())))
    lines = [f"{one.status} {one.id}: {nameless(one.detail)}" for one in results if one.id not in THE_USERS_OWN]
    failed = [result.id for result in results if result.status == "fail"]
    return {"found": tally(results), "failed": failed, "checks": lines}


def train(work: Work) -> dict[str, Any]:
    """Run STEPS steps of src/train.py on the small base, from loading to the adapter's self-test."""
    _train(work, "whole")
    manifest = read_json(work.folder / "whole" / "manifest.json")
    names = ("steps", "train_loss", "eval_loss", "tokens_per_second", "peak_memory_gib")
    return {**{name: manifest[name] for name in names}, "adapter": _adapter(work, "whole")}


def kill(work: Work) -> dict[str, Any]:
    """Repeat it, killed after a checkpoint and restarted. Raises CheckFailed if the adapter differs."""
    if not (work.folder / "whole" / "adapter_model.safetensors").is_file():
        raise LeftOut("it needs the adapter of the part train, which wrote none")
    process = subprocess.Popen(command(work, "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    try:
        while process.poll() is None and not _sealed(work.folder / "killed").is_file():
            if not work.seconds_left:
                raise TimeoutError
            time.sleep(0.05)
    finally:
        process.kill()
        code = process.wait()
    if code != -signal.SIGKILL:
        raise CheckFailed(f"the run ended with exit code {code} before it was killed")
    last = max(int(path.name.split("-")[1]) for path in _sealed(work.folder / "killed").parents[1].glob("checkpoint-*"))
    _train(work, "killed")
    whole, killed = _adapter(work, "whole"), _adapter(work, "killed")
    if whole != killed:
        found = f"killed after step {last} and resumed, the adapter is {killed[:12]}, uninterrupted {whole[:12]}"
        raise CheckFailed(found, "docs/architecture.md says which bits are the same where")
    return {"killed_after_step": last, "same_bits": True, "adapter": killed}


def _sealed(run: Path) -> Path:
    return run / "checkpoints" / f"checkpoint-{KILL_AFTER}" / SEAL


def _adapter(work: Work, name: str) -> str:
    return sha256(work.folder / name / "adapter_model.safetensors")


def command(work: Work, name: str) -> list[str]:
    """Return the command of run `name` on the small base."""
    settings = [*work.settings, ATTENTION, *work.small, f"training.max_steps={STEPS}", f"tracking.run_name={name}"]
    settings += ["training.logging_steps=1", f"training.eval_steps={KILL_AFTER}", f"training.save_steps={KILL_AFTER}"]
    sets = [word for setting in settings for word in ("--set", setting)]
    groups = {check.id.split(".")[0] for check in checks.CHECKS} - {"data"}  # the part `checks` has run them
    command = [sys.executable, str(ROOT / "src" / "train.py"), "--config", work.config, *sets]
    return [*command, "--skip", ",".join(sorted(groups))]


def _train(work: Work, name: str) -> None:
    try:
        line, left = command(work, name), work.seconds_left
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=left, cwd=ROOT)
    except subprocess.TimeoutExpired:
        raise TimeoutError from None
    if done.returncode:
        raise CheckFailed(f"src/train.py ended with exit code {done.returncode}: {done.stderr.strip()[-2000:]}")


def rehearse(work: Work) -> dict[str, Any]:
    """Rehearse the large base; return what was tried for `auto` and what was chosen."""
    _need_base(work)
    found = work.alone(_rehearse, work)
    write_json(work.folder / USED, found["used"])
    return {"base": work.base, **found}


def _rehearse(work: Work) -> dict[str, Any]:
    from finetune.machine.device import capacity_gib
    from finetune.training import rehearsal

    job = _job(work, work.config_of())
    found = rehearsal.rehearse(job, work.folder / "rehearsal", capacity_gib(work.platform))
    return {**found.as_dict(), "used": used(found.config, job.geometry)}


def remember(work: Work) -> dict[str, Any]:
    """Compare predicted and measured peaks of three configs, which fit if checkpointing all layers leaves room."""
    _need_base(work)
    shipped = work.config_of()
    some, half = 3 * read_geometry(shipped).num_hidden_layers // 4, shipped.model.max_seq_length // 2
    cases = {
        "all layers checkpointed": [],
        f"{some} layers checkpointed": [f"training.checkpointed_layers={some}"],
        f"sequences of {half} tokens": [f"model.max_seq_length={half}"],
    }
    plain = ["training.gradient_checkpointing=true", "training.checkpointed_layers=all"]
    plain += ["training.fused_lora=false", "training.fused_kernels=false"]
    rows = []
    for name, settings in cases.items():
        config = work.config_of(*plain, *settings)
        expected = peak_gib(config, read_geometry(config))
        measured = work.alone(_peak, (work, config))
        rows.append({"config": name, "expected_gib": round(expected, 3), "measured_gib": round(measured, 3)})
    off = max(abs(row["expected_gib"] / row["measured_gib"] - 1) for row in rows)
    return {"base": work.base, "furthest_off": round(off, 4), "configs": rows}


def _peak(of: tuple[Work, Config]) -> float:
    from finetune.machine.device import capacity_gib
    from finetune.training import rehearsal

    work, config = of
    return rehearsal.rehearse(_job(work, config), work.folder / "memory", capacity_gib(work.platform)).peak_gib


def pace(work: Work) -> dict[str, Any]:
    """Time optimizer steps of the large base with the rehearsal's choice: tokens/s without padding, MFU and HFU."""
    _need_base(work)
    if not (work.folder / USED).is_file():
        raise LeftOut("it needs the settings that the part rehearsal chooses, which has no result")
    return {"base": work.base, **work.alone(_pace, work)}


def _pace(work: Work) -> dict[str, Any]:
    from transformers import TrainerCallback

    from finetune.machine.device import synchronize
    from finetune.model.lora import install_fused
    from finetune.training.arguments import training_arguments
    from finetune.training.trainer import make_trainer

    config = settled(work.config_of(f"training.max_steps={SPEED_STEPS + 1}"), read_json(work.folder / USED))
    job = _job(work, config)
    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_arguments: Any, **_named: Any) -> None:
            synchronize(work.platform)
            times.append(time.perf_counter())

    arguments = training_arguments(config.training, job.run, work.platform, evaluate_first=False)
    arguments.train_sampling_strategy = "sequential"
    arguments.eval_strategy = arguments.save_strategy = "no"
    layers = checkpointed_layers(config, job.geometry)
    install_fused(job.model, config.training)
    examples = job.examples()
    trainer = make_trainer(job.model, job.tokenizer, examples, arguments, layers)
    trainer.add_callback(Clock())
    trainer.train()
    seconds = times[-1] - times[0]
    rows = examples.train.select(range(config.effective_batch_size, (SPEED_STEPS + 1) * config.effective_batch_size))
    lengths = [length for row in rows for length in row["seq_lengths"]]  # of all steps except the first
    machine = read_machine()
    device = machine.gpus[0] if machine.gpus else work.platform.label
    busy = utilization(config, job.geometry, lengths, layers, seconds, device)
    speed = round(sum(lengths) / seconds, 1)
    entry = conditions(config, job.geometry) | {"tokens_per_second": speed, "eval_tokens_per_second": None}
    figures = {"steps": SPEED_STEPS, "tokens": sum(lengths), "step_seconds": seconds / SPEED_STEPS}
    shares = {name: share if share is None else round(share, 4) for name, share in busy.items()}
    return {**figures, "tokens_per_second": speed, **shares, "checkpointed_layers": layers, "throughput": [entry]}


def _need_base(work: Work) -> None:
    model = work.config_of().model
    if not (work.random or work.small[0] in work.settings or hub.is_cached(model.name, model.revision)):
        how = f"{hub.fetch_command(model.name, model.revision)}, or --random"
        raise LeftOut(f"{model.name} is not in the Hub's cache: {how}")


def _job(work: Work, config: Config) -> Job:
    from finetune.machine.device import prepare_device
    from finetune.model import load
    from finetune.model.lora import add_lora
    from finetune.prove.random_base import make_base
    from finetune.runs.folder import Run
    from finetune.training.job import Job, load_job

    run_folder, prepared = Run(work.folder / "large", False, None), Preflight(config, read_machine()).prepared
    if not (work.random and work.platform.nvidia):
        return load_job(run_folder, config, prepared)
    prepare_device(work.platform)
    base = make_base(config, read_geometry(config), work.platform)
    model = add_lora(base, config.lora, config.training.seed)
    return Job(run_folder, config, prepared, model, load.make_tokenizer(prepared.chat, config.dataset.padding_side))


PARTS: dict[str, Callable[[Work], dict[str, Any]]] = {
    "checks": look,
    "train": train,
    "rehearsal": rehearse,
    "speed": pace,
    "memory": remember,
    "kill": kill,
}
