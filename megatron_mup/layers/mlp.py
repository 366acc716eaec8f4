"""The MLP branch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megatron_mup.kernels.late import HAS_KERNEL
from megatron_mup.kernels.swiglu import plain_swiglu, swiglu_backward
from megatron_mup.parametrization.meta import Block

# Gate and up rows alternate in runs of this many, so that any contiguous shard of rows that is a multiple of twice as
# many holds whole pairs: tensor and data shards both cut dimension 0. Eight bf16 values are one 16-byte load.
GLU_INTERLEAVE = 8
GLU_BLOCKS = (
    Block("gate", 0, GLU_INTERLEAVE, 2 * GLU_INTERLEAVE),
    Block("up", GLU_INTERLEAVE, GLU_INTERLEAVE, 2 * GLU_INTERLEAVE),
)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return plain_swiglu(x, GLU_INTERLEAVE)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return swiglu_backward(*ctx.saved_tensors, grad, GLU_INTERLEAVE)


def swiglu(x: torch.Tensor, mult: float = 1.0, alone: bool = True) -> torch.Tensor:
    """``gate * sigmoid(mult * gate) * up`` of interleaved features, ``[..., 2 ffn]`` to ``[..., ffn]`` (Shazeer, arXiv
    2002.05202).

    Args:
        x: features.
        mult: a factor inside the sigmoid, of unit-scaled models.
        alone: whether it stands between two matrix products; if not, the compiler fuses its gradient with what follows.
    """
    if alone and mult == 1 and HAS_KERNEL and x.is_cuda:
        return _SwiGLU.apply(x)
    return plain_swiglu(x, GLU_INTERLEAVE, mult)


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """``relu(x)^2`` (So et al., arXiv 2109.08668)."""
    return F.relu(x).square()


def gelu(x: torch.Tensor, mult: float = 1.0) -> torch.Tensor:
    """``gelu(mult * x) / mult``, GELU in its tanh form, Megatron's default."""
    return F.gelu(x, approximate="tanh") if mult == 1 else F.gelu(x * mult, approximate="tanh") / mult


class MLP(nn.Module):
    """Two linear layers around an activation.

    Args:
        linear_fc1: ``hidden -> ffn``, or ``hidden -> 2 ffn`` (interleaved gate and up) with SwiGLU.
        linear_fc2: ``ffn -> hidden``.
        activation: one of the functions of this module.
        activation_scale: factor on its output, of unit-scaled models.
    """

    def __init__(
        self, linear_fc1: nn.Module, linear_fc2: nn.Module, activation: object, activation_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.linear_fc1, self.linear_fc2, self.activation = linear_fc1, linear_fc2, activation
        self.activation_scale = activation_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[seq (/ tp), batch, hidden]`` to the same shape."""
        inner = self.activation(self.linear_fc1(x))
        return self.linear_fc2(inner if self.activation_scale == 1 else inner * self.activation_scale)
