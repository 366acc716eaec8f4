"""Gradient of a fused projection by its rotated queries and keys and its values, in one pass over memory: an operation
that torch.compile leaves whole.

What the compiler makes of the formula computes each element once for each of the three, and picks one.
"""

from __future__ import annotations

import torch

from megatron_mup.kernels.late import kernels_of


@torch.library.custom_op("megatron_mup::rotary_backward", mutates_args=(), device_types="cuda")
def rotary_backward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Turns gradients of queries and keys back, computed in fp32, and puts those of values beside them.

    Args:
        query: gradient of the rotated queries, ``[seq, batch, groups, heads per group, head_dim]``.
        key, value: of the rotated keys and of the values, ``[seq, batch, groups, 1, head_dim]``.
        cos, sin: of the angles, ``[seq, batch or 1, channels that rotate]`` fp32, as `layers.rope` turns by them.

    Returns:
        ``[seq, batch, groups, heads per group + 2, head_dim]``, contiguous.
    """
    parts = [part if part.stride(-1) == 1 else part.contiguous() for part in (query, key, value)]
    out = query.new_empty(_shape(query))
    kernels_of("rotary").launch(*parts, cos.contiguous(), sin.contiguous(), out)
    return out


@rotary_backward.register_fake
def _(query: torch.Tensor, *_others: torch.Tensor) -> torch.Tensor:
    return query.new_empty(_shape(query))


def _shape(query: torch.Tensor) -> tuple[int, ...]:
    return (*query.shape[:3], query.shape[3] + 2, query.shape[4])


def rotary_backward_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """The plain twin of :func:`rotary_backward`, which defines it."""
    width, half = cos.shape[-1], cos.shape[-1] // 2
    cos, sin = cos[:, :, None, None], sin[:, :, None, None]

    def turned_back(grad: torch.Tensor) -> torch.Tensor:
        wide = grad[..., :width].float()
        pulled = wide * sin
        turned = wide * cos + torch.cat([pulled[..., half:], -pulled[..., :half]], -1)
        return torch.cat([turned.to(grad.dtype), grad[..., width:]], -1)

    return torch.cat([turned_back(query), turned_back(key), value], -2)
