"""Where a run resumes: decided without changing anything, then applied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import CheckFailed, ConfigError
from finetune.files import SEAL, read_json, seal_facts
from finetune.runs.checkpoints import ASIDE, damage, find_best, saved, set_aside, settle_best, step_of
from finetune.terminal import Terminal
from finetune.wording import leaves


@dataclass(frozen=True)
class Decision:
    """What a start does with the checkpoints of its run.

    It resumes from `checkpoint`, the newest usable one, or begins the run (None). `changes` lists what is different
    now. `damaged` are newer checkpoints with what is wrong, which are set aside. `nothing_intact`: the run had intact
    checkpoints, none is left, and the start is refused. `best` is the best adapter's folder; `best_damage` says why it
    is not used. If it is lost, the intact checkpoints of its step `best_step` and later are `repeated`: set aside too,
    and training produces it again. `used`: what the run used for `auto`, as recorded by its checkpoint or best adapter;
    None at the beginning.
    """

    checkpoints: Path
    checkpoint: Path | None
    changes: tuple[str, ...]
    damaged: tuple[tuple[Path, str], ...]
    nothing_intact: bool
    best: Path | None
    best_damage: str | None
    best_step: int | None
    repeated: tuple[Path, ...]
    used: dict[str, Any] | None = None

    @property
    def step(self) -> int:
        """The step to resume from; 0 for the beginning."""
        return step_of(self.checkpoint) if self.checkpoint else 0


def decide(checkpoints: Path, fingerprint: dict[str, Any]) -> Decision:
    """Decide what a start with this fingerprint does, without changing anything."""
    best, best_damage = find_best(checkpoints, fingerprint)
    best_lost = best is None or best_damage is not None
    damaged: list[tuple[Path, str]] = []
    repeated: list[Path] = []
    changes: tuple[str, ...] = ()
    checkpoint = step = None
    for folder in reversed(saved(checkpoints)):
        if found := damage(folder):
            damaged.append((folder, found))
            continue
        if not repeated:
            changes = tuple(differences(seal_facts(folder)["fingerprint"], fingerprint))
            step = best_step(folder) if best_lost and not changes else None
        if step is None or step_of(folder) < step:
            checkpoint = folder
            break
        repeated.append(folder)
    nothing_intact = checkpoint is None and not repeated and _any_sealed(checkpoints)
    lists = tuple(damaged), nothing_intact, best, best_damage, step, tuple(repeated)
    left = checkpoint or (None if best_lost else best)
    return Decision(checkpoints, checkpoint, changes, *lists, seal_facts(left).get("used") if left else None)


def refuse_changes(checkpoints: Path, fingerprint: dict[str, Any]) -> None:
    """Raise ConfigError if every checkpoint has another fingerprint, so that no start can resume without changes.

    Reads only the seals, so it takes no time; `decide` also looks for damage.
    """
    sealed = [folder for folder in saved(checkpoints) if (folder / SEAL).is_file()]
    try:
        found = [tuple(differences(seal_facts(folder)["fingerprint"], fingerprint)) for folder in sealed]
    except ValueError:  # a damaged seal, which `decide` reports
        return
    if found and all(found):
        raise _changed(sealed[-1], found[-1])


def _any_sealed(checkpoints: Path) -> bool:
    """Whether any checkpoint was ever complete: one without a seal was killed during its save, maybe the first."""
    folders = [*saved(checkpoints), *checkpoints.glob(f"{ASIDE}checkpoint-*")]
    return any((folder / SEAL).exists() for folder in folders)


def apply(decision: Decision, accept_changes: bool, terminal: Terminal) -> list[str]:
    """Apply `decision`; return a sentence for each folder that was set aside, each printed as a warning too.

    Raises CheckFailed if no checkpoint is intact, and ConfigError if something changed and `accept_changes` is false;
    in both cases only damaged checkpoints are set aside.
    """
    notes = []

    def note(sentence: str) -> None:
        terminal.warn(sentence)
        notes.append(sentence)

    for folder, found in decision.damaged:
        note(f"{folder.name} is damaged ({found}); set aside as {set_aside(folder).name}")
    _refuse(decision, accept_changes)
    for change in decision.changes:
        terminal.warn(f"resuming although changed: {change}")
    best = settle_best(decision.checkpoints, decision.best)
    if decision.best_damage:
        note(f"the best adapter so far is not used ({decision.best_damage}); set aside as {set_aside(best).name}")
    for folder in decision.repeated:
        aside = set_aside(folder)
        (aside / SEAL).unlink()  # it was intact, so it is no reason to refuse a start
        lost = f"the best adapter, of step {decision.best_step}, is made again"
        note(f"{folder.name} set aside as {aside.name}: {lost}")
    if decision.checkpoint:
        terminal.decision("resume", f"from {decision.checkpoint.name}, the newest intact checkpoint")
    return notes


def _refuse(decision: Decision, accept_changes: bool) -> None:
    if decision.nothing_intact:
        raise CheckFailed(f"no checkpoint in {decision.checkpoints} is intact", "--fresh starts a new run")
    if decision.checkpoint and decision.changes and not accept_changes:
        raise _changed(decision.checkpoint, decision.changes)


def _changed(checkpoint: Path, changes: Sequence[str]) -> ConfigError:
    problems = (f"changed since {checkpoint.name}: {change}" for change in changes)
    return ConfigError(*problems, fix="--fresh starts a new run, --resume-changed resumes anyway", between="\n")


def best_step(folder: Path) -> int:
    """The step of the lowest eval_loss by the checkpoint in `folder`; the step after its own if there is none."""
    history = read_json(folder / "trainer_state.json")["log_history"]
    losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    return min(losses, key=lambda step: losses[step], default=step_of(folder) + 1)


def differences(then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Yield each leaf that differs between two trees, as `path: then -> now`."""
    was, is_now = leaves(then), leaves(now)
    for path in sorted(was.keys() | is_now.keys()):
        if was.get(path) != is_now.get(path):
            yield f"{path}: {was.get(path)} -> {is_now.get(path)}"
