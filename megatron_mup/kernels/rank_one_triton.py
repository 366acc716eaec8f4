"""The Triton kernel behind :mod:`megatron_mup.kernels.rank_one`; imported only where there is a CUDA device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_mup.kernels.late import run


@triton.jit
def _kernel(
    gram,
    image,
    axis,
    unseen,
    shift,
    schedule,
    q_out,
    h_out,
    s,
    count,
    steps,
    SMALLEST: tl.constexpr,
    SIDE: tl.constexpr,
):
    """One program for a matrix and a shift; what is outside of s x s stays zero, but for Q's diagonal."""
    program = tl.program_id(0)
    matrix = program // count
    row = tl.arange(0, SIDE)
    place = row[:, None] * s + row[None, :]
    inside = (row[:, None] < s) & (row[None, :] < s)
    diagonal = row[:, None] == row[None, :]
    d = tl.load(shift + program)
    u = tl.load(axis + matrix * s + row, mask=row < s, other=0.0)
    z = tl.load(image + matrix * s + row, mask=row < s, other=0.0)
    r = tl.load(gram + matrix * s * s + place, mask=inside, other=0.0)
    half = z + 0.5 * d * u
    r += d * (half[:, None] * u[None, :] + u[:, None] * half[None, :])
    trace = tl.sum(tl.sum(tl.where(diagonal, r, 0.0), 1), 0)
    square = tl.maximum(trace, 0.0) + tl.load(unseen + matrix)
    scale = 1.0 / tl.maximum(tl.sqrt(square), SMALLEST)
    r *= scale * scale
    q = tl.where(diagonal, 1.0, 0.0).to(tl.float64)
    for step in range(steps):
        a = tl.load(schedule + 3 * step)
        b = tl.load(schedule + 3 * step + 1)
        c = tl.load(schedule + 3 * step + 2)
        p = tl.where(diagonal, a, 0.0) + b * r + c * tl.dot(r, r)
        q = tl.dot(p, q)
        r = tl.dot(tl.dot(p, r), p)
    q *= scale
    h = tl.sum(tl.sum(q * (z + d * u)[None, :], 1) * u, 0)
    tl.store(h_out + program, h)
    tl.store(q_out + program * s * s + place, q, mask=inside)


def launch(operands: list[torch.Tensor], q: torch.Tensor, h: torch.Tensor, smallest: float) -> None:
    """Runs the kernel; the operands are those of ``shifted_polynomial``, contiguous, and the schedule in fp64."""
    s = q.shape[-1]
    side = max(16, triton.next_power_of_2(s))
    sizes = (s, h.shape[1], len(operands[-1]))
    warps = 1 if side == 16 else 4
    run(_kernel, h.numel(), *operands, q, h, *sizes, SMALLEST=smallest, SIDE=side, num_warps=warps)
