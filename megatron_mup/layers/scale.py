"""A factor forward and another one backward: what unit-scaled operations are made of."""

from __future__ import annotations

from typing import Any

import torch


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward: float, backward: float) -> torch.Tensor:
        ctx.factor = backward
        return x.view_as(x) if forward == 1 else x * forward

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad if ctx.factor == 1 else grad * ctx.factor, None, None


class _ForwardBy(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return x * factor

    @staticmethod
    def backward(_ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _BackwardBy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad * ctx.saved_tensors[0], None


def forward_by(x: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
    """``factor * x``, whose gradient is that of the result. A 0-d tensor is no constant to torch.compile."""
    return _ForwardBy.apply(x, factor) if isinstance(factor, torch.Tensor) else scale(x, forward=factor)


def backward_by(x: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
    """``x``, whose gradient is ``factor`` times that of the result."""
    return _BackwardBy.apply(x, factor) if isinstance(factor, torch.Tensor) else scale(x, backward=factor)


def scale(x: torch.Tensor, forward: float = 1.0, backward: float = 1.0) -> torch.Tensor:
    """``forward * x``, whose gradient is ``backward`` times that of the result. Where the two agree it is a product.

    Args:
        x: any shape.
        forward: factor on the values.
        backward: factor on the gradient.
    """
    if forward == backward:
        return x if forward == 1 else x * forward
    return _Scale.apply(x, forward, backward)
