"""The element-wise parts of Mistral's layers as compiled functions: RMSNorm, SwiGLU and the rotary embedding.

Each is one kernel forward and one backward (Triton on an NVIDIA GPU, C++ on a CPU) where torch otherwise reads and
writes memory for every operation. The formulas are transformers', and results differ only in rounding. They are used in
training only, not in evaluation or for sample answers. transformers' `use_kernels` would need the `kernels` package,
download binaries from the Hub when a run starts, and has none for a CPU, where these are tested.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException
from transformers.models.mistral import modeling_mistral as mistral

from finetune.errors import CheckFailed
from finetune.wording import first_line

# Sizes are symbolic from the first call, and kernels are not chosen by timing: results must not depend on the length
# of the first batch, or a resumed run would differ from an uninterrupted one.
_compiled = partial(torch.compile, dynamic=True, fullgraph=True, options={"deterministic": True})

# Large enough that kernels are compiled for many tokens (on a CPU, for several cores), and unlike any other size in
# a model, because torch assumes that sizes equal in the first call are always equal.
FIRST_TOKENS = 1021

TURN_OFF = "to train without them: --set training.fused_kernels=false"


@_compiled
def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension (Zhang and Sennrich 2019); x [tokens, hidden]."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(x.dtype)


@_compiled
def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (Shazeer 2020); both [tokens, intermediate]."""
    return torch.nn.functional.silu(gate) * up


# Queries and keys [rows, heads, length, head], cosine and sine [rows or 1, length, head] (Su et al. 2021).
rotate = _compiled(mistral.apply_rotary_pos_emb)
rotate_plain = mistral.apply_rotary_pos_emb


def install(model: PeftModel, bf16: bool) -> None:
    """Replace these parts of `model` in training, under autocast if `bf16`. Raises CheckFailed if that fails.

    Compiles everything now, not in the first step: a missing compiler is reported at once, and the length is fixed.
    """
    if model.config.model_type != "mistral" or model.config.hidden_act != "silu":
        found = f"a {model.config.model_type} model with {model.config.hidden_act}, expected mistral with silu"
        raise CheckFailed(f"fused kernels: {found}", TURN_OFF)
    for module in model.modules():
        if isinstance(module, mistral.MistralRMSNorm):
            module.forward = partial(_norm_forward, module, module.forward)
        elif isinstance(module, mistral.MistralMLP):
            module.forward = partial(_mlp_forward, module, module.forward)
        elif isinstance(module, mistral.MistralAttention):
            module.forward = partial(_attention_forward, module.forward)
    try:
        _compile_all(model, bf16)
    except TorchDynamoException as error:
        cause = error.inner_exception if isinstance(error, BackendCompilerFailed) else error
        reason = f"{type(cause).__name__}: {first_line(cause)}"
        raise CheckFailed(f"fused kernels: torch.compile fails: {reason}", TURN_OFF, between="\n") from None


def _norm_forward(module: Any, plain: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    if not (module.training and x.requires_grad):
        return plain(x)
    # Tokens in one dimension, since torch would compile again for a batch of one row.
    y: torch.Tensor = norm(x.reshape(-1, x.shape[-1]), module.weight, module.variance_epsilon)
    return y.view(x.shape)


def _mlp_forward(module: Any, plain: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    if not module.training:
        return plain(x)
    gate, up = module.gate_proj(x), module.up_proj(x)
    product = swiglu(gate.view(-1, gate.shape[-1]), up.view(-1, up.shape[-1])).view(gate.shape)
    y: torch.Tensor = module.down_proj(product)
    return y


def _rotate(q: torch.Tensor, k: torch.Tensor, *angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rotary: Callable[..., tuple[torch.Tensor, torch.Tensor]] = rotate if q.requires_grad else rotate_plain
    return rotary(q, k, *angles)


def _attention_forward(plain: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Replace the function in transformers' module while this model's attention runs, where it looks it up."""
    mistral.apply_rotary_pos_emb = _rotate
    try:
        return plain(*args, **options)
    finally:
        mistral.apply_rotary_pos_emb = rotate_plain


def _compile_all(model: PeftModel, bf16: bool) -> None:
    """Run one decoder layer forward and backward on one row, with the dtypes and autocast of training."""
    decoder = model.get_base_model().model
    x = torch.zeros(1, FIRST_TOKENS, model.config.hidden_size, dtype=model.dtype, device=model.device)
    angles = decoder.rotary_emb(x, torch.arange(FIRST_TOKENS, device=model.device)[None])
    training = decoder.training
    with torch.random.fork_rng(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        y = decoder.train().layers[0](x.requires_grad_(), position_embeddings=angles)
    torch.autograd.grad(y.sum(), x)  # for x only, so that no weight gets a gradient
    decoder.train(training)
