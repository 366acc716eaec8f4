"""The Triton kernel behind :mod:`megatron_mup.kernels.symmetric`; imported only where there is a CUDA device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_mup.kernels.late import run
from megatron_mup.kernels.symmetric import Product

_CELL = 128  # the result is cut into cells of this side
TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True)
class Tuning:
    """How the kernel goes about it.

    Attributes:
        depth: columns of the operands that are multiplied at a time.
        band: columns of pairs that programs go through together.
        warps, stages: of a program.
        specialize: whether loads and products have warps of their own.
    """

    depth: int = 64
    band: int = 8
    warps: int = 8
    stages: int = 4
    specialize: bool = False


TUNING = Tuning()
"""The best of benchmarks/symmetric.py on an H100, by rows and by columns alike."""


@triton.jit
def _pair(t, columns, BAND: tl.constexpr):
    """Row of cells ``i`` and column of pairs ``j`` of program ``t``: all pairs that begin on or above the diagonal.

    Bands of BAND columns, row by row inside a band, so that programs that run at a time share rows of both operands.
    Column j has 2 j + 1 pairs, so a band starts at a square.
    """
    band = (tl.sqrt(t.to(tl.float32)) / BAND).to(tl.int32)
    band = tl.where(band * band * (BAND * BAND) > t, band - 1, band)  # the root is rounded
    band = tl.where((band + 1) * (band + 1) * (BAND * BAND) <= t, band + 1, band)
    first = band * BAND
    width = tl.minimum(BAND, columns - first)
    t -= first * first
    i = t // width
    j = first + t % width
    t -= width * (2 * first + 1)
    for step in tl.static_range(1, BAND):  # the staircase: each further column has two more rows
        left = width - step
        if (t >= 0) & (t < 2 * left):
            i = 2 * first + 2 * step - 1 + t // left
            j = first + step + t % left
        t -= 2 * tl.maximum(left, 0)
    return i, j


@triton.jit
def store_cell(
    acc,
    c,
    d,
    scale,
    alpha,
    beta,
    diagonal,
    matrix,
    i,
    j,
    HAS_D: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    CELL: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Writes cell (i, j), j >= i, and its mirror image; on the diagonal the upper half is the one that counts."""
    factor = tl.load(scale + matrix) if HAS_SCALE else 1.0
    out = factor * alpha * acc
    if HAS_D:
        out += factor * beta * d.load([matrix, i * CELL, j * CELL]).reshape(CELL, CELL).to(tl.float32)
    if i == j:
        row = tl.arange(0, CELL)[:, None]
        column = tl.arange(0, CELL)[None, :]
        rounded = (out + tl.where(row == column, factor * diagonal, 0.0)).to(DTYPE)
        rounded = tl.where(row <= column, rounded, rounded.T)
        c.store([matrix, i * CELL, j * CELL], rounded.reshape(1, CELL, CELL))
    else:
        rounded = out.to(DTYPE)
        c.store([matrix, i * CELL, j * CELL], rounded.reshape(1, CELL, CELL))
        c.store([matrix, j * CELL, i * CELL], rounded.T.reshape(1, CELL, CELL))


@triton.jit
def tile_of(
    a,
    b,
    matrix,
    row,
    column,
    k,
    COLUMNS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    DEPTH: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    """fp32 tile [M, N] of A B^T, or of A^T B."""
    acc = tl.zeros((M, N), dtype=tl.float32)
    for at in tl.range(0, k, DEPTH, warp_specialize=SPECIALIZE):
        if COLUMNS:
            left = a.load([matrix, at, row]).reshape(DEPTH, M).T
            right = b.load([matrix, at, column]).reshape(DEPTH, N)
        else:
            left = a.load([matrix, row, at]).reshape(M, DEPTH)
            right = b.load([matrix, column, at]).reshape(N, DEPTH).T
        acc = tl.dot(left, right, acc)
    return acc


@triton.jit(do_not_specialize=["alpha", "beta", "diagonal", "k", "matrices", "columns"])
def _kernel(
    a,
    b,
    b_cell,
    c,
    d,
    scale,
    alpha,
    beta,
    diagonal,
    k,
    matrices,
    columns,
    COLUMNS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    CELL: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One program computes two cells side by side, the last ones each one cell of a diagonal: the small ones last."""
    program = tl.program_id(0)
    pairs = columns * columns
    if program < matrices * pairs:
        matrix = program // pairs
        i, j = _pair(program % pairs, columns, BAND)
        two = tile_of(a, b, matrix, i * CELL, 2 * j * CELL, k, COLUMNS, CELL, 2 * CELL, DEPTH, SPECIALIZE)
        left, right = tl.split(tl.permute(tl.reshape(two, (CELL, 2, CELL)), (0, 2, 1)))
        store_cell(left, c, d, scale, alpha, beta, diagonal, matrix, i, 2 * j, HAS_D, HAS_SCALE, CELL, DTYPE)
        store_cell(right, c, d, scale, alpha, beta, diagonal, matrix, i, 2 * j + 1, HAS_D, HAS_SCALE, CELL, DTYPE)
    else:
        rest = program - matrices * pairs
        matrix = rest // columns
        i = 2 * (rest % columns) + 1
        one = tile_of(a, b_cell, matrix, i * CELL, i * CELL, k, COLUMNS, CELL, CELL, DEPTH, SPECIALIZE)
        store_cell(one, c, d, scale, alpha, beta, diagonal, matrix, i, i, HAS_D, HAS_SCALE, CELL, DTYPE)


def launch(product: Product, tuning: Tuning | None = None) -> None:
    """Runs the kernel."""
    a, b, out, d, scale, alpha, beta, diagonal, by_columns = product
    matrices, n = out.shape[:2]
    columns = triton.cdiv(n, 2 * _CELL)
    tuning = tuning or TUNING
    cell = [1, tuning.depth, _CELL] if by_columns else [1, _CELL, tuning.depth]
    pair = [1, tuning.depth, 2 * _CELL] if by_columns else [1, 2 * _CELL, tuning.depth]
    left = TensorDescriptor.from_tensor(a, cell)
    target = TensorDescriptor.from_tensor(out, [1, _CELL, _CELL])
    run(
        _kernel,
        matrices * columns * (columns + 1),
        left,
        TensorDescriptor.from_tensor(b, pair),
        left if a is b else TensorDescriptor.from_tensor(b, cell),
        target,
        target if d is None else TensorDescriptor.from_tensor(d, [1, _CELL, _CELL]),
        out if scale is None else scale,
        alpha,
        beta,
        diagonal,
        product.depth,
        matrices,
        columns,
        COLUMNS=by_columns,
        HAS_D=d is not None,
        HAS_SCALE=scale is not None,
        CELL=_CELL,
        DEPTH=tuning.depth,
        BAND=tuning.band,
        SPECIALIZE=tuning.specialize,
        DTYPE=TYPES[out.dtype],
        num_warps=tuning.warps,
        num_stages=tuning.stages,
    )
