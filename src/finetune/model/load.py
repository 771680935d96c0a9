"""Loads the base model in NF4, adds LoRA, and verifies both."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerFast

from finetune.config.base_model import is_local
from finetune.config.schema import Config, ModelConfig, QuantizationConfig
from finetune.data.tokenizer import Chat
from finetune.errors import CheckFailed, ConfigError, OutOfResource, UserError
from finetune.files import resolve, shown
from finetune.machine.platforms import quantized_on
from finetune.model import attention, packed_base
from finetune.model.hub import GIVE_TOKEN, is_cached
from finetune.model.load_progress import download_bar, layer_counter, layers_reported
from finetune.model.lora import add_lora, begin_with, install_fused
from finetune.model.verify import verify_base, why_not_compiled
from finetune.wording import SILENT, Report, duration, first_line


def make_tokenizer(chat: Chat, padding_side: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer that is saved with the adapter, with `chat`'s vocabulary, control tokens and template."""
    form = chat.format
    return PreTrainedTokenizerFast(
        tokenizer_object=chat.tokenizer,
        bos_token=form.bos,
        eos_token=form.end,
        pad_token=form.pad,
        unk_token="<unk>" if form.bos else None,
        padding_side=padding_side,
        chat_template=form.template,
    )


def load_model(config: Config, device: str, report: Report = SILENT) -> PeftModel:
    """Load the base on `device` with a new adapter or lora.init_from's, nothing fused yet. Raises CheckFailed."""
    cache = resolve(config.output.dir) / ".cache"
    base = load_base(config.model, config.quantization, device, report, cache)
    model = add_lora(base, config.lora, config.training.seed)
    if config.lora.init_from is not None:
        begin_with(model, resolve(config.lora.init_from))
    return model


def adapt(base: PreTrainedModel, config: Config) -> PeftModel:
    """Add a new adapter and the fused paths of the config. Raises CheckFailed if they do not work here."""
    model = add_lora(base, config.lora, config.training.seed)
    install_fused(model, config.training)
    return model


def load_base(
    model: ModelConfig,
    quantization: QuantizationConfig,
    device: str,
    report: Report = SILENT,
    cache: Path | None = None,
) -> PreTrainedModel:
    """Load the frozen base on `device`, its decoder's linear layers in NF4, or expanded back from NF4.

    `report` gets the progress of download, loading, moving and expanding. A base that the CPU quantizes for another
    device is kept in `cache`. Never trusts remote code and never reads pickles. Raises CheckFailed if the weights are
    not available, or if a module is not what the config asks for.
    """
    attention.register()
    dtype, quantized = getattr(torch, model.dtype), quantized_on(device)
    if cache is None or quantized == device:
        base = _quantized(model, quantization, quantized, report)
    else:
        base = _kept_or_quantized(model, quantization, cache, report)
    for module in base.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # Else bitsandbytes, evaluating on a CPU with AVX512-BF16, repacks the weights for a bf16 kernel for good,
            # and evaluation would compute with other values than training.
            module.support_avx512bf16_for_cpu = False
    verify_base(base, model, quantization, quantized, "packed")
    if quantization.storage == "expanded":
        expand(base, dtype, device, report)
        verify_base(base, model, quantization, device, "expanded")
    elif quantized != device:
        _move(base, device, report)
        verify_base(base, model, quantization, device, "packed")
        _say_how_unpacked(device, report)
    return base


def _say_how_unpacked(device: str, report: Report) -> None:
    reason = why_not_compiled(device)
    if reason is None:
        report.decision("packed layers", f"unpacked on {device} by torch.compile, through bitsandbytes")
        return
    found = f"torch.compile cannot unpack NF4 on {device}, so bitsandbytes unpacks it more slowly: {reason}"
    report.warn(f"{found}; --set quantization.storage=expanded needs neither")


def _options(model: ModelConfig, quantized: str) -> dict[str, Any]:
    return {
        "dtype": getattr(torch, model.dtype),
        "device_map": {"": quantized},  # without it transformers silently uses the CPU on a Mac
        "attn_implementation": model.attn_implementation,
        "use_safetensors": True,
        "trust_remote_code": False,
    }


def nf4_config(quantization: QuantizationConfig) -> BitsAndBytesConfig:
    """Convert `quantization` to transformers' form."""
    return BitsAndBytesConfig(
        load_in_4bit=quantization.load_in_4bit,
        bnb_4bit_quant_type=quantization.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=getattr(torch, quantization.bnb_4bit_compute_dtype),
    )


def _quantized(model: ModelConfig, quantization: QuantizationConfig, device: str, report: Report) -> PreTrainedModel:
    """Load the base from its original weights, quantizing each on `device` as it is read."""
    here = is_local(model.name) or is_cached(model.name, model.revision)
    try:
        with layers_reported(model.name, report):
            return AutoModelForCausalLM.from_pretrained(
                _source(model),
                revision=model.revision or "main",
                local_files_only=here,  # else an unreachable Hub is tried six times per optional file
                adapter_kwargs={"local_files_only": here},  # for adapter_config.json, which it looks for first
                tqdm_class=download_bar(model.name, report),
                quantization_config=nf4_config(quantization),
                **_options(model, device),
            )
    except OSError as error:
        raise _no_weights(model.name, error) from None
    except ImportError as error:
        found = f"model: {model.name} needs a library that is not installed: {first_line(error)}"
        fix = "without flash-attn: --set model.attn_implementation=torch_varlen"
        raise CheckFailed(found, fix, between="\n") from None


def _source(model: ModelConfig) -> str:
    return str(resolve(model.name)) if is_local(model.name) else model.name


def _kept_or_quantized(
    model: ModelConfig, quantization: QuantizationConfig, folder: Path, report: Report
) -> PreTrainedModel:
    """Load the packed base that is kept in `folder`, or quantize it on the CPU and keep it there if possible."""
    started, cache = time.monotonic(), packed_base.cache_in(folder, report)
    here = is_local(model.name) or is_cached(model.name, model.revision)
    base = None if here else _quantized(model, quantization, "cpu", report)  # the key depends on what this downloads

    def fill(entry: Path) -> dict[str, Any]:
        nonlocal base
        if base is None:
            base = _quantized(model, quantization, "cpu", report)
        base.save_pretrained(entry)
        return {"base": model.name, "revision": model.revision}

    try:
        kept, _ = cache.entry(packed_base.key(model, quantization), fill)
    except (ConfigError, OutOfResource, OSError, SafetensorError) as error:  # of the folder, or of a full disk
        why = error.found if isinstance(error, UserError) else first_line(error)
        report.warn(f"the packed base cannot be kept in {shown(folder)} ({why}): each start will quantize it")
        return base if base is not None else _quantized(model, quantization, "cpu", report)
    took = duration(time.monotonic() - started)
    if base is not None:
        report.decision("packed base", f"quantized on the CPU in {took}, and kept in {shown(kept)} for later starts")
        return base
    with layers_reported(model.name, report):
        loaded = AutoModelForCausalLM.from_pretrained(str(kept), local_files_only=True, **_options(model, "cpu"))
    loaded.name_or_path = loaded.config.name_or_path = _source(model)
    took = duration(time.monotonic() - started)
    report.decision("packed base", f"loaded from {shown(kept)} in {took}, not quantized again")
    return loaded


def _move(base: PreTrainedModel, device: str, report: Report) -> None:
    """Move packed `base` to `device`, one layer at a time."""
    packed_layers = [name for name, module in base.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    reach = layer_counter(f"moving NF4 to {device}", packed_layers, report)
    for name in packed_layers:
        reach(name)
        packed = base.get_submodule(name)
        packed.weight = packed.weight.to(device)
    base.to(device)


def expand(base: PreTrainedModel, dtype: torch.dtype, device: str, report: Report = SILENT) -> None:
    """Replace each NF4 layer of `base` by a plain one with the same values, and move everything to `device`.

    Works layer by layer, so the peak is one layer above the final size; transformers' `dequantize` keeps all packed
    layers, about 4 GB of a 7B, until the last one is expanded.
    """
    packed_layers = [name for name, module in base.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    reach = layer_counter("expanding NF4", packed_layers, report)
    for name in packed_layers:
        reach(name)
        packed = base.get_submodule(name)
        plain = torch.nn.Linear(packed.in_features, packed.out_features, packed.bias is not None, device="meta")
        values = bitsandbytes.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state)
        plain.weight = torch.nn.Parameter(values.to(device, dtype), requires_grad=False)
        plain.bias = packed.bias
        base.set_submodule(name, plain)
        del packed.weight  # breaks a reference cycle, so that both are freed now
    base.hf_quantizer.remove_quantization_config(base)
    base.to(device)


def _no_weights(name: str, error: OSError) -> CheckFailed:
    first = first_line(error)
    if is_local(name):
        return CheckFailed(f"model: {name} cannot be loaded: {first}")
    accept = f"Accept its terms at https://huggingface.co/{name} once, then {GIVE_TOKEN}"
    fix = f"{accept}; or put its files in a folder and type --set model.name=FOLDER"
    return CheckFailed(f"model: {name} cannot be fetched: {first}", fix, between="\n")
