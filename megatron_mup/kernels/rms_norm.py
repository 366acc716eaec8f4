"""Gradient of RMSNorm on a residual stream in one pass over memory: an operation that torch.compile leaves whole.

What the compiler makes of the formula reads the same tensors several times for the two sums, over channels for the
input's gradient and over tokens for the gain's.
"""

from __future__ import annotations

import torch

from megatron_mup.kernels.late import kernels_of

LONGEST = 16384
"""Channels that the kernel takes: a token's lie in registers."""


@torch.library.custom_op("megatron_mup::rms_norm_backward", mutates_args=(), device_types="cuda")
def rms_norm_backward(
    x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, skip: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of ``x`` and of ``x / sqrt(mean(x^2) + eps) * weight`` together, computed in fp32.

    Args:
        x: ``[..., channels]``, at most `LONGEST` of them.
        weight: ``[channels]``.
        grad: gradient of the norm, like x.
        skip: gradient of x as it is, like x.
        eps: added to the mean square.

    Returns:
        Gradients of ``x`` and of the weight.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, kernels_of("rms_norm").launch(x.contiguous(), weight, grad.contiguous(), skip.contiguous(), out, eps)


@rms_norm_backward.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, skip: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)


def rms_norm_backward_reference(
    x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, skip: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain twin of :func:`rms_norm_backward`, which defines it."""
    wide = x.float()
    inverse = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    unit, scaled = wide * inverse, grad.float() * weight.float()
    out = skip.float() + inverse * (scaled - unit * (unit * scaled).mean(-1, keepdim=True))
    gain = (grad.float() * unit).flatten(0, -2).sum(0)
    return out.to(x.dtype), gain.to(weight.dtype)
