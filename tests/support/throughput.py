"""An entry of a result file."""

from __future__ import annotations

ENTRY = {
    "platform": "h100", "hidden_size": 4096, "num_hidden_layers": 32, "max_seq_length": 4096, "packing": True,
    "storage": "packed", "attn_implementation": "flash_attention_2", "gradient_checkpointing": True,
    "checkpointed_layers": 32, "fused_lora": False, "fused_kernels": False, "tokens_per_second": 3000.0,
    "eval_tokens_per_second": 9000.0,
}  # fmt: skip
