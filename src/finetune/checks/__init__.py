"""The registry of checks, in the order they run, and the selection a command asks for."""

from __future__ import annotations

from collections.abc import Iterable

from finetune.checks import base_model, data, device, gpu, host, libraries, mac, paths, plan, resume
from finetune.checks.runner import Check
from finetune.cli import command
from finetune.config.suggest import did_you_mean
from finetune.errors import ConfigError

CHECKS: tuple[Check, ...] = (
    *host.CHECKS,
    *libraries.CHECKS,
    *base_model.CHECKS,  # before the checks that need the model's shape
    *gpu.CHECKS,
    *mac.CHECKS,
    *device.CHECKS,
    *paths.BEFORE_DATA,
    *data.CHECKS,
    *plan.CHECKS,
    *paths.CHECKS,
    *resume.CHECKS,
    *plan.REHEARSAL,
)

LIST = f"{command('scripts/validate_environment.py')} --list lists them all"
# Training does these itself: it opens its run folder, finds its checkpoint and runs the rehearsal.
TRAINING_DOES = ("state.run", "receipt", "rehearsal")


def select(platform: str, only: Iterable[str] = (), skip: Iterable[str] = (), deep: bool = False) -> tuple[Check, ...]:
    """The checks of `platform`, filtered by id or group (`gpu` means every `gpu.*`).

    Raises ConfigError for an unknown name, and if no check is left.
    """
    only, skip = expand("--only", only), expand("--skip", skip)
    chosen = tuple(
        check
        for check in CHECKS
        if platform in check.platforms
        and (not only or check.id in only)
        and check.id not in skip
        and (deep or not check.deep or check.id in only)
    )
    if not chosen:
        raise ConfigError(f"no check is left to run on {platform}", fix=LIST, between="\n")
    return chosen


def expand(flag: str, names: Iterable[str]) -> frozenset[str]:
    """The check ids that `names`, ids or groups, refer to. Raises ConfigError listing unknown names."""
    names = tuple(names)
    known = [check.id for check in CHECKS]
    groups = {known_id.split(".")[0]: None for known_id in known}  # in order, each once
    found = frozenset(known_id for known_id in known for name in names if name in (known_id, known_id.split(".")[0]))
    unknown = [name for name in names if name not in known and name not in groups]
    if unknown:
        problems = (f"{flag} {name}: no such check{did_you_mean(name, [*groups, *known])}" for name in unknown)
        raise ConfigError(*problems, fix=LIST, between="\n")
    return found
