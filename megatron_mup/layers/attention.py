"""Self-attention: fused QKV, grouped queries, rotary positions, the kernel behind scaled_dot_product_attention."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_mup.config import Config
from megatron_mup.kernels.flash4 import flash4
from megatron_mup.kernels.segments import kernel_takes
from megatron_mup.layers.context import causal_attention, gathered, masked_attention, ring_attention
from megatron_mup.layers.dropout import drop
from megatron_mup.layers.info import Context, TokenInfo
from megatron_mup.layers.partial import Partial, Thinning
from megatron_mup.layers.rope import parts, rotate, rotated_parts
from megatron_mup.layers.scale import forward_by
from megatron_mup.parametrization.meta import Block

KERNELS = {
    SDPBackend.FLASH_ATTENTION: "FlashAttention",
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
    SDPBackend.EFFICIENT_ATTENTION: "memory-efficient attention",
    SDPBackend.MATH: "the formula",
}
OPERATIONS = (
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.megatron_mup.flash4.default,
)
"""Whole attention, as PyTorch's dispatcher and compiler see it."""
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "fused": SDPBackend.CUDNN_ATTENTION}


def kernel_chosen(config: Config, device: torch.device, dtype: torch.dtype) -> str | None:
    """The kernel that ``--attention-backend auto`` comes to in this run, by name: FlashAttention-4, or what PyTorch
    takes; None where the flags name another, or attention is more than causal.

    Args:
        config: the run's configuration, settled.
        device: where it runs.
        dtype: of queries, keys and values.
    """
    model, training, tp = config.model, config.training, config.parallel.tensor_model_parallel_size
    if training.attention_backend == "flash4":
        return "FlashAttention-4"
    masked = (
        config.data.reset_attention_mask or model.window_size is not None or config.parallel.context_parallel_size > 1
    )
    if training.attention_backend != "auto" or model.attention_dropout or masked:
        return None
    seq = min(training.seq_length, 8192)  # long enough to be told from a short one
    heads, groups = model.num_attention_heads // tp, model.query_groups // tp
    query, key, value = (
        torch.empty(1, n, seq, width, dtype=dtype, device=device, requires_grad=True)
        for n, width in ((heads, model.head_dim), (groups, model.head_dim), (groups, model.value_dim))
    )
    choice = torch._fused_sdp_choice(query, key, value, None, 0.0, True, enable_gqa=heads != groups)
    return KERNELS.get(SDPBackend(choice), "a kernel of the device's own")


def qkv_blocks(heads_per_group: int, head_dim: int) -> tuple[Block, ...]:
    """Logical matrices of the fused projection, whose rows run group by group: query heads, key head, value head."""
    period = (heads_per_group + 2) * head_dim
    return (
        Block("query", 0, heads_per_group * head_dim, period, heads=heads_per_group),
        Block("key", heads_per_group * head_dim, head_dim, period),
        Block("value", (heads_per_group + 1) * head_dim, head_dim, period),
    )


def plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    thin: Callable[[torch.Tensor], torch.Tensor] | None,
) -> torch.Tensor:
    """Attention by its formula, softmax in fp32.

    Args:
        query: ``[batch, heads, seq, head_dim]``.
        key, value: ``[batch, groups, seq, head_dim]``.
        scale: factor on the logits.
        mask: as in `TokenInfo`; None is causal.
        thin: dropout of the attention weights, or None.
    """
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    logits = (query @ key.transpose(-2, -1)).float() * scale
    if mask is None:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    weights = logits.masked_fill(~mask, float("-inf")).softmax(-1)
    if thin is not None:
        weights = thin(weights)
    return weights.to(value.dtype) @ value


class Attention(nn.Module, ABC):
    """Causal self-attention over this rank's heads; a subclass says where queries, keys and values come from.

    Args:
        heads: query heads on this rank.
        first_head: number of the first of them in the whole layer.
        groups: key/value heads on this rank.
        scale: factor on the logits.
        output_scale: factor on the output of attention, of unit-scaled models; the gradient has it from the factors of
            ``linear_proj``.
        backend: name of the kernel, see `TrainingConfig.attention_backend`.
        dropout: probability on attention weights.

    Attributes:
        linear_proj: ``heads x width of a value -> hidden``; the subclass sets it, behind the modules that come first.
    """

    linear_proj: nn.Module

    def __init__(
        self,
        *,
        heads: int,
        first_head: int,
        groups: int,
        scale: float,
        backend: str,
        dropout: float,
        output_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.heads, self.first_head, self.groups = heads, first_head, groups
        self.scale, self.backend, self.dropout = scale, backend, dropout
        self.output_scale = output_scale
        # Shown query, key and mask as `core` gets them, for diagnostics (`training.observe`).
        self.watcher: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], None] | None = None

    def forward(self, x: torch.Tensor, info: TokenInfo, salt: torch.Tensor | None) -> torch.Tensor:
        """``[seq (/ tp), batch, hidden]`` to the same shape. ``salt``: 0-d int64 that keys dropout, or None."""
        # [seq, batch, heads, head_dim] -> [batch, heads, seq, head_dim]
        query, key, value = (t.permute(1, 2, 0, 3) for t in self.query_key_value(x, info))
        if self.watcher is not None:
            self.watcher(query, *self.seen(key, info))
        if info.cache is not None:
            key, value = info.cache.extend(self, key, value)
        context = self.core(query, key, value, info, salt)
        context = forward_by(context, self.output_scale)
        return self.linear_proj(context.permute(2, 0, 1, 3).flatten(2))

    @abstractmethod
    def query_key_value(self, x: torch.Tensor, info: TokenInfo) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``[seq (/ tp), batch, hidden]`` to queries ``[seq, batch, heads, width]``, keys ``[seq, batch, groups,
        width]``, both rotated, and values ``[seq, batch, groups, width of a value]``."""

    def core(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, info: TokenInfo, salt: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention of ``[batch, heads, seq, width]`` queries over ``[batch, groups, seq, width]`` keys; values may
        have another width. Context-parallel ranks have a part of the sequence each."""
        if info.context is not None:
            return self.over_context(query, key, value, info, info.context, salt)
        thin = self.thinning(info, salt, key.shape[2])
        if thin is None:
            return self.attend(query, key, value, info.mask, None)
        places = torch.arange(key.shape[2], device=key.device)
        return self.attend(query, key, value, info.mask, partial(thin, queries=places, keys=places))

    # Messages under way and masks by alignment are not for a compiler.
    @torch.compiler.disable
    def over_context(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        info: TokenInfo,
        context: Context,
        salt: torch.Tensor | None,
    ) -> torch.Tensor:
        """`core` of this rank's queries; keys and values of others come from them."""
        width = value.shape[-1]
        if width < query.shape[-1] and not self.unfused:
            # FlashAttention wants heads of one width.
            value = F.pad(value, (0, query.shape[-1] - width))
        thin = self.thinning(info, salt, context.seq)
        attend = self.around_ring if context.ring else self.to_gathered
        return attend(query, key, value, context, thin)[..., :width]

    def around_ring(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context, thin: Thinning | None
    ) -> torch.Tensor:
        """`over_context` where keys and values go around."""
        mask = context.mask if context.masked else None
        segments = context.segments if context.masked and context.window is None else None
        part = Partial(self.scale, mask, thin, self.unfused, segments)
        return ring_attention(query, key, value, part, context)

    def to_gathered(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context, thin: Thinning | None
    ) -> torch.Tensor:
        """`over_context` where they are gathered."""
        key, value = gathered(context, key, value)
        if not self.unfused:
            if not context.masked:
                with self.kernel():
                    return causal_attention(query, key, value, self.scale, context)
            if kernel_takes(query, value) or not query.is_cuda:
                return masked_attention(query, key, value, self.scale, context)
        keys = torch.arange(context.seq, device=key.device)
        here = None if thin is None else partial(thin, queries=context.here, keys=keys)
        return self.attend(query, key, value, context.mask_here, here)

    @property
    def unfused(self) -> bool:
        """Whether attention runs by its formula."""
        return self.backend == "unfused" or self.dropout > 0

    def kernel(self) -> contextlib.AbstractContextManager[None]:
        """Context in which PyTorch takes the kernel that the flags ask for."""
        return sdpa_kernel(BACKENDS[self.backend]) if self.backend in BACKENDS else contextlib.nullcontext()

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        thin: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> torch.Tensor:
        """Attention to all keys at hand; arguments as for `plain_attention`."""
        if self.unfused:
            return plain_attention(query, key, value, self.scale, mask, thin)
        if self.backend == "flash4" and mask is None:
            return flash4(query, key, value, self.scale)[0]
        with self.kernel():
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                is_causal=mask is None,
                scale=self.scale,
                enable_gqa=self.heads != self.groups,
            )

    def thinning(self, info: TokenInfo, salt: torch.Tensor | None, seq: int) -> Thinning | None:
        """Dropout of attention weights in sequences of this length; None without."""
        if self.dropout == 0 or salt is None:
            return None
        assert info.sample_index is not None
        sample = info.sample_index[:, None, None, None]

        def thin(weights: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
            return drop(weights, self.dropout, salt, sample, self.weight_index(queries, keys, seq))

        return thin

    def weight_index(self, queries: torch.Tensor, keys: torch.Tensor, seq: int) -> torch.Tensor:
        """Number, among all of a sample in this layer, of each attention weight between places: ``[heads, queries,
        keys]``.
        """
        head = torch.arange(self.first_head, self.first_head + self.heads, device=keys.device)
        return (head[:, None, None] * seq + queries[:, None]) * seq + keys

    def seen(self, key: torch.Tensor, info: TokenInfo) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All keys that the queries here may see, and the mask between them; collective over context ranks."""
        if info.context is None:
            return key, info.mask
        (key,) = gathered(info.context, key)
        return key, info.context.mask_here


class SelfAttention(Attention):
    """Attention whose queries, keys and values are one projection.

    Args:
        linear_qkv: ``hidden -> groups x (heads per group + 2) x head_dim``, rows as in `qkv_blocks`.
        linear_proj: ``heads x head_dim -> hidden``.
        q_layernorm, k_layernorm: norms over a head, or None.
        head_dim: width of a head.
        core: the numbers of `Attention`.
    """

    def __init__(
        self,
        linear_qkv: nn.Module,
        linear_proj: nn.Module,
        q_layernorm: nn.Module | None,
        k_layernorm: nn.Module | None,
        *,
        head_dim: int,
        **core: Any,
    ) -> None:
        super().__init__(**core)
        self.linear_qkv, self.linear_proj, self.head_dim = linear_qkv, linear_proj, head_dim
        self.q_layernorm, self.k_layernorm = q_layernorm, k_layernorm

    def query_key_value(self, x: torch.Tensor, info: TokenInfo) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Attention.query_key_value`."""
        fused = self.linear_qkv(x).unflatten(-1, (self.groups, -1, self.head_dim))
        if info.cos is None or info.sin is None or self.q_layernorm is not None:
            query, key, value = parts(fused)
            if self.q_layernorm is not None and self.k_layernorm is not None:
                query, key = self.q_layernorm(query), self.k_layernorm(key)
            if info.cos is not None and info.sin is not None:
                query, key = rotate(query, info.cos, info.sin), rotate(key, info.cos, info.sin)
        else:
            query, key, value = rotated_parts(fused, info.cos, info.sin)
        return query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3)
