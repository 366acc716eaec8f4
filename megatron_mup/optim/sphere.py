"""Optimizers on the spectral sphere: weights of fixed spectral norm (arXiv 2601.08393)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron_mup.optim.main_params import MainParam
from megatron_mup.optim.matrix import Kept, MatrixOptimizer, MatrixSettings, Whole, block_shape
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.parametrization.table import Scaling

SQUARINGS = 9
"""Squarings of the Gram matrix: 2^9 power iterations on it. A singular value one per cent above another gains a factor
1.02^512 = 25000 on it, so that newcomers are found in time, which a few iterations from the old vector don't do."""

_TINY = 1e-30


@dataclass(frozen=True, kw_only=True)
class SphereSettings(MatrixSettings):
    """Settings of MuonSphere and of the Spectral Sphere Optimizer; the fields follow the ``--sphere-*`` flags."""

    radius: float = 1.0
    retraction: str = "hard"
    solver_steps: int = 10


def sphere_radius(settings: SphereSettings, rows: int, columns: int) -> float:
    """Spectral norm of a logical ``[rows, columns]`` = [out, in] matrix: ``c sqrt(out/in)``."""
    return settings.radius * math.sqrt(rows / columns)


def _unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / torch.linalg.vector_norm(vector, dim=-1, keepdim=True).clamp(min=_TINY)


def _times(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """``[batch, m, n]`` times ``[batch, n]``."""
    return (matrix @ vector[..., None])[..., 0]


def top_singular(
    weight: torch.Tensor, start: torch.Tensor, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Largest singular value and its vectors, without waiting for the device.

    The Gram matrix of the short side is squared `SQUARINGS` times, in ``dtype``; the vector that comes of it is
    refined, and the value taken, in fp32. Where the largest values all but agree, the vectors are a mixture of theirs,
    and the value lies between them.

    Args:
        weight: ``[batch, m, n]``.
        start: ``[batch, n]``, the right vectors of the step before, or zeros.
        dtype: precision of the squarings.

    Returns:
        Value ``[batch]``, left ``[batch, m]`` and right ``[batch, n]`` unit vectors; zeros for a zero matrix.
    """
    weight = weight.float()
    tall = weight.shape[-2] > weight.shape[-1]
    wide = weight.mT if tall else weight
    short = _unit(start if tall else _times(wide, start))
    # A fixed chirp in every start: a direction that is new at the top must not begin at zero.
    index = torch.arange(short.shape[-1], device=weight.device, dtype=torch.float32)
    short = short + 0.1 * _unit(torch.cos(0.618034 * index * (index % 1024) + index))
    gram = (wide @ wide.mT).to(dtype)
    for squaring in range(SQUARINGS + 1):
        norm = torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True, dtype=torch.float32)
        gram = (gram / norm.clamp(min=_TINY)).to(dtype)
        if squaring < SQUARINGS:
            gram = gram @ gram
    short = _unit(_times(gram.float(), short))
    long = _unit(_times(wide.mT, short))
    short = _unit(_times(wide, long))
    long = _times(wide.mT, short)
    sigma = torch.linalg.vector_norm(long, dim=-1)
    long = _unit(long)
    return (sigma, long, short) if tall else (sigma, short, long)


def tangent_direction(
    momentum: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    msign: Callable[[torch.Tensor], torch.Tensor],
    steps: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``msign(M + lambda u v^T)`` with the lambda at which it is tangent: ``h(lambda) = <u v^T, msign(...)> = 0``.

    h is monotone and its root minimises the nuclear norm of ``M + lambda u v^T``. Compare that norm at the root and at
    ``-t``, ``t = u^T M v``: by pinching it is at least ``|lambda + t|`` plus that of M off u and v, and at ``-t`` at
    most that of M off u and v plus ``a + b``, the norms of M v off u and of u^T M off v. So the root lies within
    ``a + b`` of ``-t``: a bracket that needs no search. In it, a fixed number of regula falsi steps (Illinois: an end
    that stays twice counts half), for the whole batch at once, without waiting for the device.

    Args:
        momentum: ``[batch, m, n]`` fp32, of Frobenius norm 1 or 0.
        left, right: unit ``[batch, m]`` and ``[batch, n]``.
        msign: the orthonormal factor.
        steps: evaluations of ``msign``.

    Returns:
        ``[batch, m, n]`` fp32; lambda ``[batch]``; what is left of h there ``[batch]``.
    """
    outer = left[:, :, None] * right[:, None, :]
    forward, back = _times(momentum, right), _times(momentum.mT, left)
    overlap = (left * forward).sum(-1)
    reach = sum(
        torch.linalg.vector_norm(v - overlap[:, None] * axis, dim=-1) for v, axis in ((forward, left), (back, right))
    )
    # msign is not exact: a little room.
    reach = 1.01 * reach + 1e-6
    low, high = -overlap - reach, -overlap + reach
    h_low, h_high = -torch.ones_like(low), torch.ones_like(low)
    side = torch.zeros_like(low)
    at = -overlap
    best, best_at, direction = torch.full_like(at, torch.inf), at, torch.zeros_like(momentum)
    for _ in range(steps):
        found = msign(momentum + at[:, None, None] * outer).float()
        h = (left * _times(found, right)).sum(-1)
        better = h.abs() < best.abs()
        best, best_at = torch.where(better, h, best), torch.where(better, at, best_at)
        direction = torch.where(better[:, None, None], found, direction)
        below = h < 0
        h_high = torch.where(below & (side < 0), h_high / 2, h_high)
        h_low = torch.where(~below & (side > 0), h_low / 2, h_low)
        low, h_low = torch.where(below, at, low), torch.where(below, h, h_low)
        high, h_high = torch.where(below, high, at), torch.where(below, h_high, h)
        side = torch.where(below, -1.0, 1.0)
        slope = (h_high - h_low).clamp(min=_TINY)
        at = (low * h_high - high * h_low) / slope
    return direction, best_at, best


class MuonSphere(MatrixOptimizer[SphereSettings]):
    """Muon on the spectral sphere ``||W||_2 = R = c sqrt(out/in)`` of each logical block.

    With (sigma, u, v) the largest singular value and vectors of W and M the momentum, per step::

        W <- W R / sigma (hard)   or   W (1 + wd lr sign(R - sigma)) (dynamic, in place of weight decay)
        W <- W - lr R Phi,   Phi = msign(U), U as in `Muon`

    The very first step retracts hard in both, which puts the initial weights on the sphere.
    """

    weight_travels: ClassVar[bool] = True
    home_state: ClassVar[Mapping[str, Kept]] = {"right_vector": Kept.INPUTS}
    numbers: ClassVar[int] = 2

    def __init__(self, params: list[tuple[MainParam, Scaling]], settings: SphereSettings, mesh: Mesh | None) -> None:
        super().__init__(params, settings, mesh)
        self._radii = {
            param.meta.name: torch.tensor(
                [sphere_radius(settings, *block_shape(param.meta, block)) for block in self._blocks[param.meta.name]],
                device=param.value.device,
            )
            for param, _ in params
        }

    def compute(self, whole: Whole) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The direction, with sigma and whether the matrix has been retracted before (1 or 0)."""
        vector = whole.kept["right_vector"]
        known = (vector != 0).any(-1)
        sigma, left, right = top_singular(whole.weight, vector, self.settings.ns_dtype)
        vector.copy_(right)
        return self.direction(whole.update, left, right), torch.stack([sigma, known.float()], -1)

    def direction(self, update: torch.Tensor, _left: torch.Tensor, _right: torch.Tensor) -> torch.Tensor:
        """Phi, from the update and W's top singular vectors."""
        return self.orthonormal(update)

    def apply(
        self, param: MainParam, scaling: Scaling, result: torch.Tensor, numbers: torch.Tensor, rate: float
    ) -> None:
        """Retracts, then takes the step."""
        sigma, known = numbers.unbind(-1)
        radius = self._radii[param.meta.name]
        stretch = radius / sigma.clamp(min=_TINY)
        if self.settings.retraction == "dynamic":
            small = 1 + scaling.weight_decay * rate * torch.sign(radius - sigma)
            stretch = torch.where(known > 0, small, stretch)
        delta = result.to(torch.float32) * self.per_row(param, radius * -rate)
        param.value.add_(delta.add_(param.value.to(torch.float32) * self.per_row(param, stretch - 1)))


class SpectralSphere(MuonSphere):
    """Spectral Sphere Optimizer, SSO: `MuonSphere` with a direction tangent to the sphere.

    ``Phi = msign(U / ||U||_F + lambda u v^T)`` with ``<u v^T, Phi> = 0`` is the steepest direction of spectral norm 1
    that leaves sigma as it is (`tangent_direction`). What the solver leaves of the product is projected out.
    """

    def direction(self, update: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Phi, from the update and W's top singular vectors."""
        update = update.float()
        norm = torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True)
        unit = update / norm.clamp(min=_TINY)
        phi, _, rest = tangent_direction(unit, left, right, self.orthonormal, self.settings.solver_steps)
        return phi.sub_(rest[:, None, None] * left[:, :, None] * right[:, None, :])
