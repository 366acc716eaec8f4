"""The Triton kernels behind :mod:`megatron_mup.kernels.fp8_casts`; imported only where there is a CUDA device.

SwiGLU's kernels write rows and leave transposes to a kernel that reads those. When the one of its result stored both,
from one conversion to FP8, ptxas 12.8 (of Triton 3.6, for an H100) took a quarter and more of the transpose's bytes
from registers in front of the instruction that fills them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TILE = (64, 64)  # rows, columns
_WARPS = 4
Scaling = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
"""A factor, where the largest value is noted, and where the factor's inverse goes; each None: values are cast as they
are."""


@triton.jit
def _to_fp8(x, out, LIMIT: tl.constexpr):
    within = tl.minimum(x, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    within = tl.maximum(within, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return within.to(out.dtype.element_ty)


@triton.jit
def _store(value, rows, row, column, m, n, LIMIT: tl.constexpr):
    inside = (row < m)[:, None] & (column < n)[None, :]
    tl.store(rows + row.to(tl.int64)[:, None] * n + column[None, :], _to_fp8(value, rows, LIMIT), mask=inside)


@triton.jit
def _transpose(x, rows, out, m, n, FACTOR: tl.constexpr, LIMIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    row, column = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    inside = (row < m)[:, None] & (column < n)[None, :]
    value = tl.load(x + row.to(tl.int64)[:, None] * n + column[None, :], mask=inside)
    if x.dtype.element_ty != out.dtype.element_ty:
        value = value.to(tl.float32)
        value = _to_fp8(value if FACTOR == 1 else value * FACTOR, out, LIMIT)
    if rows is not None:
        tl.store(rows + row.to(tl.int64)[:, None] * n + column[None, :], value, mask=inside)
    tl.store(out + column.to(tl.int64)[:, None] * m + row[None, :], tl.trans(value), mask=tl.trans(inside))


@triton.jit
def _gate_and_up(x, m, width, RUN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Rows and features of this program, which of them there are, and both parts of each in fp32."""
    row, feature = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    inside = (row < m)[:, None] & (feature < width)[None, :]
    place = feature // RUN * (2 * RUN) + feature % RUN
    at = row.to(tl.int64)[:, None] * (2 * width) + place[None, :]
    gate = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + at + RUN, mask=inside, other=0.0).to(tl.float32)
    return row, feature, inside, gate, up


@triton.jit
def _scaled(value, scale, largest, inverse):
    """By a factor that the device knows, the largest value noted; as it is where there is none."""
    if scale is not None:
        factor = tl.load(scale)
        tl.atomic_max(largest, tl.max(tl.abs(value)), sem="relaxed")
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(inverse, 1 / factor)
        value *= factor
    return value


@triton.jit
def _swiglu(
    x, rows, scale, largest, inverse, m, width, mult, weight,
    RUN: tl.constexpr, LIMIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    row, feature, _, gate, up = _gate_and_up(x, m, width, RUN, BM, BN)
    value = _scaled(gate * tl.sigmoid(gate * mult) * up * weight, scale, largest, inverse)
    _store(value, rows, row, feature, m, width, LIMIT)


@triton.jit
def _swiglu_backward(
    x, grad, rows, scale, largest, inverse, m, width, mult, weight,
    RUN: tl.constexpr, LIMIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    row, feature, inside, gate, up = _gate_and_up(x, m, width, RUN, BM, BN)
    d = tl.load(grad + row.to(tl.int64)[:, None] * width + feature[None, :], mask=inside, other=0.0).to(tl.float32)
    d *= weight
    share = tl.sigmoid(gate * mult)
    silu = gate * share
    d_gate = d * up * (share + mult * silu * (1 - share))
    # A run of gates and its run of ups, side by side again.
    pair = tl.join(tl.reshape(d_gate, (BM, BN // RUN, RUN)), tl.reshape(d * silu, (BM, BN // RUN, RUN)))
    value = _scaled(tl.reshape(tl.permute(pair, (0, 1, 3, 2)), (BM, 2 * BN)), scale, largest, inverse)
    column = tl.program_id(0) * (2 * BN) + tl.arange(0, 2 * BN)
    _store(value, rows, row, column, m, 2 * width, LIMIT)


def transpose(x: torch.Tensor, out: torch.Tensor, rows: torch.Tensor | None = None, factor: float = 1.0) -> None:
    """See :func:`megatron_mup.kernels.fp8_casts.transposed`; all contiguous. ``rows`` gets the cast as well, ``factor``
    is on the values of what is cast."""
    (m, n), (height, width) = x.shape, _TILE
    grid = triton.cdiv(n, width), triton.cdiv(m, height)
    limit = torch.finfo(out.dtype).max
    _transpose[grid](x, rows, out, m, n, FACTOR=factor, LIMIT=limit, BM=height, BN=width, num_warps=_WARPS)


def swiglu(
    x: torch.Tensor,
    grad: torch.Tensor | None,
    run: int,
    rows: torch.Tensor,
    columns: torch.Tensor,
    mult: float = 1.0,
    weight: float = 1.0,
    scaling: Scaling = (None, None, None),
) -> None:
    """``weight`` times SwiGLU with ``mult`` in its sigmoid, or with ``grad`` the gradient of its input; scaled, into
    ``rows`` and its transpose ``columns``. All contiguous."""
    m, width = x.shape[0], x.shape[1] // 2
    height, features = _TILE
    kernel, sources = (_swiglu, (x,)) if grad is None else (_swiglu_backward, (x, grad))
    kernel[(triton.cdiv(width, features), triton.cdiv(m, height))](
        *sources, rows, *scaling, m, width, mult, weight,
        RUN=run, LIMIT=torch.finfo(rows.dtype).max, BM=height, BN=features, num_warps=_WARPS,
    )  # fmt: skip
    transpose(rows, columns)
