"""Dion (arXiv 2504.05295): an orthonormal update of low rank, from one warm-started power iteration on the momentum."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch

from megatron_mup.optim.blocks import block_shape
from megatron_mup.optim.exchange import MatrixRanks
from megatron_mup.optim.experts import ExpertPart
from megatron_mup.optim.main_params import MainParam
from megatron_mup.optim.muon import Muon, MuonSettings
from megatron_mup.optim.newton_schulz import full_fp32_products
from megatron_mup.optim.thin import split_gram, split_product
from megatron_mup.optim.whole import Kept, Whole
from megatron_mup.parametrization.counter import derive_key, hash_u64
from megatron_mup.parametrization.init import normal
from megatron_mup.parametrization.meta import ParamMeta
from megatron_mup.parametrization.table import Scaling

OVERSAMPLING = 1.25
"""Rows of the sketch per column of what is sketched, before rounding up to a multiple of 128; microsoft/dion's."""

LEAF = 128
"""Largest matrix that is handed to the library's Cholesky factorization, which has little to do in parallel."""

TRIANGLE = 32
"""Largest triangle that is handed to the library's solver, which has less."""

ROUGH_SLACK = 64.0
"""Shift of a Gram matrix of bf16 halves, see `cholesky_step`: they know 2^-17 of it."""

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


def inverse_lower(factor: torch.Tensor) -> torch.Tensor:
    """Inverse of lower triangular matrices ``[batch, n, n]``: those of both halves at once, then products."""
    batch, n = factor.shape[:2]
    if n <= TRIANGLE or n % 2:
        one = torch.eye(n, device=factor.device, dtype=factor.dtype).expand_as(factor)
        solved: torch.Tensor = torch.linalg.solve_triangular(factor, one, upper=False)
        return solved
    half = n // 2
    ends = torch.stack([factor[:, :half, :half], factor[:, half:, half:]], 1).flatten(0, 1)
    first, second = inverse_lower(ends).view(batch, 2, half, half).unbind(1)
    return _joined(first, second, factor[:, half:, :half])


def _joined(first: torch.Tensor, second: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """Inverse of a lower triangular matrix from those of its ends, and what is below the first."""
    half, rest = first.shape[-1], second.shape[-1]
    inverse = first.new_zeros(len(first), half + rest, half + rest)
    inverse[:, :half, :half], inverse[:, half:, half:] = first, second
    torch.baddbmm(inverse[:, half:, :half], second @ below, first, beta=0, alpha=-1, out=inverse[:, half:, :half])
    return inverse


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
        return inverse_lower(torch.where((failed == 0)[:, None, None], factor, torch.nan))
    half = LEAF * math.ceil(n / LEAF / 2)
    first = inverse_cholesky(matrix[:, :half, :half])
    below = matrix[:, half:, :half] @ first.mT
    second = inverse_cholesky(torch.baddbmm(matrix[:, half:, half:], below, below.mT, alpha=-1))
    return _joined(first, second, below)


def cholesky_step(gram: torch.Tensor, slack: float) -> torch.Tensor:
    """Upper triangular T for which the columns of ``X T`` are closer to orthonormal, from ``X^T X``.

    Columns are brought to length 1, which undoes all that their lengths do to the condition. The Gram matrix is shifted
    by its rounding error, so that it is positive definite whatever the rank; a column that depends on those before
    comes out short. Zero columns stay zero. Should the factorization fail, or columns come out too long, only lengths
    change.

    Args:
        gram: ``[batch, r, r]`` fp32.
        slack: the shift, in fp32 rounding errors of the Gram matrix's norm.

    Returns:
        ``[batch, r, r]``.
    """
    squares = gram.diagonal(dim1=-2, dim2=-1)
    is_zero = squares <= torch.finfo(gram.dtype).tiny
    inverse_norm = torch.where(is_zero, torch.inf, squares).rsqrt()
    gram = gram * inverse_norm[:, :, None] * inverse_norm[:, None, :]
    shift = slack * torch.finfo(gram.dtype).eps * torch.linalg.vector_norm(gram, dim=(-2, -1))
    shifted = gram.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(shift[:, None] + is_zero)
    step = inverse_cholesky(shifted).mT
    lengths = ((gram @ step) * step).sum(-2)
    sound = (lengths.amax(-1) < 4)[:, None, None]
    step = torch.where(sound, step, torch.eye(step.shape[-1], device=gram.device))
    return inverse_norm[:, :, None] * step


def orthonormal_columns(x: torch.Tensor) -> torch.Tensor:
    """Q of the QR decomposition, column signs those of a positive diagonal in R, by randomized Cholesky-QR.

    Random combinations of the rows, hardly more than there are columns, have nearly the condition of all of them
    (arXiv 2104.05868). Two Cholesky steps on this sketch give the triangular factor that all but orthonormalizes x;
    a third, on x, does the rest. Nothing is decided on the host: shifts keep every step safe, also for matrices of low
    rank, where columns that depend on others are made up of rounding errors, as by Householder's method, or stay short.

    Args:
        x: ``[batch, m, r]``, m >= r. In bf16 the sketch is, and products with x are by bf16 halves.

    Returns:
        fp32 ``[batch, m, r]``.
    """
    rows, columns = x.shape[-2:]
    sketched = 128 * math.ceil(OVERSAMPLING * columns / 128)
    largest = x.abs().amax((-2, -1), keepdim=True).float()
    scale = torch.where(largest > 0, largest, 1.0).reciprocal()  # squares must not vanish
    sketch = (x if sketched >= rows else _signs(sketched, rows, x.device, x.dtype) @ x).float() * scale
    first = cholesky_step(sketch.mT @ sketch, 4.0)
    sketch = sketch @ first
    factor = scale * (first @ cholesky_step(sketch.mT @ sketch, 4.0))
    if x.dtype is torch.bfloat16:
        x = split_product(x, factor)
        return split_product(x, cholesky_step(split_gram(x), ROUGH_SLACK))
    x = x @ factor
    return x @ cholesky_step(x.mT @ x, 2.0)


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
    home_momentum: ClassVar[str] = "dion_momentum"

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

    def over_replicas(self, factor: torch.Tensor) -> torch.Tensor:
        """Sum of a factor that is linear in the momentum, where replicas hold parts of it; here it is whole."""
        return factor

    def compute(self, whole: Whole) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``P V^T``; feeds the error back and advances the basis."""
        momentum, basis, dtype = whole.update, whole.kept["dion_basis"], self.settings.ns_dtype
        tall = momentum.shape[-2] >= momentum.shape[-1]
        with full_fp32_products():
            work = momentum if tall else momentum.mT
            left = orthonormal_columns(self.over_replicas(work @ basis.to(dtype))).to(dtype)
            right = work.mT @ left
            whole.feed_back(left @ right.mT if tall else right @ left.mT, self.settings.momentum - 1)
            right = self.over_replicas(right).float()
            length = torch.linalg.vector_norm(right, dim=-2, keepdim=True)
            unit = right / length.maximum(FAINT * length.amax(-1, keepdim=True)).clamp(min=_TINY)
            # A direction that found nothing keeps looking.
            basis.copy_(torch.where(length > 0, unit, basis))
            unit = unit.to(dtype)
            return (left @ unit.mT if tall else unit @ left.mT), None
