"""Optimizers on the spectral sphere: weights of fixed spectral norm (arXiv 2601.08393)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron_mup.kernels.symmetric import Form, symmetric_product
from megatron_mup.optim.blocks import MatrixSettings
from megatron_mup.optim.exchange import MatrixRanks
from megatron_mup.optim.main_params import MainParam
from megatron_mup.optim.matrix import MatrixOptimizer
from megatron_mup.optim.muon import update_scale
from megatron_mup.optim.newton_schulz import full_fp32_products
from megatron_mup.optim.tangent import tangent_direction
from megatron_mup.optim.thin import image, unit
from megatron_mup.optim.whole import Kept, Whole
from megatron_mup.parametrization.table import Scaling

SQUARINGS = 7
"""Squarings of the Gram matrix."""
APPLICATIONS = 4
"""How often what comes of them is applied to a vector, which is a fourth of a squaring's work on a GPU: 4 * 2^7 = 512
power iterations on the Gram matrix. A singular value one per cent above another gains a factor 1.02^512 = 25000 on it,
so that newcomers are found in time, which a few iterations from the old vector don't do."""

_TINY = 1e-18
_SCALE = 2.0**15
"""Of Gram matrices as they are stored: fp16 has a small range, and they have norm 1 at most."""


@dataclass(frozen=True, kw_only=True)
class SphereSettings(MatrixSettings):
    """Settings of MuonSphere and of the Spectral Sphere Optimizer; the fields follow the ``--sphere-*`` flags."""

    radius: float = 1.0
    retraction: str = "hard"
    solver_steps: int = 3
    scale_mode: str = "unit_rms_norm"
    extra_scale_factor: float = 1.0


def sphere_radius(settings: SphereSettings, rows: int, columns: int) -> float:
    """Spectral norm of a logical ``[rows, columns]`` = [out, in] matrix: ``c sqrt(out/in)``."""
    return settings.radius * math.sqrt(rows / columns)


def _inverse_square(norm: torch.Tensor) -> torch.Tensor:
    return norm.clamp(min=_TINY).pow(-2)


def top_singular(
    weight: torch.Tensor,
    start: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    norm: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Largest singular value and its vectors, without waiting for the device.

    The Gram matrix of the short side is formed and squared `SQUARINGS` times, in fp16 if ``dtype`` is bf16. What comes
    of it is applied to a vector, which in fp32 is refined once more. The other vector and the value come of W itself,
    in fp32. Where the largest values all but agree, the vectors are a mixture of theirs, and the value lies between
    them.

    Args:
        weight: ``[batch, m, n]``.
        start: ``[batch, n]``, the right vectors of the step before, or zeros.
        dtype: precision of the Gram matrix.
        norm: fp32 ``[batch]``, Frobenius norms of the weights, if they are known.

    Returns:
        Value ``[batch]``, left ``[batch, m]`` and right ``[batch, n]`` unit vectors; zeros for a zero matrix.
    """
    tall = weight.shape[-2] > weight.shape[-1]
    wide = weight.mT if tall else weight
    stored = torch.float32 if dtype is torch.float32 else torch.float16
    with full_fp32_products():
        short = unit(start if tall else image(wide, start))
        # A fixed chirp in every start: a direction that is new at the top must not begin at zero.
        index = torch.arange(short.shape[-1], device=weight.device, dtype=torch.float32)
        short = short + 0.1 * unit(torch.cos(0.618034 * index * (index % 1024) + index))
        rough = weight.to(dtype)
        if norm is None:
            norm = torch.linalg.vector_norm(rough, dim=(-2, -1), dtype=torch.float32)
        form: Form = "columns" if tall else "rows"
        gram = symmetric_product(rough, rough, form, alpha=_SCALE, scale=_inverse_square(norm), dtype=stored)
        for _ in range(SQUARINGS):
            # Not less than the spectral norm, and read off the diagonal.
            trace = gram.diagonal(dim1=-2, dim2=-1).float().sum(-1)
            gram = symmetric_product(gram, gram, "symmetric", alpha=_SCALE, scale=_inverse_square(trace))
        for _ in range(APPLICATIONS):
            short = unit(image(gram, short))
        if stored is torch.float32:
            short = unit(image(wide, image(wide.mT, short)))
        long = image(wide.mT, short)
        sigma = torch.linalg.vector_norm(long, dim=-1)
        long = unit(long)
    return (sigma, long, short) if tall else (sigma, short, long)


class MuonSphere(MatrixOptimizer[SphereSettings]):
    """Muon on the spectral sphere ``||W||_2 = R = c sqrt(out/in)`` of each logical block.

    With (sigma, u, v) the largest singular value and vectors of W and M the momentum, per step::

        W <- W R / sigma (hard)   or   W (1 + wd lr sign(R - sigma)) (dynamic, in place of weight decay)
        W <- W - lr c s Phi,   Phi = msign(U), U as in `Muon`

    s is Muon's factor of the shape; c s is R by default, and in the paper.

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
        self._radii = self.for_all(self._radii_of)
        self._steps = self.for_all(self._steps_of)
        self._decays = self.for_all(lambda p, scaling: self.per_matrix(p.meta, lambda *_: scaling.weight_decay))

    def _radii_of(self, param: MainParam, scaling: Scaling) -> list[float]:
        return self.per_matrix(param.meta, lambda *shape: scaling.stored * sphere_radius(self.settings, *shape))

    def _steps_of(self, param: MainParam, scaling: Scaling) -> list[float]:
        factor = self.settings.radius * self.settings.extra_scale_factor * scaling.stored
        return self.per_matrix(param.meta, lambda *shape: factor * update_scale(self.settings.scale_mode, *shape))

    def compute(self, whole: Whole) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The direction, with sigma and whether the matrix has been retracted before (1 or 0)."""
        assert whole.weight is not None
        vector = whole.kept["right_vector"]
        known = (vector != 0).any(-1)
        sigma, left, right = top_singular(whole.weight, vector, self.settings.ns_dtype, whole.norms[1])
        vector.copy_(right)
        return self.direction(whole, left, right), torch.stack([sigma, known.float()], -1)

    def direction(self, whole: Whole, _left: torch.Tensor, _right: torch.Tensor) -> torch.Tensor:
        """Phi, from the update and W's top singular vectors."""
        return self.orthonormal(whole)

    def factors(self, rates: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Minus the rate times the step's spectral norm; what retraction adds."""
        sigma, known = numbers.unbind(-1)
        stretch = self._radii / sigma.clamp(min=_TINY)
        if self.settings.retraction == "dynamic":
            small = 1 + self._decays * rates * torch.sign(self._radii - sigma)
            stretch = torch.where(known > 0, small, stretch)
        return -rates * self._steps, stretch - 1


class SpectralSphere(MuonSphere):
    """Spectral Sphere Optimizer, SSO: `MuonSphere` with a direction tangent to the sphere.

    ``Phi = msign(U / ||U||_F + lambda u v^T)`` with ``<u v^T, Phi> = 0`` is the steepest direction of spectral norm 1
    that leaves sigma as it is, to first order (`tangent_direction`).
    """

    def direction(self, whole: Whole, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Phi, from the update and W's top singular vectors."""
        own = self.settings
        search = (own.num_ns_steps, own.coefficients, own.solver_steps, own.ns_dtype)
        return tangent_direction(whole.update, left, right, *search, whole.norms[0])[0]
