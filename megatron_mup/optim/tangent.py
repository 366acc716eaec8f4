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

from megatron_mup.optim.coefficients import Coefficients, coefficient_schedule, polynomial
from megatron_mup.optim.gram import Image
from megatron_mup.optim.newton_schulz import full_fp32_products, orthonormalize
from megatron_mup.optim.thin import add_product_, image, padded, thin_product

POWERS = 2
"""Powers of ``X_k X_k^T`` that enter the basis, for each iterate."""
INTERVALS = 32
"""Intervals that a round of the search divides its bracket into. What a round costs on a GPU is its number of kernels,
however many problems they solve at once."""

_TINY = 1e-30
_SMALLEST_NORM = 1e-7
"""As in `orthonormalize`."""


def times(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """``[..., m, n]`` times ``[..., n]``."""
    return (matrix @ vector[..., None])[..., 0]


def _outer(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left[..., :, None] * right[..., None, :]


class _Directions:
    """Collects ``u, X_k v, X_k X_k^T u, X_k X_k^T X_k v, ...`` while Newton-Schulz runs."""

    def __init__(self, left: torch.Tensor, right: torch.Tensor) -> None:
        self._left, self._right = left[..., None], right[..., None]
        self._columns = [self._left]

    def __call__(self, iterate: torch.Tensor, gram: torch.Tensor) -> None:
        """Takes what an iterate ``[batch, m, n]`` makes of u and v; in half precision where it is, for directions may
        be rough."""
        image = (iterate @ padded([self._right.to(iterate.dtype)], -1))[..., :1].float()
        self._columns.append(_unit_columns(image))
        block = torch.cat([self._left, self._columns[-1]], -1)
        for _ in range(POWERS):
            block = _unit_columns((gram @ padded([block.to(gram.dtype)], -1))[..., :2].float())
            self._columns.append(block)

    def basis(self) -> torch.Tensor:
        """Orthonormal basis ``[batch, m, s]`` of the columns in fp64, by Cholesky twice.

        The ridge lets columns that depend on others come out as (nearly) zero the first time, and lifts what rounding
        leaves of them to noise of length at most 1 the second time: one direction more, which does no harm.
        """
        columns = torch.cat([part.double() for part in self._columns], -1)
        batch, rows, count = columns.shape
        if count >= rows:
            return torch.eye(rows, dtype=columns.dtype, device=columns.device).repeat(batch, 1, 1)
        columns = _unit_columns(columns)
        ridge = 1e-10 * torch.eye(count, dtype=columns.dtype, device=columns.device)
        for _ in range(2):
            # _ex: without its check, which waits for the device. With the ridge nothing fails but NaNs.
            factor = torch.linalg.cholesky_ex(columns.mT @ columns + ridge).L
            columns = torch.linalg.solve_triangular(factor, columns.mT, upper=False).mT
        return columns


def _unit_columns(x: torch.Tensor) -> torch.Tensor:
    return x / torch.linalg.vector_norm(x, dim=-2, keepdim=True).clamp(min=_TINY)


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
        axis = self.axis[:, None]
        image = self.image[:, None] + shift[..., None] * axis
        half = _outer(self.image[:, None] + 0.5 * shift[..., None] * axis, axis) * shift[..., None, None]
        gram = self.gram[:, None] + half + half.mT
        square = gram.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=0) + self.unseen[:, None]
        scale = square.sqrt().clamp(min=_SMALLEST_NORM).reciprocal()[..., None, None]
        r = (gram * scale.square()).flatten(0, 1)
        q: torch.Tensor | None = None
        for number, step in enumerate(self.schedule):
            p, a = polynomial(r, step)
            p.diagonal(dim1=-2, dim2=-1).add_(a)
            q = p if q is None else p @ q
            if number + 1 < len(self.schedule):
                r = p @ r @ p
        assert q is not None
        q = q.view(gram.shape) * scale
        return q, (times(q, image) * axis).sum(-1)

    def search(
        self, offset: torch.Tensor, reach: torch.Tensor, rounds: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Root d in [-reach, reach] of ``h(d) + offset``.

        Each round evaluates the ends of `INTERVALS` even intervals and keeps the one where the sign changes. Between
        the last two ends msign is taken as linear: at a jump of h (M of low rank) the steepest tangent direction *is* a
        mean of the two sides, and no mean has a larger norm than they.

        Returns:
            Q and d u at the root, such that msign is ``Q Z + Q (d u) v^T``: ``[batch, s, s]`` and, with Q applied,
            ``[batch, s]``; d, ``[batch]``.
        """
        low, high = -reach, reach
        steps = torch.linspace(0, 1, INTERVALS + 1, dtype=reach.dtype, device=reach.device)
        for _ in range(rounds):
            shift = low[:, None] + (high - low)[:, None] * steps
            q, h = self.polynomial(shift)
            h = h + offset[:, None]
            # h grows with d, up to rounding.
            interval = ((h < 0).sum(-1) - 1).clamp(0, INTERVALS - 1)
            low, high = _pick(shift, interval), _pick(shift, interval + 1)
        at_low, at_high = _pick(h, interval), _pick(h, interval + 1)
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

    def correction(of_phi: Image) -> tuple[torch.Tensor, torch.Tensor]:
        """From the result for lambda0 to that for lambda; what the search leaves of h goes with it."""
        basis = directions.basis()
        rows = thin_product(turned(start).mT, basis.float()).mT / norm[:, None, None]
        exact = rows.double()
        gram = exact @ exact.mT
        seen = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        problem = _Compressed(
            gram=gram,
            image=times(exact, v.double()),
            axis=times(basis.mT, u.double()),
            unseen=((start_norm / norm).double().square() - seen).clamp(min=0),
            schedule=coefficient_schedule(coefficients, steps),
        )
        before, h = problem.polynomial(torch.zeros_like(reach)[:, None])
        at_start = (u * of_phi(v)).sum(-1).double()
        after, moved, shift = problem.search(at_start - h[:, 0], reach, rounds)
        change = after - before[:, 0]
        rest = at_start + ((times(change, problem.image) + moved) * problem.axis).sum(-1)
        along = times(basis, moved) - rest[:, None] * u
        found.extend([shift.float() - overlap, rest.float()])
        return torch.cat([basis @ change, along[..., None]], -1).float(), torch.cat([rows, v[:, None]], -2)

    with full_fp32_products():
        if norm is None:
            norm = torch.linalg.vector_norm(momentum, dim=(-2, -1), dtype=torch.float32)
        norm = norm.clamp(min=_TINY)
        forward = image(turned(momentum), v) / norm[:, None]
        back = image(turned(momentum).mT, u) / norm[:, None]
        overlap = (u * forward).sum(-1)
        reach = sum(
            torch.linalg.vector_norm(w - overlap[:, None] * axis, dim=-1) for w, axis in ((forward, u), (back, v))
        )
        # msign is not exact: a little room.
        reach = (1.01 * reach + 1e-6).double()
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
        directions = _Directions(u, v)
        phi = orthonormalize(
            start, steps, coefficients, dtype, watch=directions, correction=correction, norm=start_norm
        )
    shift, rest = found
    return phi, shift, rest
