"""The runner of checks: order, what is left out, crashes, exit codes, and which checks a command means."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from finetune import checks
from finetune.checks.runner import Check, Finding, Result, exit_code, failed, passed, run, skipped, warned
from finetune.cli import PYTHON
from finetune.errors import CheckFailed, ConfigError, DataError, OutOfResource, UserError

NOTHING: Any = None  # a preflight for checks that look at none


FINE = passed("fine")


def check(id_: str, finding: Finding | Exception = FINE, **facts: Any) -> Check:
    """A check that finds this, or raises it."""

    def look(_: object) -> Finding:
        if isinstance(finding, Exception):
            raise finding
        return finding

    return Check(id_, "", look, **facts)


def told(*rows: Check) -> list[tuple[str, str, str, str]]:
    return [(it.id, it.status, it.detail, it.fix) for it in run(rows, NOTHING)]


# Order and what is left out -------------------------------------------------------------------------------------------


def test_results_come_in_the_order_of_the_rows_each_as_soon_as_it_is_there() -> None:
    looked: list[str] = []

    def noting(id_: str) -> Check:
        return Check(id_, "", lambda _: looked.append(id_) or passed(""))  # type: ignore[func-returns-value]

    results = run([noting("b"), noting("a"), noting("c")], NOTHING)
    assert next(results).id == "b"
    assert looked == ["b"]
    assert [it.id for it in results] == ["a", "c"]


@pytest.mark.parametrize("first", [failed("broken", "mend"), skipped("not here")])
def test_what_needs_a_check_that_did_not_pass_is_left_out_and_so_is_what_needs_that(first: Finding) -> None:
    rows = (check("a", first), check("b", needs=("a",)), check("c", needs=("b",)), check("d"))
    assert told(*rows)[1:] == [("b", "skip", "needs a", ""), ("c", "skip", "needs b", ""), ("d", "pass", "fine", "")]


def test_a_warning_is_good_enough_for_what_needs_it() -> None:
    assert told(check("a", warned("hm", "look")), check("b", needs=("a",)))[1] == ("b", "pass", "fine", "")


def test_a_check_that_was_not_chosen_stops_nothing() -> None:
    assert told(check("b", needs=("a",))) == [("b", "pass", "fine", "")]


# Checks that raise ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (ValueError("bad luck"), "this check crashed: ValueError: bad luck"),
        (AssertionError(), "this check crashed: AssertionError: no message"),
        (OSError(5, "Input/output error"), "this check crashed: OSError: [Errno 5] Input/output error"),
    ],
)
def test_a_crash_is_one_finding_and_the_rest_goes_on(error: Exception, detail: str) -> None:
    fix = "report this bug; --skip a runs without the check"
    assert told(check("a", error), check("b")) == [("a", "fail", detail, fix), ("b", "pass", "fine", "")]
    assert told(check("a", error, level="warn")) == [("a", "warn", detail, fix)]
    assert told(check("a", error, network=True)) == [("a", "fail", detail, fix)]


@pytest.mark.parametrize(
    ("error", "detail", "fix", "code"),
    [
        (CheckFailed("torch cannot be imported", "reinstall it"), "torch cannot be imported", "reinstall it", 3),
        (DataError("2 bad rows\n  a:1: x; y", "Fix them", "\n"), "2 bad rows\n  a:1: x; y", "Fix them", 4),
        (OutOfResource("5 h; what fits:", "--set a=1\n  --set b=2", "\n  "), "5 h; what fits:", "--set a=1\n--set b=2",
            6),
        (ConfigError("a.jsonl: not there", fix="put it there"), "a.jsonl: not there", "put it there", 2),
        (ConfigError("x: 1; y", "z: 2", fix="--fresh restarts"), "x: 1; y\nz: 2", "--fresh restarts", 2),
        (ConfigError("x: is 1", "z: is 2"), "x: is 1\nz: is 2", "fix it, or set another value with --set", 2),
    ],
)  # fmt: skip
def test_a_user_error_is_a_finding_with_its_fix_as_what_to_type(
    error: UserError, detail: str, fix: str, code: int
) -> None:
    [result] = run([check("a", error)], NOTHING)
    assert (result.status, result.detail, result.fix, result.exit_code) == ("fail", detail, fix, code)


def test_a_check_of_level_warn_never_fails() -> None:
    [result] = run([check("a", CheckFailed("broken", "fix it"), level="warn")], NOTHING)
    assert (result.status, exit_code([result])) == ("warn", 0)
    with pytest.raises(AssertionError, match=r"^a has level warn and found a failure: broken$"):
        list(run([check("a", failed("broken", "fix it"), level="warn")], NOTHING))


# Time -----------------------------------------------------------------------------------------------------------------


def slow(id_: str, seconds: float, **facts: Any) -> Check:
    return Check(id_, "", lambda _: time.sleep(seconds) or passed("fine"), **facts)  # type: ignore[func-returns-value]


def test_checks_of_the_network_run_beside_each_other_and_beside_what_comes_before_them() -> None:
    rows = (slow("a", 0.2), slow("b", 0.3, network=True), slow("c", 0.3, network=True))
    started = time.perf_counter()
    assert [it.id for it in run(rows, NOTHING)] == ["a", "b", "c"]
    assert time.perf_counter() - started < 0.5  # one after the other it would be 0.8


def test_each_result_says_how_long_its_own_check_took() -> None:
    seconds = [it.seconds for it in run([slow("a", 0.1), slow("b", 0.0)], NOTHING)]
    assert 0.1 <= seconds[0] < 0.2
    assert seconds[1] < 0.1


# Exit codes -----------------------------------------------------------------------------------------------------------


def result(id_: str, status: str, code: int | None = None) -> Result:
    return Result(id_, status, "", "", 0.0, code)


@pytest.mark.parametrize(
    ("results", "code", "strict"),
    [
        ([], 0, 0),
        ([result("a", "pass"), result("b", "skip")], 0, 0),
        ([result("a", "warn")], 0, 3),
        ([result("gpu.driver", "fail")], 3, 3),
        ([result("paths.output", "fail", 2)], 3, 3),
        ([result("data.rows", "fail", 4)], 4, 4),
        ([result("data.rows", "fail", 2)], 2, 2),
        ([result("data.rows", "fail", 3)], 3, 3),  # other tokens than Mistral's
        ([result("data.rows", "fail")], 4, 4),
        ([result("data.lengths", "warn")], 0, 4),
        ([result("data.rows", "fail", 4), result("gpu.driver", "fail")], 3, 3),
        ([result("data.rows", "fail", 4), result("gpu.processes", "warn")], 4, 3),
        ([result("database", "fail", 4)], 3, 3),  # a group is a whole word
    ],
)
def test_the_exit_code_is_the_datas_own_only_where_nothing_else_failed(
    results: list[Result], code: int, strict: int
) -> None:
    assert (exit_code(results), exit_code(results, strict=True)) == (code, strict)


def test_json_has_five_values_of_each_result() -> None:
    assert Result("a", "fail", "broken", "fix it", 0.25, 4).as_dict() == {
        "id": "a", "status": "fail", "detail": "broken", "fix": "fix it", "seconds": 0.25,
    }  # fmt: skip


# Which checks a command means -----------------------------------------------------------------------------------------


def ids(*arguments: Any, **options: Any) -> list[str]:
    return [it.id for it in checks.select(*arguments, **options)]


@pytest.mark.parametrize("platform", ["h100", "m4", "cpu"])
def test_a_platform_has_its_own_checks_and_no_deep_ones(platform: str) -> None:
    mine = [it.id for it in checks.CHECKS if platform in it.platforms and not it.deep]
    assert ids(platform) == mine
    groups = {id_.split(".")[0] for id_ in mine}
    assert groups >= {"host", "libraries", "model", "data", "plan", "paths", "state"}
    assert ("gpu" in groups, "mac" in groups) == (platform == "h100", platform == "m4")


def test_deep_checks_are_made_when_asked_for_in_either_way() -> None:
    assert "rehearsal" not in ids("cpu")
    assert "rehearsal" in ids("cpu", deep=True)
    assert ids("cpu", only=["rehearsal"]) == ["rehearsal"]


def test_a_check_is_named_by_id_or_by_group() -> None:
    assert ids("h100", only=["host.clock", "tokens"]) == ["host.clock", "tokens.certificate"]
    assert ids("m4", only=["mac"], skip=["mac.power", "mac.chip"]) == [
        "mac.torch", "mac.memory", "mac.watermarks", "mac.pressure",
    ]  # fmt: skip
    assert "gpu.driver" not in ids("h100", skip=["gpu"])
    assert ids("cpu", skip=["gpu"]) == ids("cpu")  # true on every platform, so one command line serves all


@pytest.mark.parametrize(
    ("call", "problems"),
    [
        (lambda: ids("cpu", only=["gpu.drivr", "hosts"]),
            ("--only gpu.drivr: no such check; did you mean gpu.driver?",
            "--only hosts: no such check; did you mean host?")),
        (lambda: ids("cpu", skip=[""]), ("--skip : no such check",)),
        (lambda: ids("cpu", only=["gpu"]), ("no check is left to run on cpu",)),
        (lambda: ids("cpu", only=["data"], skip=["data"]), ("no check is left to run on cpu",)),
    ],
)  # fmt: skip
def test_a_name_that_means_no_check_is_refused(call: Callable[[], object], problems: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as failure:
        call()
    assert failure.value.problems == problems
    assert str(failure.value).splitlines()[-1] == f"{PYTHON} scripts/validate_environment.py --list lists them all"
