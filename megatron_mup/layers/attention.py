"""Self-attention: fused QKV, grouped queries, rotary positions, the kernel behind scaled_dot_product_attention."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_mup.layers.dropout import drop
from megatron_mup.layers.info import TokenInfo
from megatron_mup.layers.rope import rotate
from megatron_mup.parametrization.meta import Block

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "fused": SDPBackend.CUDNN_ATTENTION}


def qkv_blocks(heads_per_group: int, head_dim: int) -> tuple[Block, ...]:
    """Logical matrices of the fused projection, whose rows run group by group: query heads, key head, value head."""
    period = (heads_per_group + 2) * head_dim
    return (
        Block("query", 0, heads_per_group * head_dim, period),
        Block("key", heads_per_group * head_dim, head_dim, period),
        Block("value", (heads_per_group + 1) * head_dim, head_dim, period),
    )


def plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    dropout: tuple[float, torch.Tensor, torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """Attention by its formula, softmax in fp32.

    Args:
        query: ``[batch, heads, seq, head_dim]``.
        key, value: ``[batch, groups, seq, head_dim]``.
        scale: factor on the logits.
        mask: as in `TokenInfo`; None is causal.
        dropout: probability, key, sample number and element number of the attention weights, as `drop` takes them.
    """
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    logits = (query @ key.transpose(-2, -1)).float() * scale
    if mask is None:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    weights = logits.masked_fill(~mask, float("-inf")).softmax(-1)
    if dropout is not None:
        weights = drop(weights, *dropout)
    return weights.to(value.dtype) @ value


class SelfAttention(nn.Module):
    """Causal self-attention over this rank's heads.

    Args:
        linear_qkv: ``hidden -> groups x (heads per group + 2) x head_dim``, rows as in `qkv_blocks`.
        linear_proj: ``heads x head_dim -> hidden``.
        q_layernorm, k_layernorm: norms over a head, or None.
        heads: query heads on this rank.
        first_head: number of the first of them in the whole layer.
        groups: key/value heads on this rank.
        head_dim: width of a head.
        scale: factor on the logits.
        output_scale: factor on the output of attention, of unit-scaled models.
        backend: name of the kernel, see `TrainingConfig.attention_backend`.
        dropout: probability on attention weights.
    """

    def __init__(
        self,
        linear_qkv: nn.Module,
        linear_proj: nn.Module,
        q_layernorm: nn.Module | None,
        k_layernorm: nn.Module | None,
        *,
        heads: int,
        first_head: int,
        groups: int,
        head_dim: int,
        scale: float,
        backend: str,
        dropout: float,
        output_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.linear_qkv, self.linear_proj = linear_qkv, linear_proj
        self.q_layernorm, self.k_layernorm = q_layernorm, k_layernorm
        self.heads, self.first_head, self.groups, self.head_dim = heads, first_head, groups, head_dim
        self.scale, self.backend, self.dropout = scale, backend, dropout
        self.output_scale = output_scale
        # Shown query, key and mask as `core` gets them, for diagnostics (`training.observe`).
        self.watcher: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], None] | None = None

    def forward(self, x: torch.Tensor, info: TokenInfo, salt: torch.Tensor | None) -> torch.Tensor:
        """``[seq (/ tp), batch, hidden]`` to the same shape. ``salt``: 0-d int64 that keys dropout, or None."""
        fused = self.linear_qkv(x).unflatten(-1, (self.groups, -1, self.head_dim))
        query, key, value = fused.split([self.heads // self.groups, 1, 1], -2)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        if info.cos is not None and info.sin is not None:
            query, key = rotate(query, info.cos, info.sin), rotate(key, info.cos, info.sin)
        # [seq, batch, groups, n, head_dim] -> [batch, groups x n, seq, head_dim]
        query, key, value = (t.flatten(2, 3).permute(1, 2, 0, 3) for t in (query, key, value))
        if self.watcher is not None:
            self.watcher(query, key, info.mask)
        if info.cache is not None:
            key, value = info.cache.extend(self, key, value)
        context = self.core(query, key, value, info, salt)
        if self.output_scale != 1:
            context = context * self.output_scale
        return self.linear_proj(context.permute(2, 0, 1, 3).flatten(2))

    def core(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, info: TokenInfo, salt: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention of ``[batch, heads, seq, head_dim]`` queries over ``[batch, groups, seq, head_dim]`` keys."""
        if self.backend == "unfused" or self.dropout > 0:
            dropout = None
            if self.dropout > 0 and salt is not None:
                assert info.sample_index is not None
                sample = info.sample_index[:, None, None, None]
                dropout = (self.dropout, salt, sample, self.weight_index(query.shape[2], query.device))
            return plain_attention(query, key, value, self.scale, info.mask, dropout)
        context = sdpa_kernel(BACKENDS[self.backend]) if self.backend in BACKENDS else contextlib.nullcontext()
        with context:
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=info.mask,
                is_causal=info.mask is None,
                scale=self.scale,
                enable_gqa=self.heads != self.groups,
            )

    def weight_index(self, seq: int, device: torch.device) -> torch.Tensor:
        """Number of each attention weight of a sample in this layer: ``[heads, seq, seq]``."""
        place = torch.arange(seq, device=device)
        head = torch.arange(self.first_head, self.first_head + self.heads, device=device)
        return (head[:, None, None] * seq + place[:, None]) * seq + place
