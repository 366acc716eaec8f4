"""Gradient of SwiGLU on interleaved features in one pass over memory: an operation that torch.compile leaves whole.

What the compiler makes of the formula computes each element of gate and up twice, once for either half of the result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_mup.kernels.late import kernels_of


@torch.library.custom_op("megatron_mup::swiglu_backward", mutates_args=(), device_types="cuda")
def swiglu_backward(x: torch.Tensor, grad: torch.Tensor, run: int) -> torch.Tensor:
    """Gradient of ``silu(gate) * up`` by both, computed in fp32.

    Args:
        x: ``[..., 2 ffn]``, runs of gate and up in turn.
        grad: gradient of the result, ``[..., ffn]``.
        run: features in a run, a power of two.

    Returns:
        Gradient of ``x``.
    """
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    kernels_of("swiglu").launch(x, grad.contiguous(), out, run)
    return out


@swiglu_backward.register_fake
def _(x: torch.Tensor, grad: torch.Tensor, run: int) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def plain_swiglu(x: torch.Tensor, run: int, mult: float = 1.0) -> torch.Tensor:
    """``gate * sigmoid(mult * gate) * up`` of ``[..., 2 ffn]``, runs of gate and up in turn: PyTorch's operations."""
    gate, up = x.unflatten(-1, (-1, 2, run)).unbind(-2)
    gated = F.silu(gate) if mult == 1 else gate * torch.sigmoid(mult * gate)
    return (gated * up).flatten(-2)


def swiglu_backward_reference(x: torch.Tensor, grad: torch.Tensor, run: int, mult: float = 1.0) -> torch.Tensor:
    """The plain twin of :func:`swiglu_backward`, which defines it, with a factor inside the sigmoid."""
    gate, up = x.float().unflatten(-1, (-1, 2, run)).unbind(-2)
    d, share = grad.float().unflatten(-1, (-1, run)), torch.sigmoid(mult * gate)
    d_gate = d * up * (share + mult * gate * share * (1 - share))
    return torch.stack([d_gate, d * gate * share], -2).flatten(-3).to(x.dtype)
