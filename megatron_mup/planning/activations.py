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
        # Values are a view of what the up projection gave, and alone only where they are repeated.
        view = not unfused(config)
        kept = 2 * self.query + 2 * self.value + (self.plain if view else 0)
        return kept + self.latents * (2 if config.model.qk_layernorm else 1)

    def products(self) -> int:
        """What products and attention give for each token."""
        return self.query + self.plain + 2 * self.value + self.latents + self.rotated


def unfused(config: Config) -> bool:
    """Whether attention holds its weights, ``[batch, heads, seq, seq]``."""
    return config.training.attention_backend == "unfused" or config.model.attention_dropout > 0


@dataclass(frozen=True)
class _ExpertWidths:
    """What the experts of a layer are given on one rank, if tokens go to all alike.

    Attributes:
        tokens: that a rank routes.
        rows: assignments.
        gathered: rows that a rank's experts compute with, those of expert tensor ranks among them.
        mlp_in, mlp_out: channels before and after an expert's activation, cut by expert tensor ranks.
        shared_in, shared_out: of shared experts, cut by tensor ranks.
    """

    tokens: int
    rows: int
    gathered: int
    mlp_in: int
    mlp_out: int
    shared_in: int
    shared_out: int

    @classmethod
    def of(cls, config: Config, cut: Cut) -> _ExpertWidths:
        gates, ffn = 2 if config.model.swiglu else 1, config.expert_ffn_size // cut.expert_tensor
        tokens = cut.tokens // cut.sequence
        rows = tokens * config.moe.moe_router_topk
        shared = (config.moe.moe_shared_expert_intermediate_size or 0) // cut.tp
        return cls(tokens, rows, rows * cut.expert_tensor, gates * ffn, ffn, gates * shared, shared)


def layer_bytes(config: Config, cut: Cut, kept: Kept, experts: bool = False) -> float:
    """Bytes that a layer holds of one micro-batch until its backward.

    Args:
        config: the run's configuration.
        cut: how ranks share it.
        kept: what isn't recomputed.
        experts: whether it is a layer with experts.
    """
    size, hidden = cut.compute.itemsize, config.model.hidden_size
    stream = cut.tokens // cut.sequence * hidden
    if kept == "input":
        return stream * size
    held = _statistics(config, cut) + (_routing_bytes(config, cut) if experts else 0.0)
    if kept == "products":
        return size * (stream + _products(config, cut, stream, experts)) + held
    return size * (2 * stream + _operands(config, cut, experts)) + held + _norm_statistics(config, cut)


def _operands(config: Config, cut: Cut, experts: bool) -> float:
    """Elements, beside the input of each norm, that backward reads."""
    model, widths = config.model, _Widths.of(config, cut.tp)
    compiled = config.training.torch_compile
    rotated = model.position_embedding_type == "rope"
    if model.multi_latent_attention:
        attention = _LatentWidths.of(config, cut.tp).operands(config)
    elif unfused(config) and cut.context == 1:
        attention = 4 * widths.query  # output, queries, and keys and values repeated for each of these
    else:
        attention = widths.query  # its output
        if compiled or rotated or model.qk_layernorm:
            attention += widths.query + widths.key
        elif model.num_attention_heads != model.query_groups:
            attention += widths.query
        # Values are a view of all that the fused projection gave.
        attention += widths.query + 2 * widths.key
    if gathers_context(config, cut):
        attention += 2 * widths.key * (cut.context - 1)  # attention saves keys and values of the whole sequence
    # Entering a column-parallel layer gathers the sequence, and the layer saves what it gathered.
    attention += widths.hidden
    # silu(gate), beside gate, up and their product
    eager = 1 if model.swiglu and not compiled else 0
    if not experts:
        return cut.tokens * (attention + widths.hidden + widths.mlp_in + (1 + eager) * widths.mlp_out)
    mlp = _ExpertWidths.of(config, cut)
    # The router's input; rows as they come to an expert, and as they leave it.
    routed = (mlp.tokens + mlp.rows) * widths.hidden
    routed += mlp.gathered * (widths.hidden + mlp.mlp_in + (1 + eager) * mlp.mlp_out)
    # Without tensor ranks shared experts save the router's input.
    gathered = widths.hidden if mlp.shared_out and cut.tp > 1 else 0
    return cut.tokens * (attention + gathered + mlp.shared_in + (1 + eager) * mlp.shared_out) + routed


def gathers_context(config: Config, cut: Cut) -> bool:
    """Whether each context-parallel rank gets all keys and values of a layer."""
    return cut.context > 1 and config.parallel.cp_comm_type == "all_gather"


def _routing_bytes(config: Config, cut: Cut) -> float:
    """Bytes that say where rows come from and go to, and the router's probabilities, loads and choice."""
    mlp = _ExpertWidths.of(config, cut)
    rows, tokens = mlp.rows, mlp.tokens
    assert config.moe.num_experts is not None
    places = 8 * 2 * (rows if cut.experts == cut.expert_tensor == 1 else rows + mlp.gathered)
    return places + (8 + 2 * FP32) * rows + 2 * FP32 * tokens * config.moe.num_experts


def _products(config: Config, cut: Cut, stream: int, experts: bool) -> float:
    """Elements that the outputs of products, attention and collectives have."""
    widths = _Widths.of(config, cut.tp)
    attention = 2 * widths.query + 2 * widths.key
    if config.model.multi_latent_attention:
        attention = _LatentWidths.of(config, cut.tp).products()
    if config.training.torch_compile and cut.context > 1 and not experts:
        # Around a compiled layer selective recomputation sees attention alone, and takes the products again.
        return cut.tokens * widths.query
    # A compiler drops the output of the MLP, which backward doesn't read.
    outputs = 1 if config.training.torch_compile else 2
    elements = cut.tokens * (attention + outputs * widths.hidden + widths.mlp_in)
    if experts:
        mlp = _ExpertWidths.of(config, cut)
        elements = cut.tokens * (attention + widths.hidden + mlp.shared_in)
        elements += mlp.rows * widths.hidden + mlp.gathered * (widths.hidden + mlp.mlp_in)
    if cut.tp > 1:
        elements += 2 * (cut.tokens * widths.hidden + stream) if cut.sequence > 1 else 2 * cut.tokens * widths.hidden
    return elements


def _statistics(config: Config, cut: Cut) -> float:
    """Bytes that attention and dropout keep beside their operands."""
    model, training = config.model, config.training
    heads, batch, seq = model.num_attention_heads // cut.tp, training.micro_batch_size, training.seq_length
    if unfused(config) and cut.context == 1:
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


def layer_workspace(config: Config, cut: Cut, experts: bool = False) -> float:
    """Bytes that a layer's backward takes at its height: gradients around the activation, and of the input."""
    widths, size = _Widths.of(config, cut.tp), cut.compute.itemsize
    work: float
    copies = 1 if config.training.torch_compile else 2
    work = cut.tokens * (copies * widths.mlp_in + widths.mlp_out + 2 * widths.hidden) * size
    if experts:
        mlp = _ExpertWidths.of(config, cut)
        work = mlp.gathered * (copies * mlp.mlp_in + mlp.mlp_out + 2 * widths.hidden) * size
        work += 2 * cut.tokens * widths.hidden * size
    if cut.context > 1:
        work = max(work, _context_workspace(config, cut))
    elif unfused(config):
        weights = config.training.micro_batch_size * widths.heads * config.training.seq_length**2
        work = max(work, 2 * FP32 * weights)
    return work


def _context_workspace(config: Config, cut: Cut) -> float:
    """Bytes that attention takes in backward beside what it saved: keys and values here, coming and going, and their
    gradients in fp32; or those of the whole sequence, on their way in and out."""
    widths, size = _Widths.of(config, cut.tp), cut.compute.itemsize
    pair = 2 * widths.key * cut.tokens
    if config.model.multi_latent_attention:
        latent = _LatentWidths.of(config, cut.tp)
        pair = (latent.query + latent.value) * cut.tokens
    if gathers_context(config, cut):
        return 3 * pair * cut.context * size
    # Queries' gradient too is a sum in fp32; a kernel reads keys and values repeated for each query.
    return pair * 2 * (size + FP32) + widths.query * cut.tokens * (FP32 + 2 * size)


def embedding_bytes(config: Config, cut: Cut) -> float:
    """Bytes that the embedding holds of one micro-batch: token ids, and the mask of dropout."""
    ids = 8 * cut.tokens
    dropped = config.model.hidden_dropout > 0
    return ids + FLAG * dropped * cut.tokens // cut.sequence * config.model.hidden_size


def token_info_bytes(config: Config, cut: Cut) -> float:
    """Bytes of rotary angles and masks, once for each stage and micro-batch."""
    model, training = config.model, config.training
    seq = training.seq_length // cut.context
    angles = 2 * FP32 * seq * model.rotary_dim if model.position_embedding_type == "rope" else 0
    if config.data.reset_position_ids:
        angles *= training.micro_batch_size
    if cut.context > 1:
        return angles  # documents and windows go by places
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

    Compiled, the gradient of the logits takes their place; that of the output layer's weight is added, and those of its
    input and of the norm's in front. Where it isn't compiled there are two fp32 copies of the logits before these come.
    Fused with the output layer it is a chunk of logits and of their gradient, and gradients that wait for backward.
    """
    size, training, rows = cut.compute.itemsize, config.training, -(-vocab_size // cut.tp)
    hidden = config.model.hidden_size
    if training.cross_entropy_fusion_impl == "linear":
        chunk = min(training.loss_chunk_size, cut.tokens) * rows
        gradients = (cut.tokens * size + rows * (FP32 + size)) * hidden
        return chunk * (2 * size + (0 if training.torch_compile else 2 * FP32)) + gradients
    logits = cut.tokens * rows
    if not training.torch_compile:
        return logits * (size + 2 * FP32)
    return size * (logits + rows * hidden + (cut.tokens + cut.tokens // cut.sequence) * hidden)
