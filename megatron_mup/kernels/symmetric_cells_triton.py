"""The symmetric product of few cells, one per program, in Triton; imported only where there is a CUDA device.

The other kernels take cells in pairs. Where pairs are more than half as many as multiprocessors and no more than those,
many of these have none: a matrix of 2048 x 2048 has 68 pairs for an H100's 132. Its 136 cells are four too many, and
who has two takes twice as long, so the last cells of the diagonal are cut: three tiles of a quarter each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_mup.kernels.late import run
from megatron_mup.kernels.symmetric import Product
from megatron_mup.kernels.symmetric_triton import TYPES, store_cell, tile_of

_CELL, _DEPTH = 128, 64
_WARPS, _STAGES = 4, 3  # so that two programs find room on a multiprocessor


@triton.jit(do_not_specialize=["alpha", "beta", "diagonal", "k", "side", "upper", "whole"])
def _kernel(
    a,
    b,
    c,
    d,
    a_half,
    b_half,
    c_half,
    d_half,
    scale,
    alpha,
    beta,
    diagonal,
    k,
    side,
    upper,
    whole,
    COLUMNS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    CELL: tl.constexpr,
    DEPTH: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """First the ``upper`` cells above diagonals, then those on diagonals, of all ``whole`` cells; then tiles."""
    program = tl.program_id(0)
    HALF: tl.constexpr = CELL // 2
    if program < whole:
        if program < upper:
            each = side * (side - 1) // 2
            matrix = program // each
            t = program % each
            j = ((1.0 + tl.sqrt(1.0 + 8.0 * t.to(tl.float32))) / 2).to(tl.int32)
            j = tl.where(j * (j - 1) > 2 * t, j - 1, j)  # the root is rounded
            j = tl.where(j * (j + 1) <= 2 * t, j + 1, j)
            i = t - j * (j - 1) // 2
        else:
            matrix = (program - upper) // side
            i = (program - upper) % side
            j = i
        cell = tile_of(a, b, matrix, i * CELL, j * CELL, k, COLUMNS, CELL, CELL, DEPTH, False)
        store_cell(cell, c, d, scale, alpha, beta, diagonal, matrix, i, j, HAS_D, HAS_SCALE, CELL, DTYPE)
    else:
        rest = program - whole
        place = whole - upper + rest // 3
        matrix = place // side
        row = 2 * (place % side) + rest % 3 // 2
        column = 2 * (place % side) + (rest % 3 + 1) // 2
        tile = tile_of(a_half, b_half, matrix, row * HALF, column * HALF, k, COLUMNS, HALF, HALF, DEPTH, False)
        store_cell(
            tile, c_half, d_half, scale, alpha, beta, diagonal, matrix, row, column, HAS_D, HAS_SCALE, HALF, DTYPE
        )


def launch(product: Product, programs: int | None = None) -> None:
    """Runs the kernel. Cells past ``programs``, by default the multiprocessors, are cut; at most those on diagonals."""
    a, b, out, d, scale, alpha, beta, diagonal, by_columns = product
    matrices, n = out.shape[:2]
    side = triton.cdiv(n, _CELL)
    upper, diagonals = matrices * side * (side - 1) // 2, matrices * side
    programs = programs or torch.cuda.get_device_properties(out.device).multi_processor_count
    cut = min(max(upper + diagonals - programs, 0), diagonals)
    descriptors = []
    for size in (_CELL, _CELL // 2):
        box = [1, _DEPTH, size] if by_columns else [1, size, _DEPTH]
        left, target = TensorDescriptor.from_tensor(a, box), TensorDescriptor.from_tensor(out, [1, size, size])
        descriptors += [
            left,
            left if a is b else TensorDescriptor.from_tensor(b, box),
            target,
            target if d is None else TensorDescriptor.from_tensor(d, [1, size, size]),
        ]
    run(
        _kernel,
        upper + diagonals + 2 * cut,
        *descriptors,
        out if scale is None else scale,
        alpha,
        beta,
        diagonal,
        product.depth,
        side,
        upper,
        upper + diagonals - cut,
        COLUMNS=by_columns,
        HAS_D=d is not None,
        HAS_SCALE=scale is not None,
        CELL=_CELL,
        DEPTH=_DEPTH,
        DTYPE=TYPES[out.dtype],
        num_warps=_WARPS,
        num_stages=_STAGES,
    )
