"""The Triton kernels behind :mod:`megatron_mup.kernels.shards`; imported only where there is a CUDA device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_mup.kernels.shards import TILE, Momentum, Pieces, Shards

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def _tile(tiles):
    """A row of the table: tensor, first element there and in the buffer, length, matrix."""
    row = tiles + tl.program_id(0).to(tl.int64) * 6
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)


@triton.jit
def _buffer(buffers, tiles, KIND: tl.constexpr, MANY: tl.constexpr):
    """The tile's buffer, of a table of addresses if there are many."""
    if MANY:
        number = tl.load(tiles + tl.program_id(0).to(tl.int64) * 6 + 5)
        buffers = tl.load(buffers + number).to(tl.pointer_type(KIND))
    return buffers


@triton.jit
def _elements(base, first, WHOLE: tl.constexpr, TILE: tl.constexpr):
    """Addresses of a tile's elements; those of whole tiles are told to be aligned, as the host has seen to."""
    addresses = base + (first + tl.arange(0, TILE))
    if WHOLE:
        addresses = tl.max_contiguous(tl.multiple_of(addresses, 16), TILE)
    return addresses


@triton.jit
def _load(addresses, length, WHOLE: tl.constexpr, TILE: tl.constexpr):
    if WHOLE:
        return tl.load(addresses)
    return tl.load(addresses, mask=tl.arange(0, TILE) < length, other=0.0)


@triton.jit
def _store(addresses, values, length, WHOLE: tl.constexpr, TILE: tl.constexpr):
    if WHOLE:
        tl.store(addresses, values)
    else:
        tl.store(addresses, values, mask=tl.arange(0, TILE) < length)


@triton.jit
def _lerp(start, end, weight):
    """As PyTorch computes it."""
    return tl.where(weight < 0.5, start + weight * (end - start), end - (end - start) * (1.0 - weight))


@triton.jit
def _advance_kernel(
    tiles,
    grads,
    momenta,
    out,
    squares,
    beta,
    weight,
    GRAD: tl.constexpr,
    MOMENTUM: tl.constexpr,
    KEEPS: tl.constexpr,
    EMA: tl.constexpr,
    NESTEROV: tl.constexpr,
    SQUARES: tl.constexpr,
    OUT: tl.constexpr,
    MANY: tl.constexpr,
    WHOLE: tl.constexpr,
    TILE: tl.constexpr,
):
    tensor, start, place, length, _ = _tile(tiles)
    grad = _elements(tl.load(grads + tensor).to(tl.pointer_type(GRAD)), start, WHOLE, TILE)
    update = _load(grad, length, WHOLE, TILE)
    if KEEPS:
        kept = _elements(tl.load(momenta + tensor).to(tl.pointer_type(MOMENTUM)), start, WHOLE, TILE)
        average = _load(kept, length, WHOLE, TILE).to(tl.float32)
        fresh = update.to(MOMENTUM).to(tl.float32)
        average = _lerp(average, fresh, weight) if EMA else beta * average + fresh
        stored = average.to(MOMENTUM)
        _store(kept, stored, length, WHOLE, TILE)
        update = stored
        if NESTEROV:
            average = stored.to(tl.float32)
            update = (_lerp(fresh, average, beta) if EMA else fresh + beta * average).to(MOMENTUM)
    written = update.to(OUT)
    _store(_elements(_buffer(out, tiles, OUT, MANY), place, WHOLE, TILE), written, length, WHOLE, TILE)
    if SQUARES:
        exact = written.to(tl.float32)
        tl.store(squares + tl.program_id(0), tl.sum(exact * exact, 0))


@triton.jit
def _move_kernel(tiles, source, out, squares, SQUARES: tl.constexpr, WHOLE: tl.constexpr, TILE: tl.constexpr):
    _, start, place, length, _ = _tile(tiles)
    moved = _load(_elements(source, start, WHOLE, TILE), length, WHOLE, TILE)
    _store(_elements(out, place, WHOLE, TILE), moved, length, WHOLE, TILE)
    if SQUARES:
        exact = moved.to(tl.float32)
        tl.store(squares + tl.program_id(0), tl.sum(exact * exact, 0))


@triton.jit
def _apply_kernel(
    tiles,
    values,
    results,
    gain,
    change,
    VALUE: tl.constexpr,
    RESULT: tl.constexpr,
    MANY: tl.constexpr,
    WHOLE: tl.constexpr,
    TILE: tl.constexpr,
):
    tensor, start, place, length, matrix = _tile(tiles)
    where = _elements(tl.load(values + tensor).to(tl.pointer_type(VALUE)), start, WHOLE, TILE)
    value = _load(where, length, WHOLE, TILE).to(tl.float32)
    buffer = _buffer(results, tiles, RESULT, MANY)
    result = _load(_elements(buffer, place, WHOLE, TILE), length, WHOLE, TILE).to(tl.float32)
    delta = result * tl.load(gain + matrix) + value * tl.load(change + matrix)
    _store(where, (value + delta).to(VALUE), length, WHOLE, TILE)


def _table_or(buffer: torch.Tensor | Shards) -> torch.Tensor | None:
    return buffer.table if isinstance(buffer, Shards) else buffer


def advance(
    grads: Shards,
    momenta: Shards | None,
    out: torch.Tensor | Shards,
    pieces: Pieces,
    momentum: Momentum,
    squared: bool = False,
) -> torch.Tensor | None:
    """Runs the kernel; arguments as for ``shards.advance``.

    Returns:
        If ``squared``, sums of squares of what was written, fp32 by tile, and a zero at the end.
    """
    count = sum(len(tiles) for _, tiles in pieces.tables)
    squares = torch.zeros(count + 1, device=pieces.tables[0][1].device) if squared and count else None
    first = 0
    for whole, tiles in pieces.tables:
        _advance_kernel[(len(tiles),)](
            tiles,
            grads.table,
            grads.table if momenta is None else momenta.table,
            _table_or(out),
            tiles if squares is None else squares[first:],
            momentum.beta,
            1 - momentum.beta,
            GRAD=_TYPES[grads.dtype],
            MOMENTUM=_TYPES[grads.dtype if momenta is None else momenta.dtype],
            KEEPS=momenta is not None,
            EMA=momentum.ema,
            NESTEROV=momentum.nesterov,
            SQUARES=squares is not None,
            OUT=_TYPES[out.dtype],
            MANY=isinstance(out, Shards),
            WHOLE=whole,
            TILE=TILE,
        )
        first += len(tiles)
    return squares


def move(source: torch.Tensor, out: torch.Tensor, pieces: Pieces, squared: bool = False) -> torch.Tensor | None:
    """Runs the kernel; arguments as for ``shards.move``. Returns what :func:`advance` does."""
    count = sum(len(tiles) for _, tiles in pieces.tables)
    squares = torch.zeros(count + 1, device=out.device) if squared and count else None
    first = 0
    for whole, tiles in pieces.tables:
        to = tiles if squares is None else squares[first:]
        _move_kernel[(len(tiles),)](tiles, source, out, to, SQUARES=squares is not None, WHOLE=whole, TILE=TILE)
        first += len(tiles)
    return squares


def apply(
    values: Shards, results: torch.Tensor | Shards, pieces: Pieces, gain: torch.Tensor, change: torch.Tensor
) -> None:
    """Runs the kernel; arguments as for ``shards.apply``."""
    for whole, tiles in pieces.tables:
        _apply_kernel[(len(tiles),)](
            tiles,
            values.table,
            _table_or(results),
            gain,
            change,
            VALUE=_TYPES[values.dtype],
            RESULT=_TYPES[results.dtype],
            MANY=isinstance(results, Shards),
            WHOLE=whole,
            TILE=TILE,
        )
