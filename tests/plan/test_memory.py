"""The memory model: counted tensor by tensor, and compared with what torch allocates."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest

from finetune.config.load import ROOT
from finetune.files import GIB, read_json
from finetune.plan.memory import PARTS, lora_parameters, memory_parts, moments, peak_gib
from finetune.plan.model_shape import MISTRAL_7B, Geometry
from support.plans import load

EMBEDDING = 32_000 * 4096
LINEAR = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336)
RESULTS = ROOT / "benchmarks" / "results"
BOUND = 0.02  # of what is measured; docs/measured.md says so


def at(moment: str, *settings: str, platform: str = "h100") -> dict[str, float]:
    """The parts of one moment of Mistral-7B's training, GiB."""
    return moments(load(*settings, platform=platform), MISTRAL_7B)[moment]


# Against measurement --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """Two small models trained for two steps in processes of their own, their allocations recorded."""
    results = {}
    for case in ("small", "wide, evaluation", "deep, 8 of 12"):
        command = [sys.executable, str(ROOT / "benchmarks" / "memory.py"), "--case", case, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        results |= json.loads(done.stdout)["memory"]
    return results


def load_benchmark() -> Any:
    """benchmarks/memory.py as a module."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("memory_benchmark", ROOT / "benchmarks" / "memory.py")
    assert spec is not None and spec.loader is not None
    benchmark = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    return benchmark


def predicted(case: str) -> dict[str, dict[str, float]]:
    """The moments of one of its cases."""
    benchmark = load_benchmark()
    (found,) = [row for row in benchmark.CASES["cpu"] if row.name == case]
    return moments(benchmark.config_of(found, "cpu", ROOT / "tests"), found.geometry)


def errors(measured: dict[str, Any], dropped: str = "program") -> list[float]:
    """Relative errors of each case's three moments, without `program`, which is no tensor, and without `dropped`."""
    found = []
    for case, result in measured.items():
        for moment, parts in predicted(case).items():
            kept = sum(gib for name, gib in parts.items() if name not in ("program", dropped))
            found.append(abs(kept / result["gib"][moment]["measured"] - 1))
    return found


def test_each_moment_of_every_shipped_measurement_is_predicted_within_two_per_cent() -> None:
    shipped = sorted((ROOT / "benchmarks" / "results").glob("*-memory-*.json"))
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in shipped]
    cases = [case for document in documents for case in document["memory"].values() if "loss" in case["gib"]]
    assert len(cases) >= 10
    for case in cases:
        found = moments(load(f"model.name={ROOT}", *case["settings"], platform="cpu"), Geometry(**case["geometry"]))
        for moment, parts in found.items():
            tensors = sum(parts.values()) - parts["program"]
            assert tensors == pytest.approx(case["gib"][moment]["measured"], rel=BOUND), (case["settings"], moment)


def test_every_case_of_an_h100_is_expected_to_fit_and_the_levers_are_among_them() -> None:
    benchmark = load_benchmark()
    cases = benchmark.CASES["h100"]
    expected = {
        case.name: round(peak_gib(benchmark.config_of(case, "h100", ROOT / "tests"), case.geometry), 1)
        for case in cases
    }
    assert len(expected) == len(cases)
    assert max(expected.values()) < 72  # 90 % of 80 GiB
    named = {name: gib for name, gib in expected.items() if name.startswith(("4 x 4096", "8 x 4096"))}
    assert named == {
        "4 x 4096, as shipped": 13.4, "4 x 4096, 24 of 32": 39.8, "4 x 4096, fused, 8 layers": 57.4,
        "4 x 4096, expanded": 23.0, "4 x 4096, fused LoRA": 12.0, "4 x 4096, fused kernels": 12.6, "8 x 4096": 22.3,
        "8 x 4096, fused LoRA": 19.4, "8 x 4096, fused kernels": 20.6,
    }  # fmt: skip


@pytest.mark.slow
def test_each_moment_is_predicted_within_two_per_cent_of_what_torch_allocates(measured: dict[str, Any]) -> None:
    assert max(errors(measured)) < BOUND


@pytest.mark.slow
@pytest.mark.parametrize("part", [part for part in PARTS if part != "program"])
def test_no_part_of_the_memory_can_be_left_out(measured: dict[str, Any], part: str) -> None:
    assert max(errors(measured, dropped=part)) > BOUND


# The parts ------------------------------------------------------------------------------------------------------------


def test_all_seven_modules_of_mistral_7b_at_rank_16_are_41_943_040_weights() -> None:
    assert lora_parameters(load(), MISTRAL_7B) == 41_943_040
    assert lora_parameters(load("lora.r=8"), MISTRAL_7B) == 20_971_520
    two = "lora.target_modules=[q_proj, v_proj]"
    assert lora_parameters(load(two), MISTRAL_7B) == 32 * 16 * (4096 + 4096 + 4096 + 1024)


def test_mistral_7b_takes_about_4_gb_packed_and_14_and_a_half_expanded() -> None:
    packed, expanded = (at("loss", f"quantization.storage={storage}")["weights"] for storage in ("packed", "expanded"))
    assert packed * GIB == pytest.approx(4.1e9, rel=0.02)
    assert expanded * GIB == pytest.approx(14.5e9, rel=0.01)
    assert expanded * GIB == 2 * (LINEAR + 2 * EMBEDDING)


# What is set -> the part that moves, and by what factor where the arithmetic is exact (else only the direction).
LEVERS = [
    ("loss", ["quantization.storage=expanded"], "weights", ">"),
    ("loss", ["quantization.bnb_4bit_use_double_quant=false"], "weights", ">"),
    ("loss", ["training.optim=paged_adamw_8bit"], "optimizer", 2 / 8),
    ("loss", ["training.optim=adamw_torch"], "optimizer", 1),
    ("loss", ["training.gradient_accumulation_steps=1"], "lora", 6 / 10),  # no gradients of micro-batches before
    ("loss", ["training.gradient_checkpointing=false"], "activations", ">"),
    ("loss", ["training.gradient_accumulation_steps=64"], "activations", 1),
    ("loss", ["training.per_device_eval_batch_size=64"], "activations", 1),
    ("evaluation", ["training.per_device_train_batch_size=8"], "workspace", 1),
    ("backward", ["lora.lora_dropout=0"], "activations", "<"),
    ("evaluation", ["training.fused_lora=true", "training.fused_kernels=true"], "activations", 1),
    ("loss", ["training.fused_lora=true"], "lora", 8 / 10),  # no copy of the weights in bfloat16
]


@pytest.mark.parametrize(("moment", "settings", "part", "factor"), LEVERS, ids=lambda value: str(value))
def test_each_lever_moves_its_part_of_the_memory_and_no_other(
    moment: str, settings: list[str], part: str, factor: float | str
) -> None:
    before, after = at(moment), at(moment, *settings)
    if isinstance(factor, str):
        assert after[part] > before[part] if factor == ">" else after[part] < before[part]
    else:
        assert after[part] == pytest.approx(factor * before[part])
    assert {**after, part: 0} == {**before, part: 0}


def test_adapter_and_optimizer_grow_with_the_rank() -> None:
    before, after = at("loss"), at("loss", "lora.r=32")
    assert (after["lora"], after["optimizer"]) == pytest.approx((2 * before["lora"], 2 * before["optimizer"]))


def test_activations_grow_with_the_tokens_of_a_micro_batch() -> None:
    before = at("backward")["activations"]
    assert at("backward", "training.per_device_train_batch_size=8")["activations"] == pytest.approx(2 * before)
    assert at("backward", "model.max_seq_length=2048")["activations"] == pytest.approx(before / 2)


def test_double_quantization_saves_about_0_4_bit_a_weight_and_only_where_nf4_is_kept() -> None:
    double, single = (at("loss", f"quantization.bnb_4bit_use_double_quant={on}")["weights"] for on in ("true", "false"))
    assert (single - double) * GIB * 8 / LINEAR == pytest.approx(0.373, abs=0.001)
    expanded = "quantization.storage=expanded"
    on, off = (at("loss", expanded, f"quantization.bnb_4bit_use_double_quant={on}") for on in ("true", "false"))
    assert on == off


def test_tied_embeddings_are_counted_once() -> None:
    tied = dataclasses.replace(MISTRAL_7B, tie_word_embeddings=True)
    two, one = (moments(load(), geometry)["loss"] for geometry in (MISTRAL_7B, tied))
    assert (two["weights"] - one["weights"]) * GIB == pytest.approx(2 * EMBEDDING)
    assert {**two, "weights": 0} == {**one, "weights": 0}


FUSED = "training.fused_lora=true", "training.fused_kernels=true"


@pytest.mark.parametrize(
    ("platform", "settings", "tokens", "a_token", "weights"),
    [
        # norms 2 x 4h; q, k, v, result 2(2h + 2k); MLP 3 x 2i; dropout 3 bytes for each of 6h + i; lora_A 7 x 2r
        ("h100", (), 4 * 4096, 8 * 4096 + 4 * 5120 + 6 * 14336 + 3 * (6 * 4096 + 14336) + 14 * 16, 0),
        # norms 2 x 2h; q, k, v, result 2(2h + 2k); MLP 2 x 2i; LoRA's inputs 2(h + h + i), and 7 x 2r
        ("h100", FUSED, 4 * 4096, 4 * 4096 + 4 * 5120 + 4 * 14336 + 2 * (2 * 4096 + 14336) + 14 * 16, 0),
        # norms 2 x 4h; q, k, v 3 x 4h; MLP 3 x 2i; dropout 4 + 2 bytes for each of 6h + i; lora_A 7 x 2r
        ("m4", (), 2048, 20 * 4096 + 6 * 14336 + 6 * (6 * 4096 + 14336) + 14 * 16, 4 * 32 * 2048**2),
    ],
    ids=["H100", "H100, fused", "MPS, attention and dropout in float32"],
)
def test_a_layer_of_mistral_7b_keeps_what_is_counted_by_hand(
    platform: str, settings: tuple[str, ...], tokens: int, a_token: int, weights: int
) -> None:
    config = load("training.gradient_checkpointing=false", *settings, platform=platform)
    one, two = (
        moments(config, dataclasses.replace(MISTRAL_7B, num_hidden_layers=layers))["loss"]["activations"]
        for layers in (1, 2)
    )
    assert (two - one) * GIB == tokens * a_token + weights


def test_with_checkpointing_a_layer_keeps_its_input_until_its_backward() -> None:
    parts, last = at("loss"), at("backward")
    tokens, ends = 4 * 4096, 4096 * 6 + 2 * 128 * 2
    assert parts["activations"] * GIB == tokens * (32 * 4096 * 2 + ends)
    assert last["activations"] * GIB == tokens * (32 * 4096 * 2 + ends + 256_224)


def test_layers_that_are_not_checkpointed_keep_everything() -> None:
    every, some = at("loss"), at("loss", "training.checkpointed_layers=24")
    tokens, layer = 4 * 4096, 256_224
    assert some["activations"] * GIB == every["activations"] * GIB + 8 * tokens * (layer - 4096 * 2)
    last = at("backward", "training.checkpointed_layers=24")
    assert last["activations"] == some["activations"]  # the last layer is one of the eight
    assert {**some, "activations": 0} == {**every, "activations": 0}


def test_auto_counts_as_all_layers_since_only_memory_to_spare_makes_them_fewer() -> None:
    assert (
        at("loss", "training.checkpointed_layers=auto") == at("loss", "training.checkpointed_layers=32") == at("loss")
    )


def test_triton_scores_logits_inside_its_tile_and_torch_in_seven_float32_copies() -> None:
    tile = 4096 * 32768 * 2
    states = 4 * 4096 * 4096 * (2 + 4)  # the supervised ones, and their gradient in float32
    assert at("loss")["logits"] * GIB == tile + states
    short = 2048 * (32768 * 2 + 7.25 * 4 * 32000) + 2048 * 4096 * 4
    assert at("loss", platform="m4")["logits"] * GIB == short


def test_sdpa_pays_for_a_mask_of_all_pairs_of_tokens_where_rows_are_packed_or_padded() -> None:
    sdpa = "model.attn_implementation=sdpa"
    pairs = 4 * 4096**2 / GIB  # of four sequences, each a row
    assert "attention_mask" not in at("backward")
    assert at("loss", sdpa)["attention_mask"] == pairs  # a byte each; the checkpointed layers keep none
    assert at("backward", sdpa)["attention_mask"] == 3 * pairs  # and one in bfloat16
    assert at("backward", sdpa, "training.gradient_checkpointing=false")["attention_mask"] == 65 * pairs
    assert at("backward", sdpa, "training.packing=false")["attention_mask"] == 3 * pairs
    alone = "training.per_device_train_batch_size=1"
    assert "attention_mask" not in at("backward", sdpa, alone, "training.packing=false")


def test_torch_varlen_has_no_mask_but_keys_and_values_for_every_head() -> None:
    varlen = "model.attn_implementation=torch_varlen"
    found, flash = at("backward", varlen), at("backward")
    assert "attention_mask" not in found
    repeated = (found["activations"] - flash["activations"]) * GIB
    assert repeated == pytest.approx(4 * 4096 * 2 * (4096 - 1024) * 2)  # of the one layer that is kept, in bfloat16
    assert at("evaluation", varlen) == at("evaluation", "model.attn_implementation=sdpa")


def test_mps_keeps_the_attention_weights_in_float32() -> None:
    short, long = (at("backward", f"model.max_seq_length={length}", platform="m4") for length in (1024, 2048))
    weights = 4 * 32 * (2048**2 - 2 * 1024**2)  # what grows with the square
    assert (long["activations"] - 2 * short["activations"]) * GIB == pytest.approx(weights)


def test_the_interpreter_counts_where_memory_is_the_machines_own() -> None:
    assert "program" not in at("loss")
    assert at("loss", platform="m4")["program"] == 0.56


def test_the_demos_expected_peak_is_within_a_tenth_of_every_resident_peak_measured() -> None:
    demo = load_benchmark().DEMO
    expected = peak_gib(load("model.name=mistralai/Mistral-7B-Instruct-v0.2", platform="cpu"), demo)
    (resident,) = sorted(RESULTS.glob("*-resident-*.json"))[-1:]
    (quickstart,) = sorted(RESULTS.glob("*-quickstart-*.json"))[-1:]
    runs = [read_json(quickstart)[name]["run"]["peak_memory_gib"] for name in ("first", "again")]
    for measured_gib in (read_json(resident)["resident"]["resident_gib"], *runs):
        assert expected == pytest.approx(measured_gib, rel=0.1)


def test_the_peak_is_the_largest_moment_and_all_its_parts_are_named() -> None:
    for settings in ([], ["training.gradient_checkpointing=false"], ["training.per_device_eval_batch_size=64"]):
        found = load(*settings)
        sums = {name: sum(parts.values()) for name, parts in moments(found, MISTRAL_7B).items()}
        assert peak_gib(found, MISTRAL_7B) == max(sums.values())
        assert list(memory_parts(found, MISTRAL_7B)) == [
            *("weights", "lora", "optimizer", "activations", "logits", "workspace")
        ]


def test_a_large_evaluation_batch_is_the_peak() -> None:
    found = moments(load("training.per_device_eval_batch_size=64"), MISTRAL_7B)
    assert max(found, key=lambda name: sum(found[name].values())) == "evaluation"
