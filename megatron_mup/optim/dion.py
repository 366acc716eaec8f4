"""Dion (arXiv 2504.05295): an orthonormal update of low rank, from one warm-started power iteration on the momentum."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch

from megatron_mup.optim.exchange import MatrixRanks
from megatron_mup.optim.experts import ExpertPart
from megatron_mup.optim.main_params import MainParam
from megatron_mup.optim.matrix import Kept, Whole, block_shape
from megatron_mup.optim.muon import Muon, MuonSettings
from megatron_mup.optim.newton_schulz import full_fp32_products
from megatron_mup.parametrization.counter import derive_key, hash_u64
from megatron_mup.parametrization.init import normal
from megatron_mup.parametrization.meta import ParamMeta
from megatron_mup.parametrization.table import Scaling

OVERSAMPLING = 1.25
"""Rows of the sketch per column of what is sketched, before rounding up to a multiple of 128; microsoft/dion's."""

LEAF = 128
"""Largest matrix that is handed to the library's Cholesky factorization, which has little to do in parallel."""

FAINT = 1e-4
"""Directions of the momentum that are fainter than this share of the strongest take less than a full step. What R holds
of a direction that the momentum lacks is rounding error, all of it along the strongest: made unit vectors, many such
columns would add up. Newton-Schulz, too, lifts a singular value by no more than a factor of some hundreds."""

_TINY = 1e-30


@dataclass(frozen=True, kw_only=True)
class DionSettings(MuonSettings):
    """Dion's settings. Of Newton-Schulz only the precision counts: that of products and of what travels."""

    rank_fraction: float
    seed: int = 0


def rank_of(fraction: float, rows: int, columns: int) -> int:
    """Columns of the factors of a logical ``[rows, columns]`` matrix: that share of the short side, rounded up."""
    short = min(rows, columns)
    return min(short, max(1, math.ceil(fraction * short - 1e-9)))


@functools.cache
def _signs(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Random signs ``[rows, columns]``, always the same.

    A sketch must not depend on what it sketches. It doesn't: factors of a QR decomposition are what they are, with
    whichever sketch they are computed.
    """
    index = torch.arange(rows * columns, device=device).view(rows, columns)
    return torch.where(hash_u64(derive_key("dion", "sketch"), index) < 0, -1.0, 1.0).to(dtype)


def inverse_cholesky(matrix: torch.Tensor) -> torch.Tensor:
    """Inverse of the lower Cholesky factor, by halves, so that nearly all work is products.

    Args:
        matrix: ``[batch, n, n]`` fp32.

    Returns:
        ``[batch, n, n]``, with NaNs for a matrix that isn't positive definite.
    """
    n = matrix.shape[-1]
    if n <= LEAF:
        factor, failed = torch.linalg.cholesky_ex(matrix)
        factor = torch.where((failed == 0)[:, None, None], factor, torch.nan)
        one = torch.eye(n, device=matrix.device, dtype=matrix.dtype).expand_as(matrix)
        leaf: torch.Tensor = torch.linalg.solve_triangular(factor, one, upper=False)
        return leaf
    half = LEAF * math.ceil(n / LEAF / 2)
    first = inverse_cholesky(matrix[:, :half, :half])
    below = matrix[:, half:, :half] @ first.mT
    second = inverse_cholesky(torch.baddbmm(matrix[:, half:, half:], below, below.mT, alpha=-1))
    inverse = torch.zeros_like(matrix)
    inverse[:, :half, :half], inverse[:, half:, half:] = first, second
    torch.baddbmm(inverse[:, half:, :half], second @ below, first, beta=0, alpha=-1, out=inverse[:, half:, :half])
    return inverse


def cholesky_pass(x: torch.Tensor, slack: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``X T`` with columns closer to orthonormal, and the upper triangular T.

    Columns are brought to length 1, which undoes all that their lengths do to the condition. The Gram matrix is shifted
    by its rounding error, so that it is positive definite whatever the rank; a column that depends on those before
    comes out short. Zero columns stay zero. Should the factorization fail, or columns come out too long, only lengths
    change.

    Args:
        x: ``[batch, m, r]`` fp32.
        slack: the shift, in rounding errors of the Gram matrix's norm.
    """
    norm = torch.linalg.vector_norm(x, dim=-2)
    inverse_norm = torch.where(norm > _TINY, norm, torch.inf).reciprocal()
    x = x * inverse_norm[:, None, :]
    gram = x.mT @ x
    shift = slack * torch.finfo(x.dtype).eps * torch.linalg.vector_norm(gram, dim=(-2, -1))
    gram.diagonal(dim1=-2, dim2=-1).add_(shift[:, None] + (norm <= _TINY))
    step = inverse_cholesky(gram).mT
    better = x @ step
    sound = (torch.linalg.vector_norm(better, dim=-2).amax(-1) < 2)[:, None, None]
    step = torch.where(sound, step, torch.eye(step.shape[-1], device=x.device))
    return torch.where(sound, better, x), inverse_norm[:, :, None] * step


def orthonormal_columns(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Q of the QR decomposition, column signs those of a positive diagonal in R, by randomized Cholesky-QR.

    Random combinations of the rows, hardly more than there are columns, have nearly the condition of all of them
    (arXiv 2104.05868). Two Cholesky passes on this sketch give the triangular factor that all but orthonormalizes x;
    a third, on x, does the rest. Nothing is decided on the host: shifts keep every pass safe, also for matrices of low
    rank, where columns that depend on others are made up of rounding errors, as by Householder's method, or stay short.

    Args:
        x: ``[batch, m, r]`` fp32, m >= r.
        dtype: precision of the sketch.
    """
    rows, columns = x.shape[-2:]
    sketched = 128 * math.ceil(OVERSAMPLING * columns / 128)
    x = x / torch.linalg.vector_norm(x, dim=-2, keepdim=True).clamp(min=_TINY)
    sketch = x if sketched >= rows else (_signs(sketched, rows, x.device, dtype) @ x.to(dtype)).float()
    sketch, first = cholesky_pass(sketch, 4.0)
    _, second = cholesky_pass(sketch, 4.0)
    # A rough sketch leaves more for the last pass, which then needs more of a shift.
    return cholesky_pass(x @ (first @ second), 2.0 if dtype is torch.float32 else 16.0)[0]


class Dion(Muon[DionSettings]):
    """Dion with decoupled weight decay.

    With gradient G, momentum M [m, n] (m >= n; a wide matrix is seen transposed), basis V [n, r], per step::

        M <- M + G
        P <- columns of M V made orthonormal;  R <- M^T P
        M <- M - (1 - mu) P R^T                                error feedback: what rank r can't hold stays
        V <- columns of R made unit vectors
        W <- W - lr wd W - lr s P V^T

    s as for `Muon`. M and V live whole, in fp32, at the matrix's home, which gets gradients and sends back ``P V^T``.
    V begins as Gaussian numbers that depend on name and seed alone. (microsoft/dion adds 1e-8 to the lengths of R's
    columns; here they count as no shorter than `FAINT` of the longest, whatever the gradient's size.)
    """

    momentum_on_shards: ClassVar[bool] = False
    home_state: ClassVar[Mapping[str, Kept]] = {"dion_momentum": Kept.MATRIX, "dion_basis": Kept.BASIS}

    def __init__(
        self, params: list[tuple[MainParam, Scaling]], settings: DionSettings, mesh: MatrixRanks | None
    ) -> None:
        super().__init__(params, settings, mesh)
        for name, kinds in self._kept.items():
            self._begin(self._params[name][0], kinds["dion_basis"])

    def _begin(self, param: MainParam, basis: torch.Tensor) -> None:
        """Draws the first basis; an expert's does not depend on which others are here."""
        name, before = param.meta.name, 0
        if isinstance(param, ExpertPart):
            name, before = param.whole.meta.name, param.first_expert
        bounds = pairwise(self._basis_starts(param.meta))
        for block, own, (start, stop) in zip(
            self._blocks[param.meta.name], self._ranges[param.meta.name], bounds, strict=True
        ):
            index = torch.arange(stop - start, device=basis.device) + before * ((stop - start) // len(own))
            basis[start:stop] = normal(derive_key(self.settings.seed, "dion", name, block.name), index)

    def basis_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """``[short side, rank]``."""
        return min(rows, columns), rank_of(self.settings.rank_fraction, rows, columns)

    def cost(self, meta: ParamMeta) -> float:
        """Multiply-adds: four products of ``m n r`` each, and the QR decomposition."""
        cost = 0.0
        for block in self._blocks[meta.name]:
            count = block.matrices(meta.shape[0])[0]
            n, m = sorted(block_shape(meta, block))
            r = self.basis_shape(m, n)[1]
            sketched = min(m, 128 * math.ceil(OVERSAMPLING * r / 128))
            cost += count * (4.0 * m * n * r + sketched * r * (m + 4 * r) + 3.0 * m * r * r)
        return cost

    def compute(self, whole: Whole) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``P V^T``; advances momentum and basis."""
        momentum, basis, dtype = whole.kept["dion_momentum"], whole.kept["dion_basis"], self.settings.ns_dtype
        momentum.add_(whole.update)
        tall = momentum.shape[-2] >= momentum.shape[-1]
        with full_fp32_products():
            work = (momentum if tall else momentum.mT).to(dtype)
            left = orthonormal_columns((work @ basis.to(dtype)).float(), dtype).to(dtype)
            right = work.mT @ left
            seen = left @ right.mT
            momentum.sub_(seen if tall else seen.mT, alpha=1 - self.settings.momentum)
            right = right.float()
            length = torch.linalg.vector_norm(right, dim=-2, keepdim=True)
            unit = right / length.maximum(FAINT * length.amax(-1, keepdim=True)).clamp(min=_TINY)
            # A direction that found nothing keeps looking.
            basis.copy_(torch.where(length > 0, unit, basis))
            unit = unit.to(dtype)
            return (left @ unit.mT if tall else unit @ left.mT), None
