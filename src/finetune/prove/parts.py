"""The parts of scripts/prove.py, which tests the complete program on a machine; each returns its figures."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
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
from finetune.plan.automatic import settled, used
from finetune.plan.memory import checkpointed_layers, peak_gib
from finetune.plan.model_shape import read_geometry
from finetune.plan.throughput import conditions
from finetune.prove.flops import utilization
from finetune.prove.process import Ended
from finetune.prove.work import ATTENTION, LeftOut, Work

if TYPE_CHECKING:
    from finetune.training.job import Job
    from finetune.training.rehearsal import Rehearsal
    from finetune.training.trainer import Examples

UNFUSED = (
    *("training.gradient_checkpointing=true", "training.checkpointed_layers=all"),
    *("training.fused_lora=false", "training.fused_kernels=false"),
)
STEPS, KILL_AFTER, SPEED_STEPS = 20, 10, 3
USED = "used.json"  # the settings chosen by the rehearsal
VERSIONS = "libraries.versions"  # listed in the result; the other parts show whether they work
NO_NETWORK = ("model.files", "model.access")  # random weights need nothing from the Hub


def make(name: str, work: Work) -> dict[str, Any]:
    """Run a part; return its status (done, skipped, failed), its seconds, and its figures or the reason for none."""
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


def run_checks(work: Work) -> dict[str, Any]:
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
    """Repeat the part train, but kill and resume the run. Raises CheckFailed if the adapter differs."""
    if not (work.folder / "whole" / "adapter_model.safetensors").is_file():
        raise LeftOut("it needs the adapter of the part train, which wrote none")
    checkpoints = work.folder / "killed" / "checkpoints"
    process = subprocess.Popen(command(work, "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    try:
        while process.poll() is None and not (checkpoints / f"checkpoint-{KILL_AFTER}" / SEAL).is_file():
            if not work.seconds_left:
                raise TimeoutError
            time.sleep(0.05)
    finally:
        process.kill()
        code = process.wait()
    if code != -signal.SIGKILL:
        raise CheckFailed(f"the run ended with exit code {code} before it was killed")
    last = max(int(path.name.split("-")[1]) for path in checkpoints.glob("checkpoint-*"))
    _train(work, "killed")
    whole, killed = _adapter(work, "whole"), _adapter(work, "killed")
    if whole != killed:
        found = f"killed after step {last} and resumed, the adapter is {killed[:12]}, uninterrupted {whole[:12]}"
        raise CheckFailed(found, "docs/architecture.md says which bits are the same where")
    return {"killed_after_step": last, "same_bits": True, "adapter": killed}


def _adapter(work: Work, name: str) -> str:
    return sha256(work.folder / name / "adapter_model.safetensors")


def command(work: Work, name: str) -> list[str]:
    """Return the command of run `name` on the small base."""
    settings = [*work.settings, ATTENTION, *work.small, f"training.max_steps={STEPS}", f"tracking.run_name={name}"]
    settings += ["training.logging_steps=1", f"training.eval_steps={KILL_AFTER}", f"training.save_steps={KILL_AFTER}"]
    sets = [word for setting in settings for word in ("--set", setting)]
    groups = {check.id.split(".")[0] for check in checks.CHECKS} - {"data"}  # run by the part `checks`
    command = [sys.executable, str(ROOT / "src" / "train.py"), "--config", work.config, *sets]
    return [*command, "--skip", ",".join(sorted(groups))]


def _train(work: Work, name: str) -> None:
    line, left = command(work, name), work.seconds_left
    try:
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=left, cwd=ROOT)
    except subprocess.TimeoutExpired:
        raise TimeoutError from None
    if done.returncode:
        raise CheckFailed(f"src/train.py ended with exit code {done.returncode}: {done.stderr.strip()[-2000:]}")


def rehearse(work: Work) -> dict[str, Any]:
    """Rehearse the large base; return what was tried for `auto`, and the choice."""
    work.need_base()
    found = work.alone(_rehearse, work)
    write_json(work.folder / USED, found["used"])
    return {"base": work.base, **found}


def _rehearse(work: Work) -> dict[str, Any]:
    config = work.config_of()
    found = _rehearsed(work, config, "rehearsal")
    return {**found.as_dict(), "used": used(found.config, read_geometry(config))}


def _rehearsed(work: Work, config: Config, folder: str) -> Rehearsal:
    from finetune.machine.device import capacity_gib
    from finetune.training import rehearsal

    return rehearsal.rehearse(work.job(config), work.folder / folder, capacity_gib(work.platform))


def measure_memory(work: Work) -> dict[str, Any]:
    """Compare expected and measured peaks of three configs, which fit if checkpointing all layers leaves room."""
    work.need_base()
    shipped = work.config_of()
    some, half = 3 * read_geometry(shipped).num_hidden_layers // 4, shipped.model.max_seq_length // 2
    cases = {
        "all layers checkpointed": [],
        f"{some} layers checkpointed": [f"training.checkpointed_layers={some}"],
        f"sequences of {half} tokens": [f"model.max_seq_length={half}"],
    }
    rows = []
    for name, settings in cases.items():
        config = work.config_of(*UNFUSED, *settings)
        expected = peak_gib(config, read_geometry(config))
        measured = work.alone(_peak, (work, config))
        rows.append({"config": name, "expected_gib": round(expected, 3), "measured_gib": round(measured, 3)})
    off = max(abs(row["expected_gib"] / row["measured_gib"] - 1) for row in rows)
    return {"base": work.base, "furthest_off": round(off, 4), "configs": rows}


def _peak(of: tuple[Work, Config]) -> float:
    return _rehearsed(*of, "memory").peak_gib


def measure_speed(work: Work) -> dict[str, Any]:
    """Time optimizer steps of the large base with the rehearsal's choice: tokens/s without padding, MFU and HFU."""
    work.need_base()
    if not (work.folder / USED).is_file():
        raise LeftOut("it needs the result of the part rehearsal, which has none")
    return {"base": work.base, **work.alone(_speed, work)}


def _speed(work: Work) -> dict[str, Any]:
    config = settled(work.config_of(f"training.max_steps={SPEED_STEPS + 1}"), read_json(work.folder / USED))
    job = work.job(config)
    examples, layers = job.examples(), checkpointed_layers(config, job.geometry)
    seconds = _timed_steps(job, examples, layers)
    rows = examples.train.select(range(config.effective_batch_size, (SPEED_STEPS + 1) * config.effective_batch_size))
    lengths = [length for row in rows for length in row["seq_lengths"]]  # of all steps except the first
    gpus = read_machine().gpus
    shares = utilization(config, job.geometry, lengths, layers, seconds, gpus[0] if gpus else work.platform.label)
    speed = {"tokens_per_second": round(sum(lengths) / seconds, 1)}
    entry = conditions(config, job.geometry) | speed | {"eval_tokens_per_second": None}
    return {
        **{"steps": SPEED_STEPS, "tokens": sum(lengths), "step_seconds": seconds / SPEED_STEPS, **speed},
        **{name: share if share is None else round(share, 4) for name, share in shares.items()},
        **{"checkpointed_layers": layers, "throughput": [entry]},
    }


def _timed_steps(job: Job, examples: Examples, layers: int) -> float:
    """Train all steps in the order of the rows; return the seconds of all except the first."""
    from transformers import TrainerCallback

    from finetune.machine.device import synchronize
    from finetune.model.lora import install_fused
    from finetune.training.arguments import training_arguments
    from finetune.training.trainer import make_trainer

    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_arguments: Any, **_named: Any) -> None:
            synchronize(job.platform)
            times.append(time.perf_counter())

    arguments = training_arguments(job.config.training, job.run, job.platform, evaluate_first=False)
    arguments.train_sampling_strategy = "sequential"
    arguments.eval_strategy = arguments.save_strategy = "no"
    install_fused(job.model, job.config.training)
    trainer = make_trainer(job.model, job.tokenizer, examples, arguments, layers)
    trainer.add_callback(Clock())
    trainer.train()
    return times[-1] - times[0]


PARTS: dict[str, Callable[[Work], dict[str, Any]]] = {
    "checks": run_checks,
    "train": train,
    "rehearsal": rehearse,
    "speed": measure_speed,
    "memory": measure_memory,
    "kill": kill,
}
