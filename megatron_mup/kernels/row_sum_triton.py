"""The Triton kernel behind :mod:`megatron_mup.kernels.row_sum`; imported only where there is a CUDA device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 2048


@triton.jit
def _row_sum(first, others, out, count, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.load(first + at, mask=inside).to(tl.float32)
    for _ in tl.static_range(ROWS):
        total += tl.load(others + at, mask=inside).to(tl.float32)
        others += count
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def launch(first: torch.Tensor, others: torch.Tensor, out: torch.Tensor) -> None:
    """See :func:`megatron_mup.kernels.row_sum.row_sum`; tensors with elements."""
    count = out.numel()
    _row_sum[(triton.cdiv(count, _BLOCK),)](first, others, out, count, ROWS=len(others), BLOCK=_BLOCK)
