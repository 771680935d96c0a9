"""Work in a process of its own: its result, and each way in which it can end without one."""

from __future__ import annotations

import os
import time

import pytest

from finetune.errors import CheckFailed
from finetune.prove.process import Ended, run_alone


def double(number: int) -> int:
    print("working")
    return 2 * number


def refuse(number: int) -> int:
    raise CheckFailed(f"{number} is not enough", "take more")


def crash(_number: int) -> int:
    print("before")
    raise RuntimeError("no such kernel")


def die(_number: int) -> int:
    os.kill(os.getpid(), 9)
    return 0


def sleep(seconds: int) -> int:
    time.sleep(seconds)
    return seconds


@pytest.mark.parametrize("fork", [True, False])
def test_its_result_comes_back_and_what_it_prints_does_not(fork: bool, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_alone(double, 21, fork) == 42
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (refuse, "3 is not enough; take more"),
        (crash, "exit code 1: RuntimeError: no such kernel"),
        (die, "exit code -9: without a message"),
    ],
)
def test_without_a_result_it_says_how_it_ended(function: object, found: str) -> None:
    with pytest.raises(Ended) as caught:
        run_alone(function, 3, True)  # type: ignore[arg-type]
    assert caught.value.found == found
    assert ("before" in caught.value.log) == (function is crash)


def test_one_that_takes_too_long_is_killed() -> None:
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        run_alone(sleep, 60, True, 0.2)
    assert time.monotonic() - begun < 20
