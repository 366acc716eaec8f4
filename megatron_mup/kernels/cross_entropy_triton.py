"""The Triton kernel behind :mod:`megatron_mup.kernels.cross_entropy`; imported only where there is a CUDA device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK, _WARPS = 4096, 8  # logits of a program


@triton.jit
def _backward(logits, normalizer, weight, label, pull, out, columns, factor, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    value = tl.load(logits + row * columns + column, mask=inside, other=0).to(tl.float32)
    grad = tl.exp(value * factor - tl.load(normalizer + row)) * tl.load(weight + row)
    grad -= tl.where(column == tl.load(label + row).to(tl.int32), tl.load(pull + row), 0.0)
    tl.store(out + row * columns + column, grad.to(out.dtype.element_ty), mask=inside)


def launch(
    logits: torch.Tensor,
    normalizer: torch.Tensor,
    weight: torch.Tensor,
    label: torch.Tensor,
    pull: torch.Tensor,
    out: torch.Tensor,
    factor: float,
) -> None:
    """See :func:`megatron_mup.kernels.cross_entropy.cross_entropy_backward`; all contiguous."""
    columns = logits.shape[-1]
    grid = (logits.numel() // columns, triton.cdiv(columns, _BLOCK))
    _backward[grid](logits, normalizer, weight, label, pull, out, columns, factor, BLOCK=_BLOCK, num_warps=_WARPS)
