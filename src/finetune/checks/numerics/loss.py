"""The distance of the loss over the vocabulary, which TRL computes in tiles."""

from __future__ import annotations

import copy

import torch
from transformers import MistralConfig, MistralForCausalLM
from trl.trainer.utils import add_fused_lm_head

from finetune.checks.numerics.compare import distance
from finetune.data.template import IGNORED

WIDTH, TOKENS = 128, 256


def chunked_loss(device: str, dtype: torch.dtype) -> float:
    """Compare TRL's loss and its gradient, as its trainer calls it, with plain cross entropy in fp32 on the CPU.

    Mistral's vocabulary of 32,000 tokens fits one of TRL's tiles of 32,768 columns. TRL uses Triton's kernels on CUDA
    and torch's elsewhere. A third of the labels have no loss. Returns the worse of the two distances.
    """
    shape = MistralConfig(hidden_size=WIDTH, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=0)
    generator = torch.Generator().manual_seed(0)
    plain = MistralForCausalLM(shape)  # a norm and a head
    plain.lm_head.weight.data = torch.randn(shape.vocab_size, WIDTH, generator=generator) * 0.2
    inputs = torch.randn(1, TOKENS, WIDTH, generator=generator)
    labels = torch.randint(shape.vocab_size, (1, TOKENS), generator=generator)
    labels[:, ::3] = IGNORED
    chunked = copy.deepcopy(plain).to(device, dtype)
    add_fused_lm_head(chunked, outputs=("log_probs", "entropy", "is_top1"))

    expected = inputs.clone().requires_grad_()
    reference = plain(inputs_embeds=expected, labels=labels).loss
    reference.backward()
    found = inputs.to(device, dtype, copy=True).requires_grad_()
    loss = chunked(inputs_embeds=found, labels=labels.to(device), fused_lm_head=True).loss
    loss.backward()
    return max(distance(loss, reference), distance(found.grad, expected.grad))
