"""The Triton kernel behind :mod:`megatron_mup.kernels.multiply`; imported only where there is a CUDA device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 2048


@triton.jit
def _multiply(x, factor, numel, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    product = tl.load(x + at, mask=inside).to(tl.float32) * tl.load(factor)
    tl.store(x + at, product.to(x.dtype.element_ty), mask=inside)


def launch(x: torch.Tensor, factor: torch.Tensor) -> None:
    """See :func:`megatron_mup.kernels.multiply.multiply_`; one contiguous tensor with elements."""
    _multiply[(triton.cdiv(x.numel(), _BLOCK),)](x, factor, x.numel(), BLOCK=_BLOCK)
