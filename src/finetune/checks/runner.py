"""What a check is, and the runner: checks in, results out. Nothing here prints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from finetune.errors import CheckFailed, DataError, UserError
from finetune.machine.platforms import PLATFORMS

if TYPE_CHECKING:
    from finetune.checks.preflight import Preflight

NO_FIX = "fix it, or set another value with --set"
CRASHED = "report this bug; --skip {id} runs without the check"


@dataclass(frozen=True)
class Finding:
    """What a check found: `detail` with its figures, and for a warning or a failure the fix to type or edit."""

    status: Literal["pass", "warn", "fail", "skip"]
    detail: str
    fix: str = ""


def passed(detail: str) -> Finding:
    """As expected."""
    return Finding("pass", detail)


def warned(detail: str, fix: str) -> Finding:
    """Works, but look at it before you pay for GPU time."""
    return Finding("warn", detail, fix)


def failed(detail: str, fix: str) -> Finding:
    """No run may start with this."""
    return Finding("fail", detail, fix)


def skipped(why: str) -> Finding:
    """Not checked, and why."""
    return Finding("skip", why)


@dataclass(frozen=True)
class Check:
    """One row of the registry.

    `looks_at` is its description in `--list` and docs/checks.md; `level` is the worst status it may report; `needs` are
    earlier checks that must succeed first. `network` checks may take a probe's 5 s, so they run in parallel with the
    others. `deep` checks load the model, so they run only with `--deep`.
    """

    id: str
    looks_at: str
    look: Callable[[Preflight], Finding]
    platforms: tuple[str, ...] = tuple(PLATFORMS)
    needs: tuple[str, ...] = ()
    level: Literal["warn", "fail"] = "fail"
    network: bool = False
    deep: bool = False


@dataclass(frozen=True)
class Result:
    """A finding with its check's id and duration. `exit_code` is that of the error the check raised, if any."""

    id: str
    status: str
    detail: str
    fix: str
    seconds: float
    exit_code: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """The result as `--json` prints it."""
        values = asdict(self)
        del values["exit_code"]
        return values


def run(checks: Iterable[Check], preflight: Preflight) -> Iterator[Result]:
    """Each check's result, in the registry's order; a check that crashes fails alone, and the others run."""
    checks = tuple(checks)
    probes = [check for check in checks if check.network]
    results: dict[str, Result] = {}
    with ThreadPoolExecutor(max(1, len(probes))) as pool:
        running: dict[str, Future[Result]] = {check.id: pool.submit(_result, check, preflight) for check in probes}
        for check in checks:
            missing = [name for name in check.needs if name in results and results[name].status in ("fail", "skip")]
            if check.id in running:
                result = running[check.id].result()
            elif missing:
                result = Result(check.id, "skip", f"needs {missing[0]}", "", 0.0)
            else:
                result = _result(check, preflight)
            results[check.id] = result
            yield result


def _result(check: Check, preflight: Preflight) -> Result:
    started, own_code = time.perf_counter(), None
    try:
        finding = check.look(preflight)
    except UserError as error:
        fix = "\n".join(map(str.strip, (error.fix or NO_FIX).splitlines()))
        finding, own_code = Finding(check.level, error.found, fix), error.exit_code
    except Exception as error:  # noqa: BLE001  # a bug in one check must not hide the results of the others
        text = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
        finding = Finding(check.level, f"this check crashed: {text}", CRASHED.format(id=check.id))
    if finding.status == "fail" and check.level == "warn":
        raise AssertionError(f"{check.id} has level warn and found a failure: {finding.detail}")
    seconds = round(time.perf_counter() - started, 3)
    return Result(check.id, finding.status, finding.detail, finding.fix, seconds, own_code)


def exit_code(results: Iterable[Result], strict: bool = False) -> int:
    """0; 3 if any check outside the data group failed; else the code of the data error (4 bad, 2 absent)."""
    bad = [result for result in results if result.status == "fail" or (strict and result.status == "warn")]
    if not bad:
        return 0
    if any(result.id.split(".")[0] != "data" for result in bad):
        return CheckFailed.exit_code
    return bad[0].exit_code or DataError.exit_code


def summary(results: Iterable[Result], code: int) -> dict[str, Any]:
    """The results as `--json` prints them; `code` is the exit code they lead to."""
    results = list(results)
    worst = "fail" if code else "warn" if any(result.status == "warn" for result in results) else "pass"
    return {"schema_version": 1, "status": worst, "checks": [result.as_dict() for result in results]}
