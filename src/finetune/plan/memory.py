"""The memory that training takes, by part and by arithmetic.

Counts the tensors that autograd keeps for transformers' MistralDecoderLayer with PEFT's LoRA, TRL's tiled loss and
bitsandbytes' NF4. benchmarks/memory.py compares each moment with what torch allocates. Only platform cpu in float32 has
been measured so far; bfloat16, flash-attn, CUDA and MPS are counted in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.files import GIB
from finetune.machine.platforms import PLATFORMS, Platform, lays_flat
from finetune.plan.model_shape import Geometry

if TYPE_CHECKING:
    from finetune.config.schema import Config

BYTES = {"bfloat16": 2, "float32": 4}
PARTS = ("weights", "lora", "optimizer", "activations", "attention_mask", "logits", "workspace", "program")
ONLY_WHERE_THEY_APPLY = ("attention_mask", "program")

# TRL projects 4,096 tokens on 32,768 entries of the vocabulary at a time (TOKEN_CHUNK_SIZE in trl/kernels and
# _CHUNKED_LOGPROB_CHUNK_SIZE in trl/trainer/utils.py, 1.16); its buffer has that width whatever the vocabulary's.
TILE_TOKENS, TILE_VOCABULARY = 4096, 32768

# fused_lora generates dropout's noise for this many tokens at once: 59 MB at 14,336 features in bfloat16, instead of
# 470 for all of 4 x 4,096 tokens. Expected to be enough work to fill a GPU; not measured. On an NVIDIA GPU the noise is
# never stored; there, the unpacked weight, which is twice as large, determines the peak.
NOISE_TOKENS = 2048

# float32 copies of a tile's logits that exist at once in TRL's torch code. Backward: scaled, transformed, log p, p,
# gradient, target as float, their difference, and the target as bool (a byte). Forward: transformed, shifted,
# exponential, and a bool mask. Its Triton kernels, on CUDA, work inside the buffer.
TILE_COPIES_BACKWARD, TILE_COPIES_FORWARD = 7.25, 3.25


@dataclass(frozen=True)
class Batch:
    """A batch of `rows` rows of `length` tokens, including padding.

    `packed`: each row has several conversations that must not see each other.
    """

    rows: int
    length: int
    packed: bool = False

    @property
    def tokens(self) -> int:
        """Number of tokens, including padding."""
        return self.rows * self.length

    @property
    def pairs(self) -> int:
        """Number of pairs of tokens: the size of a mask, and of one head's attention weights."""
        return self.rows * self.length**2


def checkpointed_layers(config: Config, geometry: Geometry) -> int:
    """How many of the first layers keep only their input; `auto` counts as all, which takes least memory."""
    asked = config.training.checkpointed_layers
    if not config.training.gradient_checkpointing:
        return 0
    return asked if isinstance(asked, int) else geometry.num_hidden_layers


def lora_parameters(config: Config, geometry: Geometry) -> int:
    """r x (in + out) for each target layer (Hu et al. 2021, section 4.1)."""
    shapes = geometry.linear_shapes()
    features = sum(sum(shapes[name]) for name in config.lora.target_modules)
    return config.lora.r * features * geometry.num_hidden_layers


def peak_gib(config: Config, geometry: Geometry) -> float:
    """Expected peak memory of a run, GiB: the sum of `memory_parts`."""
    return sum(memory_parts(config, geometry).values())


def memory_parts(config: Config, geometry: Geometry) -> dict[str, float]:
    """Memory at the peak by part, GiB; 0 for parts that do not exist at that moment.

    `attention_mask` and `program` are included only if they apply.
    """
    return max(moments(config, geometry).values(), key=lambda parts: sum(parts.values()))


def moments(config: Config, geometry: Geometry) -> dict[str, dict[str, float]]:
    """Memory by part at three moments, one of which is the peak, GiB.

    `loss`: all that the forward pass keeps, and TRL's tile of logits. `backward`: what the forward pass keeps, the last
    layer's activations even if it is checkpointed, and its backward's workspace; layers kept in full are last, so they
    are freed before a checkpointed one is recomputed. `evaluation`: a batch of per_device_eval_batch_size rows padded
    to max_seq_length; nothing is kept, and there are no gradients.
    """
    sizes = _Sizes(config, geometry)
    training, evaluation = sizes.training_batch(), sizes.evaluation_batch()
    full = geometry.num_hidden_layers - checkpointed_layers(config, geometry)  # layers that keep everything
    live = max(full, 1)
    kept, last = sizes.kept(training, full), sizes.kept(training, live)
    found = {
        "loss": {
            "activations": kept,
            "attention_mask": sizes.mask(training, full),
            "logits": sizes.training_logits(training),
        },
        "backward": {
            "activations": last,
            "attention_mask": sizes.mask(training, live),
            "workspace": sizes.backward_workspace(training),
        },
        "evaluation": sizes.evaluation(evaluation),
    }
    return {name: sizes.named(name, parts) for name, parts in found.items()}


@dataclass(frozen=True)
class _Sizes:
    """Bytes of each part for one config and geometry; see `moments`."""

    config: Config
    geometry: Geometry

    @property
    def width(self) -> int:
        return BYTES[self.config.model.dtype]

    @property
    def lora_width(self) -> int:
        """Bytes of LoRA's compute dtype: autocast's bfloat16, else float32 like its weights."""
        return 2 if self.config.training.bf16 else 4

    @property
    def packed_weights(self) -> bool:
        return self.config.quantization.storage == "packed"

    @property
    def platform(self) -> Platform:
        return PLATFORMS[self.config.platform]

    @property
    def fused_lora(self) -> bool:
        """`auto` counts as off, which takes more."""
        return self.config.training.fused_lora is True

    @property
    def fused_kernels(self) -> bool:
        """`auto` counts as off."""
        return self.config.training.fused_kernels is True

    @property
    def norm_width(self) -> int:
        """Bytes of what a norm keeps of its input: a float32 copy, or with fused_kernels the input itself."""
        return self.width if self.fused_kernels else 4

    @property
    def mlp_results(self) -> int:
        """How many results the MLP keeps: of gate_proj, up_proj and, unless fused, the activation function."""
        return 2 if self.fused_kernels else 3

    def training_batch(self) -> Batch:
        """Packed sequences are laid end to end in a single row, except with sdpa."""
        rows, length = self.config.training.per_device_train_batch_size, self.config.model.max_seq_length
        packed = self.config.training.packing
        flat = packed and lays_flat(self.config.model.attn_implementation)
        return Batch(1, rows * length, packed) if flat else Batch(rows, length, packed)

    def evaluation_batch(self) -> Batch:
        return Batch(self.config.training.per_device_eval_batch_size, self.config.model.max_seq_length)

    def named(self, moment: str, parts: dict[str, float]) -> dict[str, float]:
        """`parts` and what exists at every moment, GiB, in the order of PARTS."""
        always = {"weights": self.weights(), "lora": self.lora(moment), "optimizer": self.optimizer()}
        always["program"] = self.platform.program_gib * GIB
        sizes = dict.fromkeys(PARTS, 0.0) | parts | always
        return {name: sizes[name] / GIB for name in PARTS if sizes[name] or name not in ONLY_WHERE_THEY_APPLY}

    def weights(self) -> float:
        """The frozen base.

        NF4 takes half a byte a weight and one scale per 64 weights: 4 bytes, or with double quantization 1 byte and 4
        more per 256 scales (Dettmers et al. 2023, section 3). Embeddings are not quantized.
        """
        geometry, double = self.geometry, self.config.quantization.bnb_4bit_use_double_quant
        linear = sum(inputs * outputs for inputs, outputs in geometry.linear_shapes().values())
        scale_bytes = 1 / 64 + 4 / (64 * 256) if double else 4 / 64
        per_weight = 0.5 + scale_bytes if self.packed_weights else self.width
        embeddings = geometry.vocab_size * geometry.hidden_size * (1 if geometry.tie_word_embeddings else 2)
        return linear * geometry.num_hidden_layers * per_weight + embeddings * self.width

    def lora(self, moment: str) -> float:
        """float32 weights, autocast's bfloat16 copy, and the gradients of earlier micro-batches.

        With fused_lora each layer makes its own copy, except in evaluation.
        """
        training = self.config.training
        gradients = moment != "evaluation" and training.gradient_accumulation_steps > 1
        copy = 2 if training.bf16 and (moment == "evaluation" or not self.fused_lora) else 0
        return lora_parameters(self.config, self.geometry) * (4 + copy + (4 if gradients else 0))

    def optimizer(self) -> float:
        """AdamW's two moments (Loshchilov and Hutter 2019): 4 bytes each, or 1 in the 8-bit optimizer.

        Paged ones count in full. What a rehearsal leaves behind does not count: it is unused, so it can be paged out.
        """
        moments = 2 if self.config.training.optim == "paged_adamw_8bit" else 8
        return lora_parameters(self.config, self.geometry) * moments

    def masked(self, batch: Batch) -> bool:
        """Whether SDPA gets a mask: if packed rows share a sequence, or several rows are padded to the longest.

        torch_varlen uses SDPA for padded rows.
        """
        attention = self.config.model.attn_implementation
        return attention != "flash_attention_2" and (batch.rows > 1 or (batch.packed and not lays_flat(attention)))

    def mask(self, batch: Batch, layers: int) -> float:
        """A byte per pair of tokens, and the mask in the model's dtype, which each layer keeps for its backward."""
        if not self.masked(batch):
            return 0
        return batch.pairs * (1 + self.width * (1 if self.platform.keeps_attention_weights else layers))

    def kept(self, batch: Batch, full: int) -> float:
        """What the forward pass keeps: everything of `full` layers, and the input of checkpointed ones.

        Outside the layers: what the last norm keeps, its output, and the rotary embedding's sines and cosines. The
        first layer's input has no gradient, so its norm and the dropout of its queries, keys and values keep nothing.
        """
        hidden, heads = self.geometry.hidden_size, self.geometry.num_attention_heads
        ends: float = hidden * (self.norm_width + self.width) + 2 * hidden // heads * self.width
        if self.config.training.gradient_checkpointing:
            ends += checkpointed_layers(self.config, self.geometry) * hidden * self.width
        else:
            ends -= hidden * self.norm_width + self.noise_a_token(("q_proj", "k_proj", "v_proj"))
        return batch.tokens * (ends + full * self.kept_a_token(batch)) + full * self.attention_weights(batch)

    def kept_a_token(self, batch: Batch) -> float:
        """Bytes per token that one layer keeps for its backward.

        The rotary embedding and the frozen base's projections keep nothing.
        """
        hidden, intermediate = self.geometry.hidden_size, self.geometry.intermediate_size
        norms, mlp = 2 * hidden * self.norm_width, self.mlp_results * intermediate * self.width
        return norms + self.attention_a_token(batch) + mlp + self.lora_a_token()

    def attention_a_token(self, batch: Batch) -> float:
        """Queries, keys, values and result; keys and values repeated per head if there is a mask or torch_varlen.

        If attention weights are kept: in float32, without the result.
        """
        hidden = self.geometry.hidden_size
        keys = self.geometry.linear_shapes()["k_proj"][1]
        if self.platform.keeps_attention_weights:
            return 3 * hidden * 4
        # torch 2.10 needs as many heads of keys as of queries
        repeated = self.masked(batch) or self.config.model.attn_implementation == "torch_varlen"
        return (2 * hidden + 2 * (hidden if repeated else keys)) * self.width

    def attention_weights(self, batch: Batch) -> float:
        """SDPA's softmax, float32, one value per head and pair of tokens, if it keeps it."""
        return 4 * self.geometry.num_attention_heads * batch.pairs if self.platform.keeps_attention_weights else 0

    def noise_a_token(self, names: Iterable[str]) -> float:
        """Bytes per token that dropout keeps before the targets among `names`.

        A byte per feature on CUDA; elsewhere its noise in the input's dtype, which PEFT makes float32. With fused_lora,
        only a seed from which to generate it again.
        """
        lora, shapes = self.config.lora, self.geometry.linear_shapes()
        if lora.lora_dropout == 0 or self.fused_lora:
            return 0
        noise = 1 if self.platform.nvidia else 4
        return sum(shapes[name][0] for name in names if name in lora.target_modules) * noise

    def lora_a_token(self) -> float:
        """Bytes per token for all target layers: input, what dropout keeps, and the result of lora_A.

        Without dropout and cast, or with fused_lora, layers that read the same tensor keep it once, and o_proj's is
        kept anyway. PEFT casts to float32, except for bitsandbytes' layers with CUDA's autocast.
        """
        lora, shapes = self.config.lora, self.geometry.linear_shapes()
        targets = set(lora.target_modules)
        reduced = len(targets) * lora.r * self.lora_width
        as_it_is = lora.lora_dropout == 0 and (self.lora_width == 4 or (self.packed_weights and self.platform.nvidia))
        if as_it_is or self.fused_lora:
            readers = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"down_proj"})
            inputs = sum(shapes[max(group)][0] for group in readers if group & targets)
        else:
            inputs = sum(shapes[name][0] for name in targets)
        return reduced + inputs * self.lora_width + self.noise_a_token(targets)

    def tile_logits(self, batch: Batch, copies: float) -> float:
        """TRL's tile of logits in the compute dtype, and `copies` of it in float32 without Triton."""
        tokens = min(batch.tokens, TILE_TOKENS)
        vocabulary = min(self.geometry.vocab_size, TILE_VOCABULARY)
        return tokens * (TILE_VOCABULARY * self.width + (0 if self.platform.nvidia else 4 * copies * vocabulary))

    def training_logits(self, batch: Batch) -> float:
        """The tile in the loss's backward, and the gradient of the last hidden states, summed in float32.

        With several rows, the copied states (see `evaluation`) replace the states, which are freed by then; on a GPU,
        where that is not measured, both are counted.
        """
        states = batch.tokens * self.geometry.hidden_size
        return self.tile_logits(batch, TILE_COPIES_BACKWARD) + states * (4 + self.platform.nvidia * self.width)

    def dequantized(self) -> float:
        """The largest weight, unpacked for one product, with a float32 scale per 64 weights."""
        hidden, intermediate = self.geometry.hidden_size, self.geometry.intermediate_size
        return hidden * intermediate * (self.width + 4 / 64) if self.packed_weights else 0

    def backward_workspace(self, batch: Batch) -> float:
        """Workspace of the last layer's backward: the largest of three moments.

        The adapter of down_proj: the gradients of the hidden states and of the adapter's input. down_proj itself: the
        unpacked weight and two gradients of its input, after what its adapter and the last norm kept is freed.
        Attention weights: their gradient and that of the scores, after what the MLP kept is freed.
        """
        hidden, intermediate = self.geometry.hidden_size, self.geometry.intermediate_size
        adapted = "down_proj" in self.config.lora.target_modules
        kept = intermediate * self.lora_width + self.noise_a_token(("down_proj",)) if adapted else 0
        adapter = batch.tokens * (hidden + intermediate) * self.width
        base = batch.tokens * (intermediate * self.width * (1 + adapted) - kept - self.norm_width * hidden)
        base += self.dequantized()
        if adapted and self.fused_lora:
            base = self.fused_backward(batch)
            adapter = 0
        attention = 2 * self.attention_weights(batch) - self.mlp_results * intermediate * self.width * batch.tokens
        return max(adapter, base, attention)

    def fused_backward(self, batch: Batch) -> float:
        """Workspace of down_proj with fused_lora: a gradient of its input, and the unpacked weight or twice the noise.

        What the last norm kept is freed. A checkpointed layer's input is what its first norm keeps, if not a copy.
        """
        hidden, intermediate = self.geometry.hidden_size, self.geometry.intermediate_size
        same = self.config.training.gradient_checkpointing and self.norm_width == self.width
        gone = hidden * self.norm_width * (2 if same else 1)
        noisy_tokens = min(batch.tokens, NOISE_TOKENS) if self.config.lora.lora_dropout else 0
        noise = 2 * noisy_tokens * intermediate * self.width
        return batch.tokens * (intermediate * self.width - gone) + max(self.dequantized(), noise)

    def evaluation(self, batch: Batch) -> dict[str, float]:
        """By part, the largest of three moments: one layer's MLP, its attention, and the loss.

        Loss: the tile, and a copy of the last hidden states if some tokens are left out of them.
        MLP: the activation function's result and three of up_proj (the base's, the adapter's and their sum), or two
        and the unpacked weight; the residual and the norm's output. Attention: residual, queries, keys and values,
        repeated, their result.
        """
        hidden, intermediate = self.geometry.hidden_size, self.geometry.intermediate_size
        a_feature = batch.tokens * self.width
        mlp = a_feature * 2 * (hidden + intermediate) + max(2 * intermediate * a_feature, self.dequantized())
        attention = a_feature * 7 * hidden + 2 * self.attention_weights(batch)
        states = batch.tokens * hidden * self.width
        copied = self.platform.nvidia or batch.rows > 1
        logits = self.tile_logits(batch, TILE_COPIES_FORWARD) + copied * states
        largest = max(mlp, attention, logits)
        return {
            "activations": states,
            "attention_mask": self.mask(batch, 1 if largest == attention else 0),
            **({"logits": largest} if largest == logits else {"workspace": largest}),
        }
