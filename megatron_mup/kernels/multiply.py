"""Tensors times numbers that the device knows: many by one in place, or each matrix of a batch by its own."""

from __future__ import annotations

import torch

from megatron_mup.kernels.late import HAS_KERNEL, kernels_of


def multiply_(tensors: list[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiplies tensors by a 0-d fp32 tensor, without waiting for it; each product is rounded once.

    PyTorch's foreach product takes a factor of another precision tensor by tensor, at a third of the memory's speed: on
    a GPU such tensors go through a kernel of our own.
    """
    plain = []
    for tensor in tensors:
        if HAS_KERNEL and tensor.is_cuda and tensor.dtype != torch.float32 and tensor.is_contiguous():
            if tensor.numel():
                kernels_of("multiply").launch(tensor, factor, tensor)
        else:
            plain.append(tensor)
    if plain:
        torch._foreach_mul_(plain, factor)


def multiplied(
    x: torch.Tensor, factors: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Each matrix times its factor, computed in fp32 and rounded once to ``dtype``.

    PyTorch does that at half of the memory's speed where types differ: on a GPU it goes through a kernel of our own.

    Args:
        x: ``[batch, m, n]``.
        factors: fp32 ``[batch]``.
        dtype: of the result, which is contiguous.
        out: where it goes, if not to new memory.
    """
    if out is None:
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if HAS_KERNEL and x.is_cuda and x.is_contiguous() and x.numel():
        kernels_of("multiply").launch(x, factors, out)
        return out
    return torch.mul(x, factors.view(-1, 1, 1), out=out)
