"""What checks and plan are told of a Mac's memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from finetune import checks
from finetune.checks import preflight
from finetune.checks.runner import run
from finetune.errors import CheckFailed
from support.bench import Bench
from support.recorded import LINUX, M4_16


def test_the_gpus_working_set_is_what_torch_says(bench: Callable[[str], Bench]) -> None:
    mac = bench("m4")
    mac.torch_says(working_set_gib=19.0)
    assert (mac.preflight().working_set_gib, mac.preflight().plan.working_set_gib) == (19.0, 19.0)


def test_where_torch_cannot_say_it_it_is_two_thirds_of_the_memory(bench: Callable[[str], Bench]) -> None:
    mac = bench("m4")
    mac.has(M4_16)
    mac.torch_says(sees_mps=False, working_set_gib=None)
    assert mac.preflight().plan.working_set_gib == 10.67

    def broken() -> None:
        raise CheckFailed("torch cannot be imported: no")

    there = mac.preflight()
    mac.patch.setattr(preflight, "read_torch", broken)
    assert there.plan.working_set_gib == 10.67


def test_where_there_is_no_mac_it_is_that_of_one_with_32_gb_and_torch_is_not_asked(
    bench: Callable[[str], Bench],
) -> None:
    elsewhere = bench("m4")
    elsewhere.has(LINUX)
    there = elsewhere.preflight()
    assert there.plan.working_set_gib == 21.3
    assert "torch" not in vars(there)


@pytest.mark.parametrize("platform", ["h100", "cpu"])
def test_other_platforms_have_none(platform: str, bench: Callable[[str], Bench]) -> None:
    plan = bench(platform).preflight().plan
    assert (plan.working_set_gib, plan.specified_memory_gb) == (None, None)


@pytest.mark.parametrize(("free_gib", "working_set_gib"), [(20.5, 21.3), (28.0, 16.0), (12.0, 21.3), (17.0, 17.2)])
def test_on_a_mac_plan_and_check_agree_whether_memory_is_enough(
    free_gib: float, working_set_gib: float, bench: Callable[[str], Bench]
) -> None:
    mac = bench("m4")
    mac.has(memory_free_gib=free_gib)
    mac.torch_says(working_set_gib=working_set_gib)
    there = mac.preflight()
    [found] = run(checks.select("m4", ["mac.memory"]), there)
    short = min(free_gib, working_set_gib) < mac.peak_gib()
    assert found.status == ("warn" if short else "pass")
    assert any("GiB expected" in problem for problem in there.plan.problems) is short
