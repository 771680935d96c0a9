"""LoRA's dropout in Triton: right in Triton's interpreter, and compiled for an H100. No GPU has run it yet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.files import ROOT

triton = pytest.importorskip("triton", reason="Triton comes with the H100's torch: scripts/test.sh --h100-torch")

PROGRAM = ROOT / "tests" / "support" / "interpreted_dropout.py"


@pytest.fixture(scope="module")
def interpreted() -> list[dict[str, Any]]:
    paths = {"PYTHONPATH": f"{ROOT / 'src'}", "TRITON_INTERPRET": "1"}
    line = [sys.executable, str(PROGRAM)]
    done = subprocess.run(line, env=os.environ | paths, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_result_and_all_gradients_are_those_of_dropout_with_that_noise(interpreted: list[dict[str, Any]]) -> None:
    assert [case["distance"] < 5e-6 for case in interpreted] == [True, True, True], interpreted


def test_a_layer_computed_again_makes_the_same_noise(interpreted: list[dict[str, Any]]) -> None:
    assert [case["again"] for case in interpreted] == [True, True, True]


def test_noise_keeps_its_share_and_neighbors_and_seeds_are_independent(interpreted: list[dict[str, Any]]) -> None:
    for case, kept in zip(interpreted, (0.7, 0.95, 1.0), strict=True):
        assert case["values"] == ([1.0] if kept == 1 else [0.0, 1.0])
        assert case["kept"] == pytest.approx(kept, abs=0.018)  # 5 standard deviations of 20,400 at 0.7
        assert [*case["both"], case["another seed"]] == pytest.approx(3 * [kept**2], abs=0.025)


POINTERS = {"x": "*bf16", "down": "*bf16", "reduced": "*bf16", "of_reduced": "*bf16", "of_x": "*bf16", "of_a": "*fp32"}
NUMBERS = {"seed": "i64", "dropped": "i32", "tokens": "i32", "inputs": "i32", "rank": "i32"}


@pytest.mark.parametrize("name", ["_reduce", "_gradients"])
def test_it_compiles_for_an_h100_without_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from finetune.model import fused_dropout

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, of = getattr(fused_dropout, name), fused_dropout
    constants = {"R": 16, "TOKENS": of.TOKENS, "COLUMNS": of.COLUMNS, "CHUNK": of.CHUNK, "OF_X": True}
    kinds = POINTERS | NUMBERS | dict.fromkeys(constants, "constexpr")
    signature = {argument: kinds[argument] for argument in kernel.arg_names}
    known = {argument: value for argument, value in constants.items() if argument in signature}
    compiled = triton.compile(ASTSource(kernel, signature, known), target=GPUTarget("cuda", 90, 32))
    assert len(compiled.asm["cubin"]) > 10_000
    assert "sm_90" in compiled.asm["ptx"] and "mma" in compiled.asm["ptx"]
