"""Architecture of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Model."""

    num_layers: int = 12
    """Number of transformer layers."""
    hidden_size: int = 768
    """Width of the residual stream."""
    ffn_hidden_size: int | None = None
    """Inner width of the MLP. Default: 4 x hidden size; with --swiglu two thirds of that, rounded down to 64."""
    num_attention_heads: int = 12
    """Number of query heads."""
    num_query_groups: int | None = None
    """Number of key/value heads (grouped-query attention). Default: one per query head."""
    kv_channels: int | None = None
    """Width of one attention head. Default: hidden size / number of query heads."""
    multi_latent_attention: bool = False
    """Queries, keys and values come out of narrow latents (DeepSeek-V2). --qk-layernorm then norms the latents."""
    q_lora_rank: int | None = None
    """Latent attention: width of the queries' latent. Default: queries come from the stream, without one."""
    kv_lora_rank: int | None = None
    """Latent attention: width of the latent that keys and values share."""
    qk_head_dim: int = 128
    """Latent attention: width of the part of each query and key head that is not rotated."""
    qk_pos_emb_head_dim: int = 64
    """Latent attention: width of the part that is rotated; all heads have the same key there."""
    v_head_dim: int = 128
    """Latent attention: width of a value head."""
    max_position_embeddings: int | None = None
    """Rows of the learned position table. Default: --seq-length."""
    position_embedding_type: Literal["rope", "learned_absolute", "none"] = "rope"
    """How positions enter the model."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""
    rotary_percent: float = 1.0
    """Share of each head's channels that is rotated."""
    use_rope_scaling: bool = False
    """Stretch the slow rotary frequencies for long contexts, as Llama 3.1 does."""
    rope_scaling_factor: float = 8.0
    """By how much --use-rope-scaling stretches them."""
    window_size: int | None = None
    """Sliding-window attention: each token sees itself and so many tokens before it. Default: all before it."""
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """Kind of norm in front of each branch and of the head."""
    norm_position: Literal["pre", "post-branch"] = "pre"
    """Norm in front of each branch, or as its last operation (Swin v2, arXiv 2111.09883)."""
    norm_affine: bool = True
    """Trainable gains (and LayerNorm's biases) of the norms in the layers and in front of the output layer."""
    norm_epsilon: float = 1e-5
    """Added to the variance inside the norms."""
    swiglu: bool = False
    """Gated MLP: silu(gate) * up."""
    squared_relu: bool = False
    """MLP activation relu(x)^2. Without this and --swiglu: GELU (tanh form)."""
    disable_bias_linear: bool = False
    """No biases in the linear layers."""
    add_qkv_bias: bool = False
    """Bias on the query, key and value projection even with --disable-bias-linear."""
    qk_layernorm: bool = False
    """Norm on each query and key head, in front of the rotary embedding; with --multi-latent-attention on each
    latent."""
    untie_embeddings_and_output_weights: bool = False
    """Separate matrices for the embedding and the output layer."""
    vocab_size: int | None = None
    """Number of token ids, unpadded. Default: the tokenizer's."""
    make_vocab_size_divisible_by: int = 128
    """The output layer's GEMM runs on a vocabulary padded to a multiple of this per rank; weights and checkpoints stay
    unpadded."""
    attention_dropout: float = 0.0
    """Dropout on attention probabilities. Above zero, attention runs unfused and holds seq x seq matrices."""
    hidden_dropout: float = 0.0
    """Dropout on the embedding and on each branch's output."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights at base width. Output projections divide it by sqrt(2 x layers)."""
    embedding_init_method_std: float | None = None
    """Standard deviation of the initial embedding (and position table). Default: --init-method-std."""
    output_layer_init_method_std: float | None = None
    """Standard deviation of the initial untied output layer; 0 starts it at zero. Default: --init-method-std."""
    softmax_scale: float | None = None
    """Factor on attention logits. Default: what the parametrization says, 1/sqrt(head width) at base width."""

    @property
    def ffn_size(self) -> int:
        """Inner width of the MLP, default resolved."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if self.swiglu:
            return max(64, int(4 * self.hidden_size * 2 / 3) // 64 * 64)
        return 4 * self.hidden_size

    @property
    def query_groups(self) -> int:
        """Number of key/value heads, default resolved."""
        return self.num_attention_heads if self.num_query_groups is None else self.num_query_groups

    @property
    def head_dim(self) -> int:
        """Width of one head of queries and keys, default resolved."""
        if self.multi_latent_attention:
            return self.qk_head_dim + self.qk_pos_emb_head_dim
        return self.hidden_size // self.num_attention_heads if self.kv_channels is None else self.kv_channels

    @property
    def value_dim(self) -> int:
        """Width of one value head."""
        return self.v_head_dim if self.multi_latent_attention else self.head_dim

    @property
    def attention_weights(self) -> int:
        """Elements of the matrices of one layer's attention."""
        heads, output = self.num_attention_heads, self.hidden_size * self.num_attention_heads * self.value_dim
        if not self.multi_latent_attention:
            return self.hidden_size * (heads + 2 * self.query_groups) * self.head_dim + output
        rank = self.kv_lora_rank or 0
        keys = self.hidden_size * (rank + self.qk_pos_emb_head_dim) + rank * heads * (self.qk_head_dim + self.value_dim)
        width = heads * self.head_dim
        queries = (self.hidden_size + width) * self.q_lora_rank if self.q_lora_rank else self.hidden_size * width
        return queries + keys + output

    @property
    def rotary_dim(self) -> int:
        """Channels of each head that --position-embedding-type rope rotates."""
        if self.multi_latent_attention:
            return self.qk_pos_emb_head_dim
        return int(self.head_dim * self.rotary_percent)

    @property
    def linear_bias(self) -> bool:
        """Whether linear layers carry a bias."""
        return not self.disable_bias_linear

    @property
    def qkv_bias(self) -> bool:
        """Whether the fused query, key and value projection carries a bias."""
        return self.linear_bias or self.add_qkv_bias
