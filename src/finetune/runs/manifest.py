"""manifest.json: what a run is, as known before its first step, and how each of its starts ended."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune.config import yaml_file
from finetune.config.base_model import is_local
from finetune.config.schema import Config, Mark, marked
from finetune.data.prepare import Prepared
from finetune.data.split import Statistics
from finetune.data.store import Place
from finetune.errors import OutOfResource, Stopped
from finetune.files import ROOT, read_json_lines, resolve, shown, write_json
from finetune.machine.platforms import LIBRARIES, PLATFORMS
from finetune.model import hub
from finetune.runs import receipt, resume, warm_start
from finetune.runs.checkpoints import saved, step_of
from finetune.runs.folder import MANIFEST, METRICS, Run, read_manifest
from finetune.runs.receipt import base_model
from finetune.runs.resume import Decision

FULL_DISK_MIB = 1
COUNTED_ELSEWHERE = ("rows", "tokens", "supervised_tokens", "bad")  # of Statistics: below `tokens`, and as dropped_bad


def versions() -> dict[str, str]:
    """Installed versions of the libraries that determine what a run computes."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def git_commit() -> str | None:
    """The commit of this program, from GIT_COMMIT or git; None if neither knows it."""
    if commit := os.environ.get("GIT_COMMIT"):
        return commit
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def fingerprint(config: Config, prepared: Prepared) -> dict[str, Any]:
    """What must be equal to resume from a checkpoint: config (except what may change), tokens, tokenizer, versions.

    Also the variables that decide how the platform computes, and the weights of a base in a folder, which for a base on
    the Hub are given by its revision.
    """
    tree = config.as_dict()
    for path in marked(Mark.MAY_CHANGE):
        section, key = path.split(".")
        del tree[section][key]
    tree = {name: value for name, value in tree.items() if value != {}}
    tokens = prepared.tokens | {"tokenizer": prepared.chat.fingerprint}
    name = config.model.name
    weights = hub.weights_digest(resolve(name)) if is_local(name) else config.model.revision
    known = {"config": tree, "tokens": tokens, "versions": versions(), "base_weights": weights}
    known["init_adapter"] = warm_start.digest(config)
    return known | PLATFORMS[config.platform].environment


def refuse_changes(run: Run, config: Config, prepared: Prepared) -> None:
    """Raise ConfigError if the fingerprint differs from that of every checkpoint of `run`.

    If a library is missing, there is none: the checks report that.
    """
    with suppress(importlib.metadata.PackageNotFoundError):
        resume.refuse_changes(run.checkpoints, fingerprint(config, prepared))


def describe(config: Config, prepared: Prepared, hardware: dict[str, Any]) -> dict[str, Any]:
    """The part of the manifest that is known before the first step."""
    statistics = prepared.statistics
    return {
        "config_sha256": config.sha256(),
        "data": prepared.files,
        "tokens": {name: prepared.tokens[name] | _totals(counts) for name, counts in statistics.items()},
        "rows": {name: _rows(counts) for name, counts in statistics.items()},
        "base_model": base_model(config),
        "init_adapter": {"folder": config.lora.init_from, "sha256": warm_start.digest(config)},
        "versions": versions(),
        "environment": PLATFORMS[config.platform].environment,
        "hardware": hardware,
        "git_commit": git_commit(),
        "copy_to": config.output.copy_to,
    }


def _totals(counts: Statistics) -> dict[str, int]:
    return {"rows": counts.rows, "total": counts.tokens, "supervised": counts.supervised_tokens}


def _rows(counts: Statistics) -> dict[str, Any]:
    """All other counts, and each bad row with its place."""
    bad = [{"file": place.file, "line": place.line, "found": text} for place, text in counts.bad]
    others = {name: _recorded(value) for name, value in asdict(counts).items()} | {"dropped_bad": bad}
    return {name: value for name, value in others.items() if name not in COUNTED_ELSEWHERE}


def _recorded(value: Any) -> Any:
    """A place as `file:line`, and a pair of places as a list of these."""
    if isinstance(value, Place):
        return str(value)
    return [str(place) for place in value] if isinstance(value, tuple) else value


def write_config(run: Run, config: Config, prepared: Prepared) -> None:
    """Write the resolved config.yaml and receipt.json, which tells another machine whether it trains the same thing."""
    (run.folder / "config.yaml").write_text(yaml_file.dump(config.as_dict()), encoding="utf-8")
    write_json(run.folder / receipt.FILE, receipt.make(config, prepared))


class Manifest:
    """manifest.json of one run: what it is, how each of its starts ended, and its result; written whole each time.

    `content` is everything except its status, and the error if it failed.
    """

    def __init__(self, run: Run, content: dict[str, Any]) -> None:
        self.run, self.content = run, content

    def document(self, status: str) -> dict[str, Any]:
        """The document as it is written."""
        return {"status": status, **self.content}

    def started(
        self, decision: Decision, set_aside: Sequence[str], used: dict[str, Any], rehearsal: dict[str, Any] | None
    ) -> None:
        """Record that a start begins, and, if the one before did not end, that it was killed.

        `set_aside`: a sentence for each folder; `used` replaces `auto`; `rehearsal` is what that measured.
        """
        starts = read_manifest(self.run.folder).get("starts", [])
        if starts and starts[-1]["end"] is None:
            step, seconds = _last_logged(self.run, starts[-1])
            starts[-1] |= {"ended": seconds and _utc(seconds), "step": step, "end": "killed"}
        begun = {"started": _utc(time.time()), "from_step": decision.step, "ended": None, "step": None, "end": None}
        why = {"changed": list(decision.changes), "set_aside": list(set_aside), "rehearsal": rehearsal}
        self.content |= {**used, "starts": [*starts, begun | why]}
        self._write(self.document("interrupted"))

    def memory_ran_out(self, layers: int, sentence: str) -> None:
        """Record that this start continues with `layers` checkpointed, and why."""
        self.content["checkpointed_layers"] = layers
        self.content["starts"][-1].setdefault("out_of_memory", []).append(sentence)
        self._write(self.document("interrupted"))

    def complete(self) -> None:
        """Record that this start has finished the run."""
        self._end("complete")
        self._write(self.document("complete"))

    def ended(self, error: Exception) -> None:
        """Record that `error` ended this start: the run was stopped, or it failed."""
        if isinstance(error, Stopped):
            self._end("time budget" if error.exit_code == OutOfResource.exit_code else "stopped")
            self._write(self.document("interrupted"))
        else:
            self._end("failed")
            self._write({"status": "failed", "error": str(error), **self.content})

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record an exception of the block.

        Libraries report in many ways that a disk is full, read-only or gone; if nothing more can be written into the
        run's folder, OutOfResource is raised instead.
        """
        try:
            yield
        except Exception as error:
            with suppress(OSError):  # there the manifest cannot be written either; `interrupted` is in it already
                self.ended(error)
            if not isinstance(error, Stopped | OutOfResource):
                _check_writable(self.run.folder, error)
            raise

    def _end(self, how: str) -> None:
        for start in self.content.get("starts", [])[-1:]:  # none where it ends before it is recorded
            steps = [_last_logged(self.run, start)[0], *map(step_of, saved(self.run.checkpoints))]
            start |= {"ended": _utc(time.time()), "step": max(steps), "end": how}

    def _write(self, document: dict[str, Any]) -> None:
        write_json(self.run.folder / MANIFEST, document)


def _last_logged(run: Run, start: dict[str, Any]) -> tuple[int, float | None]:
    """The last step that `start` logged, and when; else the one that it began from."""
    begun = datetime.fromisoformat(start["started"]).timestamp()
    logged = [entry for entry in read_json_lines(run.folder / METRICS) if entry["time"] >= begun]
    return (logged[-1]["step"], logged[-1]["time"]) if logged else (start["from_step"], None)


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _check_writable(folder: Path, error: Exception) -> None:
    """Raise OutOfResource from `error` if nothing can be written into `folder`."""
    advice, where = "then type the same command again", shown(folder)
    try:
        free_mib = shutil.disk_usage(folder).free / 2**20
    except OSError as gone:
        raise OutOfResource(f"{where} is gone ({gone.strerror})", f"bring it back, {advice}") from error
    if free_mib < FULL_DISK_MIB:
        raise OutOfResource(f"no space left: {where} has {free_mib:.1f} MiB free", f"free some, {advice}") from error
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as refused:
        found = f"{where} can no longer be written: {refused.strerror} ({free_mib:,.1f} MiB free)"
        raise OutOfResource(found, f"fix that, {advice}") from error
