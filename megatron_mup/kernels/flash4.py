"""Causal attention by FlashAttention-4 (Dao-AILab/flash-attention, package ``flash-attn-4``): an operation that
torch.compile leaves whole, with its gradient.

Its plain twin is :func:`torch.nn.functional.scaled_dot_product_attention`.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

COMPUTE_CAPABILITIES = (9, 10)
"""Major ones of the GPUs whose kernels have a gradient: Hopper, Blackwell."""
INTERFACE = "flash_attn.cute.interface"
"""The package's module; importing it takes seconds."""


@torch.library.custom_op("megatron_mup::flash4", mutates_args=(), device_types="cuda")
def flash4(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention, each query head to the keys and values of its group.

    Args:
        query: ``[batch, heads, seq, head_dim]``, bf16 or fp16.
        key, value: ``[batch, groups, seq, head_dim]``.
        scale: factor on the logits.

    Returns:
        The output, of the query's shape but in memory ``[seq, batch, heads, head_dim]``, and the logarithms of the sums
        of exp of the logits, ``[batch, heads, seq]`` fp32.
    """
    out = _sequence_first(query)
    _, sums, *_ = importlib.import_module(INTERFACE)._flash_attn_fwd(
        *_heads_third(query, key, value), softmax_scale=scale, causal=True, return_lse=True, out=out.transpose(1, 2)
    )
    return out, sums


@flash4.register_fake
def _(query: torch.Tensor, *_others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _sequence_first(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op("megatron_mup::flash4_backward", mutates_args=(), device_types="cuda")
def flash4_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value from the output's, and what `flash4` got and gave."""
    grads = [_sequence_first(x) for x in (query, key, value)]
    into = dict(zip(("dq", "dk", "dv"), _heads_third(*grads), strict=True))
    importlib.import_module(INTERFACE)._flash_attn_bwd(
        *_heads_third(query, key, value, out, grad),
        sums,
        softmax_scale=scale,
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **into,
    )
    query_grad, key_grad, value_grad = grads
    return query_grad, key_grad, value_grad


@flash4_backward.register_fake
def _(
    _grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_others: Any
) -> tuple[torch.Tensor, ...]:
    return tuple(_sequence_first(x) for x in (query, key, value))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad: torch.Tensor, _sums: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    return *flash4_backward(grad, *ctx.saved_tensors, ctx.scale), None


flash4.register_autograd(_gradients, setup_context=_keep)


def _heads_third(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """``[batch, heads, seq, width]`` as the package has them, ``[batch, seq, heads, width]``."""
    return [x.transpose(1, 2) for x in tensors]


def _sequence_first(like: torch.Tensor) -> torch.Tensor:
    """An empty ``[batch, heads, seq, width]`` whose memory is ``[seq, batch, heads, width]``, as layers have it."""
    batch, heads, seq, width = like.shape
    return like.new_empty(seq, batch, heads, width).permute(1, 2, 0, 3)


# What recomputation under a memory budget (torch.compile's) takes for the cost of doing it again.
@register_flop_formula(torch.ops.megatron_mup.flash4)
def _flops(query: Any, key: Any, *_others: Any, **_more: Any) -> int:
    batch, heads, seq, width = query
    return int(4 * batch * heads * seq * key[2] * width)
