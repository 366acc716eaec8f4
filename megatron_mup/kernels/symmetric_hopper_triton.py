"""The symmetric product for Hopper in Gluon, Triton's lower level; imported only where there is such a device.

The result is cut into cells. A program multiplies one row of cells with two columns at a time and goes from pair to
pair; a warp of its own loads, so that while a pair is stored the operands of the next one are on their way. Other GPUs
take the kernel in ``symmetric_triton.py``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from megatron_mup.kernels.late import run
from megatron_mup.kernels.symmetric import Product

CELL = gl.constexpr(128)  # side of a cell
DEPTH = gl.constexpr(64)  # columns of the operands that are multiplied at a time
SLOTS = gl.constexpr(4)  # of shared memory, for as many steps' operands
_TYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}
_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)


def pairs_of(side: int) -> int:
    """Pairs of cells of a matrix of ``side`` by ``side`` cells, where mirror images count once."""
    return (side * (side + 1) // 2 + 1) // 2


@gluon.jit
def _cells(t, side):
    """Row of cells ``i`` and columns ``j`` and ``k`` of pair ``t``; the columns agree where one cell is left over.

    Row i takes the cells of columns i, i + 1, ... modulo ``side``, half of them, so that of a cell and its mirror image
    one is taken. Half the rows or all take an odd number. Those go two by two: the upper one leaves the cell between
    them, its second, to the lower one, which takes it as the cell before its first.
    """
    half = side // 2
    first = gl.where(side % 2 == 1, side, half)  # rows that take half + 1; the others take half
    tail = half % 2  # whether the others' number is the odd one
    count = half + 1 - tail
    less = count // 2  # pairs of an upper row; a lower one has one more
    odd_first = tail * first
    odd_rows = gl.where(tail == 1, side - first, first)
    u = t - (odd_rows // 2) * count
    v = u - (odd_rows % 2) * (less + 1)
    row = 0
    one = 0
    two = 0
    if u < 0:
        couple = t // count
        within = t - couple * count
        row = odd_first + 2 * couple
        if within >= less:
            row += 1
            one = 2 * (within - less) - 1
            two = one + 1
        else:
            one = gl.where(within == 0, 0, 2 * within + 1)
            two = 2 * within + 2
    elif v < 0:  # an odd row without another
        row = odd_first + odd_rows - 1
        one = 2 * u
        two = gl.minimum(one + 1, count - 1)
    else:
        each = gl.maximum((half + tail) // 2, 1)
        further = v // each
        row = first * (1 - tail) + further
        one = 2 * (v - further * each)
        two = one + 1
    j = row + one
    k = row + two
    j = gl.where(j < 0, j + side, gl.where(j >= side, j - side, j))
    return row, j, gl.where(k >= side, k - side, k)


@gluon.jit
def _place(item, whole, pairs, side):
    """Matrix, row and columns of an item: ``whole`` pairs come first, then single cells, whose columns agree."""
    cell = item - whole
    t = gl.where(cell >= 0, whole + cell // 2, item)
    matrix = t // pairs
    i, j, k = _cells(t - matrix * pairs, side)
    if cell >= 0:
        j = gl.where(cell % 2 == 0, j, k)
        k = j
    return matrix, i, j, k


@gluon.jit
def _cell_in(memory, number, like):
    """Memory for a cell, of the type and layout of ``like``, in the slot of ``number``."""
    return memory.index(number % SLOTS)._reinterpret(like.dtype, like.block_type.shape, like.layout)


@gluon.jit
def _await(barriers, number, flip):
    mbarrier.wait(barriers.index(number % SLOTS), ((number // SLOTS) & 1) ^ flip)


@gluon.jit
def _free(empty, number, needed):
    mbarrier.arrive(empty.index((number + SLOTS) % SLOTS), count=1, pred=needed)


@gluon.jit
def _load(a, b, d, memory, sizes, HAS_D: gl.constexpr, COLUMNS: gl.constexpr):
    """What the loading warp does. An item takes a slot per step, and two that D comes to and cells are stored from."""
    HALVES: gl.constexpr = [2, 1, DEPTH, CELL] if COLUMNS else [2, 1, CELL, DEPTH]
    a_memory, b_memory, ready, empty = memory
    steps, pairs, side, whole, items = sizes
    number = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        matrix, i, j, k = _place(item, whole, pairs, side)
        for step in range(steps):
            bar = ready.index(number % SLOTS)
            left = a_memory.index(number % SLOTS)
            right = b_memory.index(number % SLOTS)._reinterpret(b.dtype, HALVES, b.layout)
            _await(empty, number, 1)
            mbarrier.expect(bar, 2 * a.block_type.nbytes, pred=j == k)
            mbarrier.expect(bar, 3 * a.block_type.nbytes, pred=j != k)
            at = step * DEPTH
            if COLUMNS:
                tma.async_copy_global_to_shared(a, [matrix, at, i * CELL], bar, left)
                tma.async_copy_global_to_shared(b, [matrix, at, j * CELL], bar, right.index(0))
                tma.async_copy_global_to_shared(b, [matrix, at, k * CELL], bar, right.index(1), pred=j != k)
            else:
                tma.async_copy_global_to_shared(a, [matrix, i * CELL, at], bar, left)
                tma.async_copy_global_to_shared(b, [matrix, j * CELL, at], bar, right.index(0))
                tma.async_copy_global_to_shared(b, [matrix, k * CELL, at], bar, right.index(1), pred=j != k)
            number += 1
        for second in gl.static_range(2):
            bar = ready.index(number % SLOTS)
            _await(empty, number, 1)
            if HAS_D:
                column = k if second else j
                mbarrier.expect(bar, d.block_type.nbytes)
                cell = _cell_in(b_memory, number, d)
                tma.async_copy_global_to_shared(d, [matrix, i * CELL, column * CELL], bar, cell)
            else:
                mbarrier.arrive(bar, count=1)
            number += 1


@gluon.jit
def _multiply(b, memory, number, following, sizes, COLUMNS: gl.constexpr, WIDTH: gl.constexpr):
    """fp32 [CELL, WIDTH] of the product, the number after its slots, and the place of the following item."""
    HALVES: gl.constexpr = [2, 1, DEPTH, CELL] if COLUMNS else [2, 1, CELL, DEPTH]
    a_memory, b_memory, ready, empty = memory
    steps, pairs, side, whole, _ = sizes
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, WIDTH, 16])
    acc = gl.zeros((CELL, WIDTH), gl.float32, layout)
    for step in range(steps):
        _await(ready, number, 0)
        left = a_memory.index(number % SLOTS)
        right = b_memory.index(number % SLOTS)
        if WIDTH == CELL:
            right = right._reinterpret(b.dtype, HALVES, b.layout).index(0)
        if COLUMNS:
            left = left.reshape([DEPTH, CELL]).permute((1, 0))
            right = right.reshape([DEPTH, WIDTH])
        else:
            left = left.reshape([CELL, DEPTH])
            right = right.reshape([WIDTH, DEPTH]).permute((1, 0))
        acc = warpgroup_mma(left, right, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        if step == 0:
            tma.store_wait(0)  # the last item's second cell has left its slot
        _free(empty, number - 1, number > 0)
        number += 1
    matrix, i, j, k = _place(following, whole, pairs, side)  # while the last product runs
    acc = warpgroup_mma_wait(0, deps=(acc,))
    _free(empty, number - 1, True)
    return acc, number, matrix, i, j, k


@gluon.jit
def _value(acc, b_memory, d, ready, number, alpha, beta, HAS_D: gl.constexpr):
    """``alpha`` times a cell's product, plus ``beta`` times its cell of D, which lies in the slot of ``number``."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, CELL, 16])
    out = gl.convert_layout(acc, layout, assert_trivial=True) * alpha
    _await(ready, number, 0)
    if HAS_D:
        cell = _cell_in(b_memory, number, d).reshape([CELL, CELL])
        out += beta * cell.load(layout).to(gl.float32)
    return out


@gluon.jit
def _store(out, c, straight, turned, diagonal, matrix, i, j, DTYPE: gl.constexpr):
    """Stores cell (i, j) and its mirror image; on the diagonal the upper half is the one that counts."""
    layout: gl.constexpr = out.type.layout
    flat = straight.reshape([CELL, CELL])
    mirror = turned.reshape([CELL, CELL])
    if i == j:
        row = gl.arange(0, CELL, gl.SliceLayout(1, layout))[:, None]
        column = gl.arange(0, CELL, gl.SliceLayout(0, layout))[None, :]
        rounded = (out + gl.where(row == column, diagonal, 0.0)).to(DTYPE)
        mirror.permute((1, 0)).store(rounded)
        flat.store(gl.where(row <= column, rounded, mirror.load(layout)))
        fence_async_shared()
        tma.async_copy_shared_to_global(c, [matrix, i * CELL, j * CELL], straight)
    else:
        rounded = out.to(DTYPE)
        flat.store(rounded)
        mirror.permute((1, 0)).store(rounded)
        fence_async_shared()
        tma.async_copy_shared_to_global(c, [matrix, i * CELL, j * CELL], straight)
        tma.async_copy_shared_to_global(c, [matrix, j * CELL, i * CELL], turned)


@gluon.jit
def _compute(
    b,
    c,
    d,
    scale,
    terms,
    memory,
    turned,
    sizes,
    HAS_D: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    COLUMNS: gl.constexpr,
    DTYPE: gl.constexpr,
):
    """What the other warps do."""
    alpha, beta, diagonal = terms
    _, b_memory, ready, empty = memory
    _, pairs, side, whole, items = sizes
    number = 0
    matrix, i, j, k = _place(gl.program_id(0), whole, pairs, side)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        following = item + gl.num_programs(0)
        m2, i2, j2, k2 = matrix, i, j, k
        factor = gl.load(scale + matrix) if HAS_SCALE else 1.0
        al = factor * alpha
        be = factor * beta
        di = factor * diagonal
        if j == k:
            acc, number, m2, i2, j2, k2 = _multiply(b, memory, number, following, sizes, COLUMNS, CELL)
            one = _value(acc, b_memory, d, ready, number, al, be, HAS_D)
            _store(one, c, _cell_in(b_memory, number, c), turned, di, matrix, i, j, DTYPE)
            _await(ready, number + 1, 0)
            tma.store_wait(0)
            _free(empty, number, True)
        else:
            pair, number, m2, i2, j2, k2 = _multiply(b, memory, number, following, sizes, COLUMNS, 2 * CELL)
            left, right = pair.reshape((CELL, 2, CELL)).permute((0, 2, 1)).split()
            one = _value(left, b_memory, d, ready, number, al, be, HAS_D)
            _store(one, c, _cell_in(b_memory, number, c), turned, di, matrix, i, j, DTYPE)
            two = _value(right, b_memory, d, ready, number + 1, al, be, HAS_D)
            tma.store_wait(0)
            _free(empty, number, True)
            _store(two, c, _cell_in(b_memory, number + 1, c), turned, di, matrix, i, k, DTYPE)
        number += 2
        matrix, i, j, k = m2, i2, j2, k2
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["alpha", "beta", "diagonal", "steps", "pairs", "side", "whole", "items"])
def _kernel(
    a,
    b,
    c,
    d,
    scale,
    alpha,
    beta,
    diagonal,
    steps,
    pairs,
    side,
    whole,
    items,
    HAS_D: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    COLUMNS: gl.constexpr,
    DTYPE: gl.constexpr,
):
    ONE: gl.constexpr = [SLOTS, 1, DEPTH, CELL] if COLUMNS else [SLOTS, 1, CELL, DEPTH]
    TWO: gl.constexpr = [SLOTS, 1, DEPTH, 2 * CELL] if COLUMNS else [SLOTS, 1, 2 * CELL, DEPTH]
    a_memory = gl.allocate_shared_memory(a.dtype, ONE, a.layout)
    b_memory = gl.allocate_shared_memory(b.dtype, TWO, b.layout)
    turned = gl.allocate_shared_memory(c.dtype, c.block_type.shape, c.layout)  # for a cell's mirror image
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    terms = alpha, beta, diagonal
    memory = a_memory, b_memory, ready, empty
    sizes = steps, pairs, side, whole, items
    gl.warp_specialize(
        [
            (_compute, (b, c, d, scale, terms, memory, turned, sizes, HAS_D, HAS_SCALE, COLUMNS, DTYPE)),
            (_load, (a, b, d, memory, sizes, HAS_D, COLUMNS)),
        ],
        [1],
        [40],
    )


_compiled: dict[tuple[Any, ...], Any] = {}
"""Kernels by all that they are compiled for: to find that out takes Triton longer than the rest of a launch."""


@functools.cache
def _programs(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(product: Product, one_each: bool = False) -> None:
    """Runs the kernel, with one program for each multiprocessor, or ``one_each`` for items."""
    a, b, out, d, scale, *factors, by_columns = product
    matrices, n = out.shape[:2]
    side = -(-n // CELL.value)
    pairs, programs = pairs_of(side), _programs(out.device)
    rest = matrices * pairs % programs
    # Pairs left over for less than half of the programs are taken apart, so that twice as many end in half the time.
    apart = rest if 2 * rest <= programs else 0
    whole = matrices * pairs - apart
    items = whole + 2 * apart
    box = [1, DEPTH.value, CELL.value] if by_columns else [1, CELL.value, DEPTH.value]
    left = TensorDescriptor.from_tensor(a, box, _LAYOUT)
    target = TensorDescriptor.from_tensor(out, [1, CELL.value, CELL.value], _LAYOUT)
    arguments = (
        left,
        left if a is b else TensorDescriptor.from_tensor(b, box, _LAYOUT),
        target,
        target if d is None else TensorDescriptor.from_tensor(d, [1, CELL.value, CELL.value], _LAYOUT),
        out if scale is None else scale,
        *factors,
        -(-product.depth // DEPTH.value),
        pairs,
        side,
        whole,
        items,
    )
    constants = {
        "HAS_D": d is not None,
        "HAS_SCALE": scale is not None,
        "COLUMNS": by_columns,
        "DTYPE": _TYPES[out.dtype],
    }
    addend = None if d is None else d.dtype
    aligned = arguments[4].data_ptr() % 16 == 0
    key = (out.device, a.dtype, b.dtype, out.dtype, addend, by_columns, scale is None, aligned)
    grid = items if one_each else min(programs, items)
    if key in _compiled:
        _compiled[key][(grid, 1, 1)](*arguments, *constants.values())
    else:
        compiled = run(_kernel, grid, *arguments, **constants, num_warps=8, maxnreg=168)
        if compiled is not None:
            _compiled[key] = compiled
