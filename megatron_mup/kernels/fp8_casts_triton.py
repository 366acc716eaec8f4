"""The Triton kernels behind :mod:`megatron_mup.kernels.fp8_casts`; imported only where there is a CUDA device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TILE = (64, 64)  # rows, columns
_WARPS = 4


@triton.jit
def _to_fp8(x, out, LIMIT: tl.constexpr):
    within = tl.minimum(x, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    within = tl.maximum(within, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return within.to(out.dtype.element_ty)


@triton.jit
def _transpose(x, rows, out, m, n, LIMIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    row, column = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    inside = (row < m)[:, None] & (column < n)[None, :]
    value = tl.load(x + row.to(tl.int64)[:, None] * n + column[None, :], mask=inside)
    if x.dtype.element_ty != out.dtype.element_ty:
        value = _to_fp8(value.to(tl.float32), out, LIMIT)
    if rows is not None:
        tl.store(rows + row.to(tl.int64)[:, None] * n + column[None, :], value, mask=inside)
    tl.store(out + column.to(tl.int64)[:, None] * m + row[None, :], tl.trans(value), mask=tl.trans(inside))


def transpose(x: torch.Tensor, out: torch.Tensor, rows: torch.Tensor | None = None) -> None:
    """See :func:`megatron_mup.kernels.fp8_casts.transposed`; all contiguous. ``rows`` gets the cast as well."""
    (m, n), (height, width) = x.shape, _TILE
    grid = triton.cdiv(n, width), triton.cdiv(m, height)
    limit = torch.finfo(out.dtype).max
    _transpose[grid](x, rows, out, m, n, LIMIT=limit, BM=height, BN=width, num_warps=_WARPS)
