"""Floating point operations of a QLoRA training step, and the share of a device's peak."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.config.schema import Config
from finetune.plan.memory import lora_parameters
from finetune.plan.model_shape import Geometry

# Dense bf16, FLOP/s; NVIDIA's data sheets of the H100 SXM and the H200 SXM state 1,979e12 with sparsity, which is twice
# that. By a part of the name that the driver gives; a PCIe card, whose clock is lower, is called "H100 PCIe".
PEAK_FLOPS = {"H100 80GB HBM3": 989.4e12, "H200": 989.4e12}


def peak_flops(device: str) -> float | None:
    """Return the peak FLOP/s of a device; None if it is not in the table."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in device), None)


def linear_parameters(geometry: Geometry) -> int:
    """Count the weights of the decoder's linear layers, all layers together."""
    return geometry.num_hidden_layers * sum(inputs * outputs for inputs, outputs in geometry.linear_shapes().values())


def attention_flops(geometry: Geometry, lengths: Sequence[int]) -> float:
    """Count the forward pass of causal attention over separate rows of `lengths` tokens, all layers.

    Two products of 2 x length^2 x hidden each, of which the causal mask leaves half.
    """
    return 2.0 * geometry.num_hidden_layers * geometry.hidden_size * sum(length * length for length in lengths)


def step_flops(config: Config, geometry: Geometry, lengths: Sequence[int]) -> float:
    """Count one step over those rows: 4 (N_linear + N_head) T + 6 N_lora T + 3 attention.

    The frozen weights take part in the forward pass and in the gradient of their input, 2 FLOPs a weight and token
    each; LoRA's also in their own gradient. Attention's backward pass is twice its forward. Padding is not in T.
    """
    head = geometry.vocab_size * geometry.hidden_size
    frozen, lora = linear_parameters(geometry) + head, lora_parameters(config, geometry)
    return (4 * frozen + 6 * lora) * sum(lengths) + 3 * attention_flops(geometry, lengths)


def recomputed_flops(config: Config, geometry: Geometry, lengths: Sequence[int], layers: int) -> float:
    """Count the forward pass of `layers` checkpointed layers, which is computed twice."""
    weights = linear_parameters(geometry) + lora_parameters(config, geometry)
    forward = 2 * weights * sum(lengths) + attention_flops(geometry, lengths)
    return forward * layers / geometry.num_hidden_layers


def utilization(
    config: Config, geometry: Geometry, lengths: Sequence[int], layers: int, seconds: float, device: str
) -> dict[str, float | None]:
    """Return MFU and HFU of a step that took `seconds`, as fractions; None if the device's peak is unknown.

    HFU adds the recomputation of `layers` checkpointed layers. Neither counts padding.
    """
    peak = peak_flops(device)
    if peak is None:
        return {"mfu": None, "hfu": None}
    needed = step_flops(config, geometry, lengths)
    again = recomputed_flops(config, geometry, lengths, layers)
    return {"mfu": needed / seconds / peak, "hfu": (needed + again) / seconds / peak}
