"""Muon and NorMuon: the orthonormal factor of the momentum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch

from megatron_mup.optim.blocks import MatrixSettings
from megatron_mup.optim.exchange import MatrixRanks
from megatron_mup.optim.main_params import MainParam
from megatron_mup.optim.matrix import MatrixOptimizer
from megatron_mup.optim.whole import Kept, Whole
from megatron_mup.parametrization.table import Scaling


@dataclass(frozen=True, kw_only=True)
class MuonSettings(MatrixSettings):
    """Muon's settings; the fields follow the ``--muon-*`` flags."""

    scale_mode: str = "unit_rms_norm"
    extra_scale_factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class NorMuonSettings(MuonSettings):
    """NorMuon's settings."""

    beta2: float = 0.95


def update_scale(mode: str, rows: int, columns: int) -> float:
    """Factor on the orthonormal update of a logical ``[rows, columns]`` = [out, in] matrix (``--muon-scale-mode``).

    Sources: unit_rms_norm, spectral and shape_scaling as in Megatron-LM (shape_scaling is Keller Jordan's);
    match_rms_adamw is Moonlight's, arXiv 2502.16982.
    """
    match mode:
        case "unit_rms_norm":
            return math.sqrt(rows / columns)
        case "spectral":
            return math.sqrt(max(rows, columns))
        case "shape_scaling":
            return math.sqrt(max(1.0, rows / columns))
        case "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
    raise ValueError(f"no Muon scale mode {mode!r}")


MuonT = TypeVar("MuonT", bound=MuonSettings)


class Muon(MatrixOptimizer[MuonT]):
    """Muon with decoupled weight decay.

    With gradient G, momentum M, rate lr and decay wd, per step::

        M <- beta M + (1 - beta) G;   U = beta M + (1 - beta) G (Nesterov) or M     (ema)
        M <- beta M + G;              U = beta M + G (Nesterov) or M                (sum)
        W <- W - lr wd W - lr s O(U)

    O orthonormalizes each logical block and s is its shape's factor, both from the global matrix. From M = 0 the two
    forms of momentum give proportional U, and so the same steps.
    """

    def __init__(self, params: list[tuple[MainParam, Scaling]], settings: MuonT, mesh: MatrixRanks | None) -> None:
        super().__init__(params, settings, mesh)
        self._scales = self.for_all(self._scales_of)
        self._decays = self.for_all(lambda p, scaling: self.per_matrix(p.meta, lambda *_: scaling.weight_decay))

    def _scales_of(self, param: MainParam, scaling: Scaling) -> list[float]:
        settings = self.settings
        factor = settings.extra_scale_factor * scaling.stored
        return self.per_matrix(param.meta, lambda *shape: factor * update_scale(settings.scale_mode, *shape))

    def compute(self, whole: Whole) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The orthonormal factor."""
        return self.orthonormal(whole), None

    def factors(self, rates: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Minus the rate times the shape's factor, and times the decay."""
        return -rates * self._scales, -rates * self._decays


class NorMuon(Muon[NorMuonSettings]):
    """Muon whose update has rows of even size (arXiv 2510.05491).

    With V, a number per row, after O of `Muon`::

        V <- beta2 V + (1 - beta2) mean over columns of O^2
        O <- O / (sqrt(V) + 1e-8), times what gives it its Frobenius norm back

    Means and norms are of whole logical blocks. (microsoft/dion takes them of shards.)
    """

    home_state: ClassVar[Mapping[str, Kept]] = {"row_variance": Kept.ROWS}

    def compute(self, whole: Whole) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The orthonormal factor with even rows."""
        ortho = self.orthonormal(whole)
        # One pass over the matrix for all sums of squares, one to multiply.
        squares = torch.linalg.vector_norm(ortho, dim=-1, keepdim=True, dtype=torch.float32).square()
        variance = whole.kept["row_variance"]
        variance.lerp_(squares / ortho.shape[-1], 1 - self.settings.beta2)
        factor = (variance.sqrt() + 1e-8).reciprocal()
        sums = [total.sum(-2, keepdim=True) for total in (squares, squares * factor.square())]
        factor = factor * (sums[0] / sums[1].clamp(min=1e-30)).sqrt()
        return torch.mul(ortho, factor, out=torch.empty_like(ortho)), None
