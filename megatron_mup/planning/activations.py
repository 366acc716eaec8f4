"""Bytes that one layer and the output layer keep from forward for backward, and what they take while they compute.

The formulas follow `layers/` and `models/recompute.py` line by line; `tests/planning/test_activations.py` compares them
with the tensors that autograd saves. A compiled layer saves what its compiler chooses: here, as PyTorch's partitioner
does, every operand of a matrix product and of attention, but no intermediate of elementwise work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_mup.config import Config
from megatron_mup.planning.cut import Cut

FP32, FLAG = 4, 1
"""Bytes of statistics, and of an element of a mask."""

Kept = Literal["all", "products", "input"]
"""What stays of a layer: all that backward reads; outputs of products, attention and collectives; its input."""


@dataclass(frozen=True)
class _Widths:
    """Channels of one rank: queries, keys (as many as values), the MLP before and after its activation."""

    hidden: int
    query: int
    key: int
    mlp_in: int
    mlp_out: int
    heads: int

    @classmethod
    def of(cls, config: Config, tp: int) -> _Widths:
        model = config.model
        ffn = model.ffn_size // tp
        heads, groups = model.num_attention_heads // tp, model.query_groups // tp
        return cls(
            model.hidden_size,
            heads * model.head_dim,
            groups * model.head_dim,
            2 * ffn if model.swiglu else ffn,
            ffn,
            heads,
        )


@dataclass(frozen=True)
class _LatentWidths:
    """Channels of one rank under latent attention: of all heads' queries (and keys), values, plain keys; of latents."""

    query: int
    value: int
    plain: int
    latents: int
    rotated: int

    @classmethod
    def of(cls, config: Config, tp: int) -> _LatentWidths:
        model = config.model
        heads = model.num_attention_heads // tp
        latents = (model.q_lora_rank or 0) + (model.kv_lora_rank or 0)
        return cls(
            heads * model.head_dim,
            heads * model.value_dim,
            heads * model.qk_head_dim,
            latents,
            model.qk_pos_emb_head_dim,
        )

    def operands(self, config: Config) -> int:
        """What backward of attention reads for each token: queries, keys, values and output, and the latents."""
        # Without a compiler values are a view of what the up projection gave, and alone only where they are repeated.
        view = not (config.training.torch_compile or unfused(config))
        kept = 2 * self.query + 2 * self.value + (self.plain if view else 0)
        return kept + self.latents * (2 if config.model.qk_layernorm else 1)

    def products(self) -> int:
        """What products and attention give for each token."""
        return self.query + self.plain + 2 * self.value + self.latents + self.rotated


def unfused(config: Config) -> bool:
    """Whether attention holds its weights, ``[batch, heads, seq, seq]``."""
    return config.training.attention_backend == "unfused" or config.model.attention_dropout > 0


def layer_bytes(config: Config, cut: Cut, kept: Kept) -> float:
    """Bytes that a layer holds of one micro-batch until its backward.

    Args:
        config: the run's configuration.
        cut: how ranks share it.
        kept: what isn't recomputed.
    """
    size, hidden = cut.compute.itemsize, config.model.hidden_size
    stream = cut.tokens // cut.sequence * hidden
    if kept == "input":
        return stream * size
    if kept == "products":
        return size * (stream + _products(config, cut, stream)) + _statistics(config, cut)
    return size * (2 * stream + _operands(config, cut)) + _statistics(config, cut) + _norm_statistics(config, cut)


def _operands(config: Config, cut: Cut) -> float:
    """Elements, beside the input of each norm, that backward reads."""
    model, widths = config.model, _Widths.of(config, cut.tp)
    compiled = config.training.torch_compile
    rotated = model.position_embedding_type == "rope"
    if model.multi_latent_attention:
        attention = _LatentWidths.of(config, cut.tp).operands(config)
    elif unfused(config):
        attention = 4 * widths.query  # output, queries, and keys and values repeated for each of these
    else:
        attention = widths.query  # its output
        if compiled or rotated or model.qk_layernorm:
            attention += widths.query + widths.key
        elif model.num_attention_heads != model.query_groups:
            attention += widths.query
        # Values, and what else the fused projection gave: without a compiler values are a view of all of it.
        attention += widths.key if compiled else widths.query + 2 * widths.key
    mlp = widths.mlp_in + widths.mlp_out
    if model.swiglu and not compiled:
        mlp += widths.mlp_out  # silu(gate), beside gate, up and their product
    # Entering a column-parallel layer gathers the sequence, and the layer saves what it gathered.
    return cut.tokens * (2 * widths.hidden + attention + mlp)


def _products(config: Config, cut: Cut, stream: int) -> float:
    """Elements that the outputs of products, attention and collectives have."""
    widths = _Widths.of(config, cut.tp)
    attention = 2 * widths.query + 2 * widths.key
    if config.model.multi_latent_attention:
        attention = _LatentWidths.of(config, cut.tp).products()
    elements = cut.tokens * (attention + 2 * widths.hidden + widths.mlp_in)
    if cut.tp > 1:
        elements += 2 * (cut.tokens * widths.hidden + stream) if cut.sequence > 1 else 2 * cut.tokens * widths.hidden
    return elements


def _statistics(config: Config, cut: Cut) -> float:
    """Bytes that attention and dropout keep beside their operands."""
    model, training = config.model, config.training
    heads, batch, seq = model.num_attention_heads // cut.tp, training.micro_batch_size, training.seq_length
    if unfused(config):
        # Softmax in fp32, its copy for the product with the values, and the mask of dropout.
        held = batch * heads * seq**2 * (FP32 + cut.compute.itemsize * (cut.compute.itemsize < FP32))
        held += FLAG * seq**2 * (not config.data.reset_attention_mask)
        held += batch * heads * seq**2 * (FLAG + FP32) * (model.attention_dropout > 0)
    else:
        held = FP32 * cut.tokens * heads
    if model.hidden_dropout > 0:
        held += 2 * FLAG * cut.tokens // cut.sequence * model.hidden_size
    return held


def _norm_statistics(config: Config, cut: Cut) -> float:
    model = config.model
    numbers = 1 if model.normalization == "RMSNorm" else 2
    rows = 2 * cut.tokens // cut.sequence
    if model.qk_layernorm and model.multi_latent_attention:
        rows += (2 if model.q_lora_rank else 1) * cut.tokens // cut.sequence
    elif model.qk_layernorm:
        rows += cut.tokens * (model.num_attention_heads + model.query_groups) // cut.tp
    return FP32 * numbers * rows


def layer_workspace(config: Config, cut: Cut) -> float:
    """Bytes that a layer's backward takes at its height: gradients around the activation, and of the input."""
    widths = _Widths.of(config, cut.tp)
    copies = 1 if config.training.torch_compile else 2
    work = cut.tokens * (copies * widths.mlp_in + widths.mlp_out + 2 * widths.hidden) * cut.compute.itemsize
    if unfused(config):
        weights = config.training.micro_batch_size * widths.heads * config.training.seq_length**2
        work = max(work, 2 * FP32 * weights)
    return work


def embedding_bytes(config: Config, cut: Cut) -> float:
    """Bytes that the embedding holds of one micro-batch: token ids, and the mask of dropout."""
    ids = 8 * cut.tokens
    dropped = config.model.hidden_dropout > 0
    return ids + FLAG * dropped * cut.tokens // cut.sequence * config.model.hidden_size


def token_info_bytes(config: Config, cut: Cut) -> float:
    """Bytes of rotary angles and masks, once for each stage and micro-batch."""
    model, training = config.model, config.training
    angles = 2 * FP32 * training.seq_length * model.rotary_dim if model.position_embedding_type == "rope" else 0
    if config.data.reset_position_ids:
        angles *= training.micro_batch_size
    windowed = model.window_size is not None and model.window_size < training.seq_length - 1
    if config.data.reset_attention_mask:
        return angles + FLAG * training.micro_batch_size * training.seq_length**2
    if windowed:
        return angles + FLAG * training.seq_length**2
    return angles


def head_bytes(config: Config, cut: Cut) -> float:
    """Bytes that final norm, output layer and loss hold of one micro-batch, logits left out (`loss_bytes`)."""
    stream = cut.tokens // cut.sequence * config.model.hidden_size
    return cut.compute.itemsize * (stream + cut.tokens * config.model.hidden_size) + 26 * cut.tokens


def loss_bytes(config: Config, cut: Cut, vocab_size: int) -> float:
    """Bytes of logits and of what their loss takes at its height, in backward.

    The logits; one fp32 copy on the way to their gradient and its rounded form where this is compiled, two fp32 copies
    where not. Fused with the output layer it is a chunk of them, and gradients that wait for backward.
    """
    size, training, rows = cut.compute.itemsize, config.training, -(-vocab_size // cut.tp)
    if training.cross_entropy_fusion_impl == "linear":
        chunk = min(training.loss_chunk_size, cut.tokens) * rows
        gradients = (cut.tokens * size + rows * (FP32 + size)) * config.model.hidden_size
        return chunk * (2 * size + (0 if training.torch_compile else 2 * FP32)) + gradients
    logits = cut.tokens * rows
    return logits * (size + FP32 + (size if config.training.torch_compile else FP32))
