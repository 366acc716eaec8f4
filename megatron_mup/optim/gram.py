"""Newton-Schulz in Gram space: most of the work on the short side's n x n matrices, all of them symmetric.

With R = X X^T a step X <- p(R) X, p(r) = a + b r + c r^2, turns R into p(R)^2 R. So a block of steps needs X twice: to
form R and to apply the product Q of its polynomials. What is symmetric costs half (kernels/symmetric.py). A step costs
four symmetric n^3 products instead of a pass over X, and each block one symmetric and one plain n^2 m product.

Rounding limits the length of a block. It leaves small eigenvalues of R slightly negative, and a negative one grows by
a^2 and more each step where a positive one is held at 1. A new block forms R from X anew, which has no negative ones.

A step of higher degree, by squarings (`optim.coefficients`), is a block by itself: as many symmetric products as it has
squarings, and what is slightly negative stays so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch

from megatron_mup.kernels.multiply import multiplied
from megatron_mup.kernels.symmetric import Form, symmetric_product
from megatron_mup.optim.coefficients import Coefficients, Step, squarings
from megatron_mup.optim.thin import image, split_factors

Watch = Callable[[torch.Tensor, torch.Tensor], None]
"""Is shown iterates X ``[batch, short, long]`` on their way and what is proportional to their X X^T; must not change
them."""

Image = Callable[[torch.Tensor], torch.Tensor]
"""What a matrix ``[batch, m, n]`` makes of vectors ``[batch, n]``, in fp32."""

Correction = Callable[[Image], tuple[torch.Tensor, torch.Tensor]]
"""Is told what makes the result, before that is formed and rounded, of the last iterate that `Watch` was shown; returns
fp32 factors ``[batch, short, k]`` and ``[batch, k, long]`` of what is to be added to it."""

BLOCKS: dict[str, tuple[int, ...]] = {"jordan": (3, 2), "quintic": (2, 3), "polar_express": (2, 2, 1)}
"""Blocks of a coefficient set's five steps, with X in bf16 and R and Q in fp16; most other numbers go two by two.
The fewest that keep hard matrices (singular values down to 1e-7 of the largest, rank 2 of 128) within 0.1 of exact
arithmetic and their largest singular value where it belongs; tests/optim/test_gram.py holds them to it."""

EIGHT = {"polar_express": (2, 2, 4)}
"""Of eight steps: the last ones find singular values near 1, whatever the matrix."""

# fp16 keeps 11 bits but a small range, so what is stored in it is scaled by a power of two. R = X X^T with |X| <= 1 has
# no entry above 1, and hardly above 1 in later steps; p(R) has none above a < 9.
_SCALE_R = 2.0**13
_SCALE_P = 2.0**10
_LARGEST_Q = 2.0**15
# With squarings S is in [-1, 1], and X, whose entries are far smaller as a rule, is in fp16 too.
_SCALE_S = 2.0**14
_SCALE_X = 2.0**6

_ROOM = 128  # columns; a correction of 42 fp32 factors, where those of `tangent` are 18 or 23


def block_lengths(name: str, steps: int, square: bool = False) -> tuple[int, ...]:
    """How many steps each block has.

    Of square matrices two, and then one each: the same FLOPs, more of them in plain products, which run at a higher
    rate, and nearer to exact arithmetic. (A first block of one step would leave its rounding to four others.)
    """
    base = name.partition(":")[0]
    if base == "squaring":
        return (1,) * steps
    if square and steps > 2:
        return (2, *(1,) * (steps - 2))
    for blocks in (BLOCKS, EIGHT):
        if base in blocks and sum(blocks[base]) == steps:
            return blocks[base]
    return (2,) * (steps // 2) + (1,) * (steps % 2)


@torch.no_grad()
def gram_newton_schulz(
    x: torch.Tensor,
    schedule: Coefficients,
    lengths: tuple[int, ...],
    eps: float,
    watch: Watch | None = None,
    correction: Correction | None = None,
    norm: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Newton-Schulz steps on bf16 matrices, in blocks.

    Nothing is spent on normalizing: R is scaled by 1 / |X|^2 as it is stored, and the first Q by 1 / |X|.

    Args:
        x: bf16 ``[batch, m, n]``; left as it is.
        schedule: coefficients of each step, without squarings.
        lengths: steps of each block.
        eps: smallest norm to divide by.
        watch: is shown the iterate before each block; the first of them not normalized.
        correction: is part of the last product, so that nothing of it is lost in rounding.
        norm: fp32 ``[batch]``, Frobenius norms of x, if they are known.
        out: bf16 ``[batch, m, n]``, where the result may be formed. With several blocks it may be x itself, which is
            read by the first one alone.

    Returns:
        bf16 ``[batch, m, n]``, new memory or ``out``.
    """
    tall = x.shape[-2] > x.shape[-1]
    if x.shape[-2] == x.shape[-1]:
        # Can be read either way; but who takes part has its own idea of it.
        tall = watch is None and correction is None
    # Between blocks matrices stand, whatever they do at the ends: the kernel is faster on columns.
    work = x if tall else x.mT
    if norm is None:
        norm = torch.linalg.vector_norm(x, dim=(-2, -1), dtype=torch.float32)
    factor, n = norm.clamp(min=eps).reciprocal(), work.shape[-1]
    squared = factor.square()
    steps, memory, wider = iter(schedule), None, None
    for number, length in enumerate(lengths):
        last = number == len(lengths) - 1
        form: Form = "rows" if not tall and number == 0 else "columns"
        source = work.mT if form == "rows" else work
        r = symmetric_product(source, source, form, alpha=_SCALE_R, scale=squared, dtype=torch.float16)
        if watch is not None:
            watch(work.mT, r)
        if last and correction is not None:
            wider = work.new_empty(
                len(r), *((len(r[0]) + _ROOM, len(r[0])) if tall else (len(r[0]), len(r[0]) + _ROOM))
            )
        into = None if wider is None else wider[:, : len(r[0]), : len(r[0])]
        q = _block_product(r, [next(steps) for _ in range(length)], factor, into)
        if last:
            break
        room = _ROOM if correction is not None and number == len(lengths) - 2 else 0
        memory = q.new_empty(len(q), work.shape[1], n + room)
        work = torch.bmm(work, q, out=memory[..., :n])
        if number == 0:
            factor = squared = torch.ones_like(norm)
    if correction is not None:
        return _corrected(work, q, correction, tall, memory, wider)
    into = None if memory is None else out
    return torch.bmm(work, q, out=into) if tall else torch.bmm(q, work.mT, out=into)


def _corrected(
    work: torch.Tensor,
    q: torch.Tensor,
    correction: Correction,
    tall: bool,
    memory: torch.Tensor | None,
    wider: torch.Tensor | None,
) -> torch.Tensor:
    """``X Q``, transposed unless tall, and what is added to it, in one product. X and Q may lie in memory with room."""
    left, right = split_factors(*correction(partial(image, q)), q.dtype, 64)
    joined = _beside(work, right.mT, -1, memory)
    if tall:
        return torch.bmm(joined, _beside(q, left.mT, -2, wider))
    return torch.bmm(_beside(q, left, -1, wider), joined.mT)


def _beside(x: torch.Tensor, more: torch.Tensor, dim: int, memory: torch.Tensor | None) -> torch.Tensor:
    """Joined; without copying x where it begins a memory that has room."""
    begin, count = x.shape[dim], more.shape[dim]
    if memory is None or memory.shape[dim] < begin + count:
        return torch.cat([x, more], dim)
    memory.narrow(dim, begin, count).copy_(more)
    return memory.narrow(dim, 0, begin + count)


def _block_product(r: torch.Tensor, steps: list[Step], factor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """``factor`` times the product Q of a block's polynomials, in bf16, from R in fp16 times ``_SCALE_R``."""
    q, q_scale, largest = r, 1.0, 1.0
    for i, (a, b, c) in enumerate(steps):
        first, last = i == 0, i == len(steps) - 1
        final = {"scale": factor, "dtype": torch.bfloat16, "out": out}
        p_scale = 1.0 if first and last else _SCALE_P
        p = symmetric_product(
            r,
            r,
            "symmetric",
            alpha=c * p_scale / _SCALE_R**2,
            beta=b * p_scale / _SCALE_R,
            d=r,
            diagonal=a * p_scale,
            **(final if first and last else {}),
        )
        largest *= a
        q_scale, before = _product_scale(first, last, largest), q_scale
        if first:
            q = p
        else:
            alpha = q_scale / (before * p_scale)
            q = symmetric_product(q, p, "symmetric", alpha=alpha, **(final if last else {}))
        if not last:
            t = symmetric_product(r, p, "symmetric", alpha=1 / p_scale)
            r = symmetric_product(t, p, "symmetric", alpha=1 / p_scale)
    return q


def _product_scale(first: bool, last: bool, largest: float) -> float:
    """Power of two by which Q is stored; its entries reach ``largest``."""
    if last:
        return 1.0
    return _SCALE_P if first else 2.0 ** math.floor(math.log2(_LARGEST_Q / largest))


@torch.no_grad()
def gram_squarings(
    x: torch.Tensor,
    schedule: Coefficients,
    eps: float,
    norm: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Newton-Schulz steps by squarings on bf16 matrices.

    Everything between is in fp16: where singular values are few, a Q that is 46 times the identity next to them cancels
    on their vectors, and bf16's rounding would leave eight times as much there.

    Args:
        x: bf16 ``[batch, m, n]``; left as it is.
        schedule: coefficients of each step.
        eps: smallest norm to divide by.
        norm: fp32 ``[batch]``, Frobenius norms of x, if they are known.
        out: bf16 ``[batch, m, n]``, where the result goes, if not to new memory; it may be x itself.

    Returns:
        bf16 ``[batch, m, n]``, new memory or ``out``.
    """
    tall = x.shape[-2] >= x.shape[-1]
    if norm is None:
        norm = torch.linalg.vector_norm(x, dim=(-2, -1), dtype=torch.float32)
    work = multiplied(x, _SCALE_X / norm.clamp(min=eps), torch.float16)
    for number, step in enumerate(schedule):
        if tall or number:
            r = symmetric_product(work, work, "columns", alpha=_SCALE_R / _SCALE_X**2)
        else:
            r = symmetric_product(work, work, "rows", alpha=_SCALE_R / _SCALE_X**2)
            work = work.mT
        q = _squared(r, step)
        last = number == len(schedule) - 1
        work = torch.bmm(q, work.mT) if last and not tall else torch.bmm(work, q)
    return multiplied(work, torch.full_like(norm, 1 / _SCALE_X), torch.bfloat16, out)


def _squared(r: torch.Tensor, step: Step) -> torch.Tensor:
    """A step's S in fp16, from R in fp16 times ``_SCALE_R``."""
    s, s_scale, count = r, _SCALE_R, len(step) // 3
    for number, (a, b, c) in enumerate(squarings(step), 1):
        scale = _SCALE_S if number < count else 1.0
        s = symmetric_product(
            s, s, "symmetric", alpha=c * scale / s_scale**2, beta=b * scale / _SCALE_R, d=r, diagonal=a * scale
        )
        s_scale = scale
    return s
