"""The element-wise parts of Mistral's layers as compiled functions: RMSNorm, SwiGLU and the rotary embedding.

Each is one kernel forward and one backward (Triton on an NVIDIA GPU, C++ on a CPU) where torch otherwise reads and
writes memory for every operation. The formulas are transformers'; results differ in rounding only. In training alone:
evaluation and answers go transformers' own way. transformers' `use_kernels` would need the `kernels` package and fetch
binaries from the Hub when a run starts, and has none for a CPU, where these are tested.
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

# From the first call on sizes are symbols, and kernels are not chosen by stop-watch: what a run computes must not
# depend on the length of its first batch, or a resumed run would differ from an uninterrupted one.
_compiled = partial(torch.compile, dynamic=True, fullgraph=True, options={"deterministic": True})

# Enough that the kernels are made for many tokens (on a CPU, for several cores), and no other size in a model: torch
# takes sizes that are equal in the first call for one and the same.
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
    """Let the layers of `model` compute so in training, under autocast if `bf16`. Raises CheckFailed where they cannot.

    Everything is compiled here, not in the first step: a missing compiler is told at once, and for one length always.
    """
    if model.config.model_type != "mistral" or model.config.hidden_act != "silu":
        found = f"a {model.config.model_type} model with {model.config.hidden_act}, wanted mistral with silu"
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
    # Tokens in one dimension: for a batch of one row torch would compile apart from others.
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
    """transformers looks its function up in its module, so it is replaced while this model's attention runs."""
    mistral.apply_rotary_pos_emb = _rotate
    try:
        return plain(*args, **options)
    finally:
        mistral.apply_rotary_pos_emb = rotate_plain


def _compile_all(model: PeftModel, bf16: bool) -> None:
    """One decoder layer forward and backward, on one row: tensors and autocast are what they are in training."""
    decoder = model.get_base_model().model
    x = torch.zeros(1, FIRST_TOKENS, model.config.hidden_size, dtype=model.dtype, device=model.device)
    angles = decoder.rotary_emb(x, torch.arange(FIRST_TOKENS, device=model.device)[None])
    training = decoder.training
    with torch.random.fork_rng(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        y = decoder.train().layers[0](x.requires_grad_(), position_embeddings=angles)
    torch.autograd.grad(y.sum(), x)  # of x alone, so that no weight gets a gradient
    decoder.train(training)
