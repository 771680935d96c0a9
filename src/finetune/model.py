"""The base model in NF4, LoRA on top, and the proof that what was asked for is what was loaded."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch
import transformers
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from finetune import levers
from finetune.config.schema import Config, LoraConfig, ModelConfig, QuantizationConfig, is_local
from finetune.data.tokenizer import Chat
from finetune.errors import CheckFailed
from finetune.files import resolve
from finetune.hub import GIVE_TOKEN, is_cached
from finetune.machine.platforms import quantised_on


def make_tokenizer(chat: Chat, padding_side: str) -> PreTrainedTokenizerFast:
    """The tokenizer object that is saved with the adapter: `chat`'s tokens, control tokens and template."""
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


def load_model(config: Config, device: str) -> PeftModel:
    """What is trained: the base on `device`, and `adapt`. Raises CheckFailed as both do."""
    return adapt(load_base(config.model, config.quantization, device), config)


def adapt(base: PreTrainedModel, config: Config) -> PeftModel:
    """A new adapter on `base`, and what makes their steps faster. Raises CheckFailed where that does not work here."""
    model = add_lora(base, config.lora, config.training.seed)
    levers.install(model, config.training)
    return model


def load_base(model: ModelConfig, quantization: QuantizationConfig, device: str) -> PreTrainedModel:
    """The frozen base on `device`, its decoder's linear layers in NF4, or expanded back from NF4 once.

    Never trusts remote code and never reads pickles. Raises CheckFailed where the weights cannot be had, or where any
    module is not what the config asks for.
    """
    dtype, quantised = getattr(torch, model.dtype), quantised_on(device, quantization.storage)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=quantization.load_in_4bit,
        bnb_4bit_quant_type=quantization.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=getattr(torch, quantization.bnb_4bit_compute_dtype),
    )
    name = str(resolve(model.name)) if is_local(model.name) else model.name
    here = is_local(model.name) or is_cached(model.name, model.revision)
    transformers.utils.logging.disable_progress_bar()
    try:
        base = AutoModelForCausalLM.from_pretrained(
            name,
            revision=model.revision or "main",
            local_files_only=here,  # else a Hub that is silent is asked six times for each file that a base may have
            adapter_kwargs={"local_files_only": here},  # of them adapter_config.json, which it looks for first
            quantization_config=nf4,
            dtype=dtype,
            device_map={"": quantised},  # without it a Mac would silently get the CPU
            attn_implementation=model.attn_implementation,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except OSError as error:
        raise CheckFailed(_no_weights(model.name, error)) from None
    except ImportError as error:
        first = str(error).strip().splitlines()[0]
        advice = "without flash-attn: --set model.attn_implementation=sdpa"
        raise CheckFailed(f"model: {model.name} needs a library that is not installed: {first}\n{advice}") from None
    for module in base.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # In evaluation on a CPU with AVX512-BF16, bitsandbytes repacks the weights for a bf16 kernel, for good:
            # evaluation would compute with other numbers than training.
            module.support_avx512bf16_for_cpu = False
    verify_base(base, model, quantization, quantised, "packed")
    if quantization.storage == "expanded":
        expand(base, dtype, device)
        verify_base(base, model, quantization, device, "expanded")
    return base


def expand(base: PreTrainedModel, dtype: torch.dtype, device: str) -> None:
    """Each NF4 layer of `base` as a plain one on `device` that holds the same values, and all else moved there.

    One layer at a time, unpacked where it is packed, so that the peak is one layer above the final size: transformers'
    `dequantize` holds all packed layers, some 4 GB of a 7B, until the last one is expanded.
    """
    packed_layers = [name for name, module in base.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    for name in packed_layers:
        packed = base.get_submodule(name)
        plain = torch.nn.Linear(packed.in_features, packed.out_features, packed.bias is not None, device="meta")
        plain.weight = torch.nn.Parameter(_unpacked(packed).to(device, dtype), requires_grad=False)
        plain.bias = packed.bias
        base.set_submodule(name, plain)
        del packed.weight  # layer and weight hold each other, and would stay until the next garbage collection
    base.hf_quantizer.remove_quantization_config(base)
    base.to(device)


def _unpacked(layer: Any) -> Any:
    return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def _no_weights(name: str, error: OSError) -> str:
    first = str(error).splitlines()[0]
    if is_local(name):
        return f"model: {name} cannot be loaded: {first}"
    return (
        f"model: {name} cannot be fetched: {first}\n"
        f"Accept its terms at https://huggingface.co/{name} once, then {GIVE_TOKEN}; or put its files in a folder "
        "and type --set model.name=FOLDER"
    )


def verify_base(
    base: PreTrainedModel, model: ModelConfig, quantization: QuantizationConfig, device: str, storage: str
) -> None:
    """Compare every parameter and linear layer with the config; a silent downgrade raises CheckFailed naming it.

    `storage` is what the layers should be by now: packed, as they are loaded, or expanded.
    """
    problems = [
        f"{name} is on {parameter.device.type}, wanted {device}"
        for name, parameter in base.named_parameters()
        if parameter.device.type != device
    ]
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear):
            packed = storage == "packed" and name != "lm_head"  # the output layer is never quantised
            wanted_class = bitsandbytes.nn.Linear4bit if packed else torch.nn.Linear
            if type(module) is not wanted_class:
                problems.append(f"{name} is {type(module).__name__}, wanted {wanted_class.__name__}")
            elif packed:
                problems += _packed_problems(name, module, quantization)
    problems += [
        f"{name} has dtype {str(parameter.dtype).removeprefix('torch.')}, wanted {model.dtype}"
        for name, parameter in base.named_parameters()
        if not isinstance(parameter, bitsandbytes.nn.Params4bit) and parameter.dtype != getattr(torch, model.dtype)
    ]
    attention = base.config._attn_implementation
    if attention != model.attn_implementation:
        problems.append(f"attention is {attention}, wanted {model.attn_implementation}")
    if problems:
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckFailed("model: not loaded as the config asks\n  " + "\n  ".join(problems[:10]) + more)


def _packed_problems(name: str, module: Any, wanted: QuantizationConfig) -> list[str]:
    state = module.weight.quant_state
    if state is None:
        return [f"{name} is not quantised, wanted {wanted.bnb_4bit_quant_type}"]
    found = {
        "bnb_4bit_quant_type": state.quant_type,
        "bnb_4bit_use_double_quant": state.nested,
        "bnb_4bit_compute_dtype": str(module.compute_dtype).removeprefix("torch."),
    }
    return [
        f"{name} has {key} {value}, wanted {getattr(wanted, key)}"
        for key, value in found.items()
        if value != getattr(wanted, key)
    ]


def add_lora(base: PreTrainedModel, lora: LoraConfig, seed: int) -> PeftModel:
    """LoRA on `base` with fp32 adapter weights, the same for the same seed whatever happened before."""
    set_seed(seed)
    peft_config = PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=list(lora.target_modules),
        bias=lora.bias,
        task_type=lora.task_type,
    )
    model = get_peft_model(base, peft_config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise CheckFailed(f"model: {name} has dtype {parameter.dtype}, wanted float32 adapter weights")
    return model
