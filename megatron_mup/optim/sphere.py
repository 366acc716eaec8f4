"""Optimizers on the spectral sphere: weights of fixed spectral norm (arXiv 2601.08393)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from megatron_mup.optim.exchange import MatrixRanks
from megatron_mup.optim.main_params import MainParam
from megatron_mup.optim.matrix import Kept, MatrixOptimizer, MatrixSettings, Whole
from megatron_mup.optim.newton_schulz import full_fp32_products
from megatron_mup.optim.tangent import tangent_direction, times
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
    solver_steps: int = 5


def sphere_radius(settings: SphereSettings, rows: int, columns: int) -> float:
    """Spectral norm of a logical ``[rows, columns]`` = [out, in] matrix: ``c sqrt(out/in)``."""
    return settings.radius * math.sqrt(rows / columns)


def _unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / torch.linalg.vector_norm(vector, dim=-1, keepdim=True).clamp(min=_TINY)


def top_singular(
    weight: torch.Tensor, start: torch.Tensor, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Largest singular value and its vectors, without waiting for the device.

    The Gram matrix of the short side is formed and squared `SQUARINGS` times in ``dtype``; the vector that comes of it
    is refined, and the value taken, in fp32. Where the largest values all but agree, the vectors are a mixture of
    theirs, and the value lies between them.

    Args:
        weight: ``[batch, m, n]``.
        start: ``[batch, n]``, the right vectors of the step before, or zeros.
        dtype: precision of the Gram matrix.

    Returns:
        Value ``[batch]``, left ``[batch, m]`` and right ``[batch, n]`` unit vectors; zeros for a zero matrix.
    """
    weight = weight.float()
    tall = weight.shape[-2] > weight.shape[-1]
    wide = weight.mT if tall else weight
    with full_fp32_products():
        short = _unit(start if tall else times(wide, start))
        # A fixed chirp in every start: a direction that is new at the top must not begin at zero.
        index = torch.arange(short.shape[-1], device=weight.device, dtype=torch.float32)
        short = short + 0.1 * _unit(torch.cos(0.618034 * index * (index % 1024) + index))
        rough = wide.to(dtype)
        gram = rough @ rough.mT
        for squaring in range(SQUARINGS + 1):
            norm = torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True, dtype=torch.float32)
            gram = (gram / norm.clamp(min=_TINY)).to(dtype)
            if squaring < SQUARINGS:
                gram = gram @ gram
        short = _unit(times(gram.float(), short))
        long = _unit(times(wide.mT, short))
        short = _unit(times(wide, long))
        long = times(wide.mT, short)
        sigma = torch.linalg.vector_norm(long, dim=-1)
        long = _unit(long)
    return (sigma, long, short) if tall else (sigma, short, long)


class MuonSphere(MatrixOptimizer[SphereSettings]):
    """Muon on the spectral sphere ``||W||_2 = R = c sqrt(out/in)`` of each logical block.

    With (sigma, u, v) the largest singular value and vectors of W and M the momentum, per step::

        W <- W R / sigma (hard)   or   W (1 + wd lr sign(R - sigma)) (dynamic, in place of weight decay)
        W <- W - lr R Phi,   Phi = msign(U), U as in `Muon`

    The very first retraction is hard in both: that of initial weights, before the first step (`Optimizer.start`), or of
    weights that another optimizer has trained, in the first step here.
    """

    places_weights: ClassVar[bool] = True
    weight_travels: ClassVar[bool] = True
    home_state: ClassVar[Mapping[str, Kept]] = {"right_vector": Kept.INPUTS}
    numbers: ClassVar[int] = 2

    def __init__(
        self, params: list[tuple[MainParam, Scaling]], settings: SphereSettings, mesh: MatrixRanks | None
    ) -> None:
        super().__init__(params, settings, mesh)
        self._radii = {
            param.meta.name: torch.tensor(
                self.per_matrix(param.meta, partial(sphere_radius, settings)), device=param.value.device
            )
            * scaling.stored
            for param, scaling in params
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
    that leaves sigma as it is, to first order (`tangent_direction`).
    """

    def direction(self, update: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Phi, from the update and W's top singular vectors."""
        update = update.float()
        norm = torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True)
        unit = update / norm.clamp(min=_TINY)
        own = self.settings
        return tangent_direction(unit, left, right, own.num_ns_steps, own.coefficients, own.solver_steps, own.ns_dtype)[
            0
        ]
