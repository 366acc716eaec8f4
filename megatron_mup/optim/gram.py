"""Newton-Schulz in Gram space: most of the work on the short side's n x n matrices, all of them symmetric.

With R = X X^T a step X <- p(R) X, p(r) = a + b r + c r^2, turns R into p(R)^2 R. So a block of steps needs X twice: to
form R and to apply the product Q of its polynomials. What is symmetric costs half (kernels/symmetric.py). A step costs
four symmetric n^3 products instead of a pass over X, and each block one symmetric and one plain n^2 m product.

Rounding limits the length of a block. It leaves small eigenvalues of R slightly negative, and a negative one grows by
a^2 and more each step where a positive one is held at 1. A new block forms R from X anew, which has no negative ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from megatron_mup.kernels.symmetric import Form, symmetric_product

Watch = Callable[[torch.Tensor, torch.Tensor], None]
"""Is shown iterates X ``[batch, short, long]`` on their way and what is proportional to their X X^T; must not change
them."""

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


def block_lengths(name: str, steps: int) -> tuple[int, ...]:
    """How many steps each block has."""
    base = name.partition(":")[0]
    for blocks in (BLOCKS, EIGHT):
        if base in blocks and sum(blocks[base]) == steps:
            return blocks[base]
    return (2,) * (steps // 2) + (1,) * (steps % 2)


@torch.no_grad()
def gram_newton_schulz(
    x: torch.Tensor,
    schedule: tuple[tuple[float, float, float], ...],
    lengths: tuple[int, ...],
    eps: float,
    watch: Watch | None = None,
) -> torch.Tensor:
    """Newton-Schulz steps on bf16 matrices, in blocks.

    Nothing is spent on normalizing: R is scaled by 1 / |X|^2 as it is stored, and the first Q by 1 / |X|.

    Args:
        x: bf16 ``[batch, m, n]``; left as it is.
        schedule: (a, b, c) of each step.
        lengths: steps of each block.
        eps: smallest norm to divide by.
        watch: is shown the iterate before each block; the first of them not normalized.

    Returns:
        bf16 ``[batch, m, n]``, new memory.
    """
    # A square matrix can be read either way, and the kernel is faster on columns.
    tall = x.shape[-2] >= x.shape[-1]
    form: Form = "columns" if tall else "rows"
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), dtype=torch.float32).clamp_(min=eps)
    factor, later = norm.reciprocal(), torch.ones_like(norm)
    steps = iter(schedule)
    for length in lengths:
        r = symmetric_product(x, x, form, alpha=_SCALE_R, scale=factor.square(), dtype=torch.float16)
        if watch is not None:
            watch(x.mT if tall else x, r)
        q = _block_product(r, [next(steps) for _ in range(length)], factor)
        x = torch.bmm(x, q) if tall else torch.bmm(q, x)
        factor = later
    return x


def _block_product(r: torch.Tensor, steps: list[tuple[float, float, float]], factor: torch.Tensor) -> torch.Tensor:
    """``factor`` times the product Q of a block's polynomials, in bf16, from R in fp16 times ``_SCALE_R``."""
    q, q_scale, largest = r, 1.0, 1.0
    for i, (a, b, c) in enumerate(steps):
        first, last = i == 0, i == len(steps) - 1
        final = {"scale": factor, "dtype": torch.bfloat16}
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
