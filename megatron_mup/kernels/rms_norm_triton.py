"""The Triton kernels behind :mod:`megatron_mup.kernels.rms_norm`; imported only where there is a CUDA device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_WARPS = 32  # on a processor at a time: enough reads under way to fill the memory's bandwidth
_PER_WARP = 256  # channels: sixteen bytes of bf16 for each thread
_COLUMNS, _ROWS = 16, 64  # of partial sums at a time


@triton.jit
def _backward(x, weight, grad, skip, out, partial, rows, columns, eps, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    program, column = tl.program_id(0), tl.arange(0, BLOCK)
    first = program.to(tl.int64)
    inside = column < columns
    w = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    gain = tl.zeros([BLOCK], tl.float32)
    for step in range(0, rows - program, PROGRAMS):
        at = (first + step) * columns + column
        value = tl.load(x + at, mask=inside, other=0).to(tl.float32)
        g = tl.load(grad + at, mask=inside, other=0).to(tl.float32)
        s = tl.load(skip + at, mask=inside, other=0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(value * value, 0) / columns + eps)
        unit = value * inverse
        gain += g * unit
        scaled = g * w
        d = s + inverse * (scaled - unit * (tl.sum(unit * scaled, 0) / columns))
        tl.store(out + at, d.to(out.dtype.element_ty), mask=inside)
    tl.store(partial + program * columns + column, gain, mask=inside)


@triton.jit
def _sum_rows(partial, out, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        total += tl.load(partial + row[:, None] * columns + column[None, :], mask=inside, other=0)
    tl.store(out + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < columns)


def launch(
    x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, skip: torch.Tensor, out: torch.Tensor, eps: float
) -> torch.Tensor:
    """See :func:`megatron_mup.kernels.rms_norm.rms_norm_backward`; all contiguous. Returns the weight's gradient."""
    columns = x.shape[-1]
    rows = x.numel() // columns
    block = triton.next_power_of_2(columns)
    warps = min(16, max(1, block // _PER_WARP))
    programs = max(1, min(rows, _processors(x.device) * (_WARPS // warps)))
    partial = torch.empty(programs, columns, dtype=torch.float32, device=x.device)
    _backward[(programs,)](
        x, weight, grad, skip, out, partial, rows, columns, eps, PROGRAMS=programs, BLOCK=block, num_warps=warps
    )
    gain = torch.empty_like(weight)
    _sum_rows[(triton.cdiv(columns, _COLUMNS),)](partial, gain, programs, columns, ROWS=_ROWS, COLUMNS=_COLUMNS)
    return gain


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
