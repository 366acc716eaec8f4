"""The steepest direction along the spectral sphere, for the price of one orthonormalization (arXiv 2601.08393).

Wanted is ``Phi = msign(M + lambda u v^T)`` with ``h(lambda) = u^T Phi v = 0``. Here Newton-Schulz runs once, at
``lambda0 = -u^T M v``. What another lambda changes is a perturbation of rank one, and its effect on Phi is all but
confined to a few dozen rows: those that powers of the iterates ``X_k X_k^T`` make of u and of ``X_k v``. Each iterate
resolves singular values of another size, so together they know all of them. The problem is compressed to these rows
and solved there in Gram space, by the same polynomials and for many lambdas at once; the difference to lambda0 is added
to Phi, in the product that forms it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_mup.kernels.rank_one import shifted_polynomial
from megatron_mup.optim.coefficients import Coefficients, coefficient_schedule
from megatron_mup.optim.gram import Image
from megatron_mup.optim.newton_schulz import full_fp32_products, orthonormalize
from megatron_mup.optim.thin import add_product_, image, thin_product, unit

POWERS = 2
"""Powers of ``X_k X_k^T`` that enter the basis, for each iterate."""
INTERVALS = 32
"""Intervals that a round of the search divides its bracket into. What a round costs on a GPU is its number of kernels,
however many problems they solve at once."""

_TINY = 1e-30
_PARTS = 8
_SMALLEST_NORM = 1e-7
"""As in `orthonormalize`."""


def times(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """``[..., m, n]`` times ``[..., n]``."""
    return (matrix @ vector[..., None])[..., 0]


class _Directions:
    """Collects ``u, X_k v, X_k X_k^T u, X_k X_k^T X_k v, ...`` while Newton-Schulz runs.

    Args:
        left, right: u and v.
        image: ``X_0 v``, but for a factor, if it is known and there are more iterates.
    """

    def __init__(self, left: torch.Tensor, right: torch.Tensor, image: torch.Tensor | None) -> None:
        self._left, self._right, self._known = left[:, None], right, image
        self._rows = [self._left]

    def __call__(self, iterate: torch.Tensor, gram: torch.Tensor) -> None:
        """Takes what an iterate ``[batch, m, n]`` makes of v, and its Gram matrix of both."""
        known, self._known = self._known, None
        self.image = image(iterate, self._right) if known is None else known
        block = torch.cat([self._left, unit(self.image)[:, None]], 1)
        self._rows.append(block[:, 1:])
        for _ in range(POWERS):
            # Norms of what lies in one piece take a fourth of the time.
            block = unit(thin_product(gram, block.mT).mT.contiguous())
            self._rows.append(block)

    def basis(self) -> torch.Tensor:
        """Orthonormal rows ``[batch, s, m]`` that span the directions, in fp64, by Cholesky twice.

        The ridge lets rows that depend on others come out as (nearly) zero the first time, and lifts what rounding
        leaves of them to noise of length at most 1 the second time: one direction more, which does no harm.
        """
        rows = unit(torch.cat(self._rows, 1).double())
        batch, count, size = rows.shape
        if count >= size:
            return torch.eye(size, dtype=rows.dtype, device=rows.device).repeat(batch, 1, 1)
        ridge = 1e-10 * torch.eye(count, dtype=rows.dtype, device=rows.device)
        for _ in range(2):
            # _ex: without its check, which waits for the device. With the ridge nothing fails but NaNs.
            factor = torch.linalg.cholesky_ex(rows @ rows.mT + ridge).L
            rows = torch.linalg.solve_triangular(factor, rows, upper=False)
        return rows


def _inner_products(columns: torch.Tensor) -> torch.Tensor:
    """``x^T x`` for ``[batch, m, s]``; in parts, where they come out even, for a single one would keep a GPU idle."""
    parts = _PARTS if columns.shape[1] % _PARTS == 0 else 1
    cut = columns.unflatten(1, (parts, -1)).flatten(0, 1)
    return (cut.mT @ cut).unflatten(0, (-1, parts)).sum(1)


@dataclass(frozen=True)
class _Compressed:
    """The problem in Gram space, on the rows ``Z = L^T Z0``; all in fp64.

    Attributes:
        gram: ``[batch, s, s]``, Z Z^T.
        image: ``[batch, s]``, Z v.
        axis: ``[batch, s]``, L^T u.
        unseen: ``[batch]``, squared Frobenius norm of what the basis leaves out.
        schedule: Newton-Schulz's coefficients.
    """

    gram: torch.Tensor
    image: torch.Tensor
    axis: torch.Tensor
    unseen: torch.Tensor
    schedule: Coefficients

    def polynomial(self, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Q with ``msign(Z + d u v^T) = Q (Z + d u v^T)``, and ``h = u^T msign(...) v``.

        Args:
            shift: d, ``[batch, count]``.

        Returns:
            ``[batch, count, s, s]`` and ``[batch, count]``.
        """
        return shifted_polynomial(self.gram, self.image, self.axis, self.unseen, shift, self.schedule, _SMALLEST_NORM)

    def reach(self) -> torch.Tensor:
        """Half of a bracket, ``[batch]``: the norms of Z v and of ``u^T Z``, for u and Z v are in the basis."""
        back = (times(self.gram, self.axis) * self.axis).sum(-1).clamp(min=0).sqrt()
        # msign is not exact: a little room.
        return 1.01 * (torch.linalg.vector_norm(self.image, dim=-1) + back) + 1e-6

    def search(self, offset: torch.Tensor, rounds: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Root d in the bracket of ``h(d) + offset``.

        Each round evaluates the ends of `INTERVALS` even intervals and keeps the one where the sign changes. Between
        the last two ends msign is taken as linear: at a jump of h (M of low rank) the steepest tangent direction *is* a
        mean of the two sides, and no mean has a larger norm than they.

        Returns:
            Q and d u at the root, such that msign is ``Q Z + Q (d u) v^T``: ``[batch, s, s]`` and, with Q applied,
            ``[batch, s]``; d, ``[batch]``.
        """
        high = self.reach()
        low = -high
        steps = torch.linspace(0, 1, INTERVALS + 1, dtype=high.dtype, device=high.device)
        both = torch.arange(2, device=high.device)
        for _ in range(rounds):
            shift = torch.lerp(low[:, None], high[:, None], steps)
            q, h = self.polynomial(shift)
            # h grows with d, up to rounding.
            interval = ((h < -offset[:, None]).sum(-1) - 1).clamp(0, INTERVALS - 1)
            ends = interval[:, None] + both
            low, high = shift.gather(1, ends).unbind(1)
        at_low, at_high = (h.gather(1, ends) + offset[:, None]).unbind(1)
        share = (-at_low / (at_high - at_low).clamp(min=_TINY)).clamp(0, 1)
        below = (1 - share)[:, None, None] * _pick(q, interval)
        above = share[:, None, None] * _pick(q, interval + 1)
        moved = low[:, None] * times(below, self.axis) + high[:, None] * times(above, self.axis)
        return below + above, moved, low + share * (high - low)


def _pick(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``values[i, index[i]]`` for each i."""
    where = index.view(-1, *[1] * (values.dim() - 1)).expand(-1, 1, *values.shape[2:])
    return values.gather(1, where)[:, 0]


@torch.no_grad()
def tangent_direction(
    momentum: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    steps: int,
    coefficients: str,
    rounds: int,
    dtype: torch.dtype = torch.float32,
    norm: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``msign(M + lambda u v^T)`` with the lambda at which it is tangent: ``h(lambda) = <u v^T, msign(...)> = 0``.

    h is monotone and its root minimises the nuclear norm of ``M + lambda u v^T``. Compare that norm at the root and at
    ``-t``, ``t = u^T M v``: by pinching it is at least ``|lambda + t|`` plus that of M off u and v, and at ``-t`` at
    most that of M off u and v plus ``a + b``, the norms of M v off u and of u^T M off v. So the root lies within
    ``a + b`` of ``-t``: a bracket that needs no search.

    Nothing waits for the device. What the search leaves of h is projected out.

    Args:
        momentum: ``[batch, m, n]``; M is this divided by its Frobenius norm. On a GPU, if in half precision,
            overwritten.
        left, right: unit ``[batch, m]`` and ``[batch, n]``, fp32.
        steps, coefficients: Newton-Schulz's.
        rounds: of the search; each narrows it by `INTERVALS`.
        dtype: precision of Newton-Schulz on whole matrices. The search is in fp64, what leads there and back in fp32.
        norm: fp32 ``[batch]``, Frobenius norms of the momentum, if they are known.

    Returns:
        ``[batch, m, n]`` in ``dtype``; lambda ``[batch]``; what was projected out ``[batch]``.
    """
    tall = momentum.shape[-2] > momentum.shape[-1]
    u, v = (right, left) if tall else (left, right)  # of the matrix as it is seen with its short side first

    def turned(x: torch.Tensor) -> torch.Tensor:
        return x.mT if tall else x

    found: list[torch.Tensor] = []

    def correction(last_step: Image) -> tuple[torch.Tensor, torch.Tensor]:
        """From the result for lambda0 to that for lambda; what the search leaves of h goes with it."""
        basis = directions.basis()
        columns = thin_product(turned(start).mT, basis.float().mT) / norm[:, None, None]
        exact = columns.double()
        gram = _inner_products(exact)
        seen = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        problem = _Compressed(
            gram=gram,
            image=times(exact.mT, v.double()),
            axis=times(basis, u.double()),
            unseen=((start_norm / norm).double().square() - seen).clamp(min=0),
            schedule=coefficient_schedule(coefficients, steps),
        )
        before, h = problem.polynomial(torch.zeros_like(problem.unseen)[:, None])
        at_start = (u * last_step(directions.image)).sum(-1).double()
        after, moved, shift = problem.search(at_start - h[:, 0], rounds)
        change = after - before[:, 0]
        rest = at_start + ((times(change, problem.image) + moved) * problem.axis).sum(-1)
        along = times(basis.mT, moved) - rest[:, None] * u
        found.extend([shift.float() - overlap, rest.float()])
        left = torch.cat([basis.mT @ change, along[..., None]], -1).float()
        return left, torch.cat([columns, v[..., None]], -1).mT

    with full_fp32_products():
        if norm is None:
            norm = torch.linalg.vector_norm(momentum, dim=(-2, -1), dtype=torch.float32)
        norm = norm.clamp(min=_TINY)
        forward = image(turned(momentum), v) / norm[:, None]
        overlap = (u * forward).sum(-1)
        off = (-overlap * norm)[:, None, None]
        if tall:
            start = add_product_(momentum, v[..., None] * off, u[:, None]).to(dtype)
        else:
            start = add_product_(momentum, u[..., None] * off, v[:, None]).to(dtype)
        if dtype is torch.float32:
            start_norm = torch.linalg.vector_norm(start, dim=(-2, -1))
        else:
            # Without a pass over the matrix. Never less than there is: rounding leaves some of u v^T.
            start_norm = norm * (1 - overlap.square()).clamp(min=2.0**-16).sqrt()
        directions = _Directions(u, v, forward - overlap[:, None] * u if steps > 2 else None)
        phi = orthonormalize(
            start, steps, coefficients, dtype, watch=directions, correction=correction, norm=start_norm
        )
    shift, rest = found
    return phi, shift, rest
