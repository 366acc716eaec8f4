"""Norms over the last dimension."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megatron_mup.kernels.late import HAS_KERNEL
from megatron_mup.kernels.libraries import apex_layer_norm, apex_rms_norm
from megatron_mup.kernels.rms_norm import LONGEST, rms_norm_backward
from megatron_mup.layers.scale import scale


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return x.view_as(x), F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    def backward(ctx: Any, skip: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight = ctx.saved_tensors
        return *rms_norm_backward(x, weight, grad, skip, ctx.eps), None


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight``, statistics in fp32.

    Args:
        length: of the last dimension.
        weight: ``[length]``, or None for no gain.
        eps: added to the mean square.
        gradient: factor on the weight's gradient, of unit-scaled models.
        impl: whose kernel it is on a GPU: PyTorch's (``native``) or Apex's (``apex``).
    """

    def __init__(
        self, length: int, weight: nn.Parameter | None, eps: float, gradient: float = 1.0, impl: str = "native"
    ) -> None:
        super().__init__()
        self.length, self.weight, self.eps, self.gradient, self.impl = (length,), weight, eps, gradient, impl

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape that ends in the length."""
        weight = None if self.weight is None else scale(self.weight, backward=self.gradient)
        if self.impl == "apex" and x.is_cuda:
            return apex_rms_norm(x, weight, self.eps)
        return F.rms_norm(x, self.length, weight, self.eps)

    def fork(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream, to go on with, and its norm: compiled for a GPU the two gradients meet in one kernel.

        Elsewhere the norm is called as a module, so that its hooks see it, and has a node of its own in autograd's
        graph: schedules that split backward follow the path to its weight apart from the one to its input.
        """
        fits = self.weight is not None and self.length[0] <= LONGEST and self.impl == "native"
        if fits and HAS_KERNEL and x.is_cuda and torch.compiler.is_compiling():
            return _Fork.apply(x, scale(self.weight, backward=self.gradient), self.eps)
        return x, self(x)


class LayerNorm(nn.Module):
    """``(x - mean) / sqrt(var + eps) * weight + bias``, statistics in fp32.

    Args:
        length: of the last dimension.
        weight, bias: ``[length]``, or None for neither.
        eps: added to the variance.
        gradient: factor on their gradients, of unit-scaled models.
        impl: as for `RMSNorm`.
    """

    def __init__(
        self,
        length: int,
        weight: nn.Parameter | None,
        bias: nn.Parameter | None,
        eps: float,
        gradient: float = 1.0,
        impl: str = "native",
    ) -> None:
        super().__init__()
        self.length, self.weight, self.bias, self.eps, self.gradient = (length,), weight, bias, eps, gradient
        self.impl = impl

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape that ends in the length."""
        weight, bias = (
            None if part is None else scale(part, backward=self.gradient) for part in (self.weight, self.bias)
        )
        if self.impl == "apex" and x.is_cuda:
            return apex_layer_norm(x, weight, bias, self.eps)
        return F.layer_norm(x, self.length, weight, bias, self.eps)
