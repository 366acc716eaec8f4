"""The Triton kernels behind :mod:`megatron_mup.kernels.adamw`; imported only where there is a CUDA device."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

_BLOCK = 1024  # elements of a program
_PARTS = 1024  # partial sums at a time
_WIDTH = 8  # numbers in a row of the table: five addresses, length, first program, place


@triton.jit
def _update(
    value,
    grad,
    exp_avg,
    exp_avg_sq,
    copy,
    at,
    inside,
    factor,
    decay,
    size,
    eps,
    beta1,
    beta2,
    root,
    COPIES: tl.constexpr,
):
    """Steps a block; gives the sum of its gradients' squares."""
    raw = tl.load(grad + at, mask=inside, other=0).to(tl.float32)
    g = raw * factor
    mean = tl.load(exp_avg + at, mask=inside).to(tl.float32)
    square = tl.load(exp_avg_sq + at, mask=inside).to(tl.float32)
    x = tl.load(value + at, mask=inside).to(tl.float32)
    mean += (1 - beta1) * (g - mean)
    square = beta2 * square + (1 - beta2) * g * g
    x = x * decay - size * mean / (tl.sqrt(square) / root + eps)
    tl.store(exp_avg + at, mean.to(exp_avg.dtype.element_ty), mask=inside)
    tl.store(exp_avg_sq + at, square.to(exp_avg_sq.dtype.element_ty), mask=inside)
    tl.store(value + at, x.to(value.dtype.element_ty), mask=inside)
    if COPIES:
        tl.store(copy + at, x.to(copy.dtype.element_ty), mask=inside)
    return tl.sum(raw * raw, 0)


@triton.jit
def _adamw(
    table,
    numbers,
    owners,
    scale,
    parts,
    beta1,
    beta2,
    root,
    VALUE: tl.constexpr,
    GRAD: tl.constexpr,
    MEAN: tl.constexpr,
    SQUARE: tl.constexpr,
    COPY: tl.constexpr,
    SCALES: tl.constexpr,
    MEASURES: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    owner = tl.load(owners + program).to(tl.int64)
    row = table + owner * WIDTH
    value = tl.multiple_of(tl.load(row).to(tl.pointer_type(VALUE)), VECTOR)
    grad = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(GRAD)), VECTOR)
    exp_avg = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(MEAN)), VECTOR)
    exp_avg_sq = tl.multiple_of(tl.load(row + 3).to(tl.pointer_type(SQUARE)), VECTOR)
    COPIES: tl.constexpr = COPY is not None
    copy = tl.multiple_of(tl.load(row + 4).to(tl.pointer_type(COPY)), VECTOR) if COPIES else value
    numel, first = tl.load(row + 5), tl.load(row + 6)
    decay, size, eps = tl.load(numbers + owner * 3), tl.load(numbers + owner * 3 + 1), tl.load(numbers + owner * 3 + 2)
    factor = 1.0
    if SCALES:
        factor = tl.load(scale)
    start = (program - first) * BLOCK
    value, grad, exp_avg, exp_avg_sq, copy = (
        value + start,
        grad + start,
        exp_avg + start,
        exp_avg_sq + start,
        copy + start,
    )
    at, left = tl.arange(0, BLOCK), numel - start
    # Apart, so that all blocks but a tensor's last move whole vectors.
    if left >= BLOCK:
        whole = tl.full([BLOCK], True, tl.int1)
        total = _update(
            value, grad, exp_avg, exp_avg_sq, copy, at, whole, factor, decay, size, eps, beta1, beta2, root, COPIES
        )
    else:
        inside = at < left
        total = _update(
            value, grad, exp_avg, exp_avg_sq, copy, at, inside, factor, decay, size, eps, beta1, beta2, root, COPIES
        )
    if MEASURES:
        tl.store(parts + program, total)


@triton.jit
def _sum_parts(table, parts, squares, programs, tensors, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """Adds up the partial sums of a tensor, always in the same order."""
    owner = tl.program_id(0)
    row = table + owner * WIDTH
    first = tl.load(row + 6)
    end = tl.load(row + WIDTH + 6, mask=owner + 1 < tensors, other=programs)
    total = tl.zeros([PARTS], tl.float32)
    for start in range(first, end, PARTS):
        at = start + tl.arange(0, PARTS)
        total += tl.load(parts + at, mask=at < end, other=0)
    tl.store(squares + tl.load(row + 7), tl.sum(total, 0))


@functools.lru_cache(maxsize=16)
def _programs(lengths: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, list[int]]:
    """Which tensor each program steps, on the device, and the first program of each tensor."""
    counts = torch.tensor([triton.cdiv(length, _BLOCK) for length in lengths])
    owners = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), counts)
    return owners.to(device), (counts.cumsum(0) - counts).tolist()


def _to_device(rows: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A table of the host's, without waiting for the device."""
    table = torch.tensor(rows, dtype=dtype, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)


def launch(
    tensors: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]],
    numbers: Sequence[tuple[float, float, float]],
    places: Sequence[int],
    scale: torch.Tensor | None,
    squares: torch.Tensor | None,
    *,
    betas: tuple[float, float],
    root: float,
    vector: int,
) -> None:
    """Steps tensors whose precisions are alike; see :func:`megatron_mup.kernels.adamw.adamw_`.

    Args:
        tensors: value, gradient, both moments and copy of each.
        numbers: decay, size of the step and epsilon of each.
        places: where the sum of each gradient's squares goes in ``squares``.
        scale, squares: as there.
        betas: decays of the moments.
        root: ``sqrt(1 - betas[1]^t)``.
        vector: bytes that every address is a multiple of.
    """
    value, grad, mean, square, copy = tensors[0]
    owners, firsts = _programs(tuple(each[0].numel() for each in tensors), value.device)
    rows = [
        [*(0 if part is None else part.data_ptr() for part in each), each[0].numel(), first, place]
        for each, first, place in zip(tensors, firsts, places, strict=True)
    ]
    table = _to_device(rows, torch.int64, value.device)
    programs = len(owners)
    parts = owners if squares is None else torch.empty(programs, dtype=torch.float32, device=value.device)
    _adamw[(programs,)](
        table,
        _to_device(numbers, torch.float32, value.device),
        owners,
        parts if scale is None else scale,
        parts,
        *betas,
        root,
        VALUE=_type(value),
        GRAD=_type(grad),
        MEAN=_type(mean),
        SQUARE=_type(square),
        COPY=None if copy is None else _type(copy),
        SCALES=scale is not None,
        MEASURES=squares is not None,
        VECTOR=vector,
        WIDTH=_WIDTH,
        BLOCK=_BLOCK,
    )
    if squares is not None:
        _sum_parts[(len(rows),)](table, parts, squares, programs, len(rows), WIDTH=_WIDTH, PARTS=_PARTS)


def _type(tensor: torch.Tensor) -> tl.dtype:
    return getattr(tl, str(tensor.dtype).removeprefix("torch."))
