"""What libraries compute on a device that is not here, by torch on a CPU: right, and wrong in known ways."""

from __future__ import annotations

import importlib.machinery
import inspect
import itertools
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention
from transformers import modeling_flash_attention_utils, modeling_utils

from finetune.checks.numerics import repeat


def attention(q: Any, k: Any, v: Any, causal: bool = True) -> Any:
    """Over one sequence, [tokens, heads, dimension], in fp32."""
    q, k, v = (value.float().transpose(0, 1)[None] for value in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)[0].transpose(0, 1)


def by_document(q: Any, k: Any, v: Any, bounds: Any, *_: Any, causal: bool) -> Any:
    """Each document sees itself alone, as it should be."""
    lengths = torch.diff(bounds).tolist()
    documents = zip(*(torch.split(value, lengths) for value in (q, k, v)), strict=True)
    return torch.cat([attention(*document, causal=causal) for document in documents]).to(q.dtype)


def across_documents(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> Any:
    """Documents see those before them, as with a build that ignores the bounds."""
    return attention(q, k, v).to(q.dtype)


def install_flash_attn(patch: pytest.MonkeyPatch, function: Callable[..., Any] | None) -> None:
    """A module flash_attn with this function, which transformers takes on a CPU too; None: it is not installed.

    Its arguments are as those of 2.8.3. As there, the gradient of queries is another each time unless `deterministic`.
    """
    if function is None:
        patch.setitem(sys.modules, "flash_attn", None)
        return

    def flash(
        q: Any,
        k: Any,
        v: Any,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        max_seqlen_q: int,
        max_seqlen_k: int,
        causal: bool = False,
        deterministic: bool = False,
        **_: Any,
    ) -> Any:
        q = q if deterministic else Unordered.apply(q)
        return function(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=causal)

    module: Any = ModuleType("flash_attn")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    module.flash_attn_varlen_func = flash
    patch.setitem(sys.modules, "flash_attn", module)
    patch.setattr(modeling_utils.PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True)
    patch.setattr(modeling_flash_attention_utils, "_lazy_imports", lambda *_, **__: (None, flash, None, None, None))
    patch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)


def small(patch: pytest.MonkeyPatch) -> None:
    """A layer and documents of a size for a CPU, in the check of repeated bits."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    patch.setattr(repeat, "SHAPE", {"hidden_size": 64, "intermediate_size": 128, **heads})
    patch.setattr(repeat, "DOCUMENTS", (3, 5))
    patch.setattr(repeat, "PASSES", 2)


class Unordered(torch.autograd.Function):
    """Its input forward; backward a gradient whose last bit differs from call to call, as of a sum by atomicAdd."""

    calls = itertools.count()

    @staticmethod
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * (1 + 2**-8 * (next(Unordered.calls) % 2))


def keep_no_random_numbers(patch: pytest.MonkeyPatch) -> None:
    """torch's checkpoint keeps no random numbers for a layer that is computed again, as on MPS (2.14.1)."""
    patch.setattr(modeling_utils, "checkpoint", partial(modeling_utils.checkpoint, preserve_rng_state=False))


def write_side_by_side(patch: pytest.MonkeyPatch) -> None:
    """Products that torch.mm writes to `out` ignore its strides, as reported of MPS (pytorch#104832)."""

    def mm(left: Any, right: Any, out: Any) -> None:
        out.zero_().as_strided(out.shape, (out.shape[1], 1)).copy_(left @ right)

    patch.setattr(torch, "mm", mm)


def see_the_future(patch: pytest.MonkeyPatch, with_gradient: bool = False) -> None:
    """Causal attention in bfloat16 sees all tokens, without a gradient or with one (pytorch#195910, of MPS)."""

    def attend(*values: Any, is_causal: bool = False, **how: Any) -> Any:
        wrong = values[0].dtype == torch.bfloat16 and torch.is_grad_enabled() == with_gradient
        return scaled_dot_product_attention(*values, is_causal=is_causal and not wrong, **how)

    patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)


class Deaf(torch.autograd.Function):
    """Its input forward, and no gradient backward."""

    @staticmethod
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(gradient)


def _of_torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):  # type: ignore[no-untyped-def]
    """The arguments of torch 2.10's varlen_attn, which h100.lock has."""


def _of_torch_2_11(  # type: ignore[no-untyped-def]
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    """The arguments of torch 2.11's."""


VARLEN_SIGNATURES = {
    "2.10": inspect.signature(_of_torch_2_10),
    "2.11": inspect.signature(_of_torch_2_11),
    "installed": inspect.signature(varlen.varlen_attn),
}


def install_varlen_attn(
    patch: pytest.MonkeyPatch, torch_version: str = "installed", function: Callable[..., Any] = by_document
) -> list[dict[str, Any]]:
    """This function in place of varlen_attn, which has no CPU kernel. Returns the arguments of its calls.

    A call that the signature does not take, or that torch would refuse, is an error.
    """
    signature, calls = VARLEN_SIGNATURES[torch_version], []

    def varlen_attn(*arguments: Any, **named: Any) -> Any:
        bound = signature.bind(*arguments, **named)
        bound.apply_defaults()
        call = bound.arguments
        calls.append(call)
        assert call["cu_seq_q"].dtype == torch.int32 and call["max_q"] == int(torch.diff(call["cu_seq_q"]).max())
        assert call.get("enable_gqa") or call["query"].shape[1] == call["key"].shape[1], "heads differ"
        causal = call["window_size"] == (-1, 0) if "window_size" in call else call["is_causal"]
        return function(call["query"], call["key"], call["value"], call["cu_seq_q"], causal=causal)

    varlen_attn.__signature__ = signature  # type: ignore[attr-defined]
    patch.setattr(varlen, "varlen_attn", varlen_attn)
    return calls
