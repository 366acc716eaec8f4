"""Scion (arXiv 2502.07529): steepest descent in a norm that depends on the layer.

Its hidden matrices take Muon's step: `hidden_settings` says with which numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from megatron_mup.optim.main_params import MainParam
from megatron_mup.optim.muon import MuonSettings
from megatron_mup.optim.scalar import ElementwiseOptimizer, Group
from megatron_mup.parametrization.meta import Role
from megatron_mup.parametrization.table import Scaling


@dataclass(frozen=True, kw_only=True)
class ScionTableSettings:
    """Settings of the embedding and the head.

    Attributes:
        momentum: decay of the average.
        output_radius: of the head's ball, in the norm ``in * max |W|``; a tied embedding is a head.
        embedding_radius: of an untied embedding's ball: the largest root mean square of a token's vector.
        tied: whether the embedding is the head too.
    """

    momentum: float
    output_radius: float
    embedding_radius: float
    tied: bool


def hidden_settings(radius: float, **shared: Any) -> MuonSettings:
    """Muon's settings under which its step is Scion's for hidden matrices.

    ``W <- (1 - lr wd) W - lr radius sqrt(out/in) O(M)`` with weight decay 1 (constrained) or 0.
    """
    return MuonSettings(nesterov=False, scale_mode="unit_rms_norm", extra_scale_factor=radius, **shared)


class ScionTables(ElementwiseOptimizer):
    """Scion for the embedding and the head, with M the average of gradients::

        head, tied embedding   W <- (1 - lr wd) W - lr radius sign(M) / in
        untied embedding       W <- (1 - lr wd) W - lr radius sqrt(hidden) M_t / ||M_t||,   each token's vector t

    wd is 1 (constrained: W stays in the ball) or 0. A token's vector is a row, and rows are never cut, so nothing is
    exchanged here either.
    """

    kinds = ("momentum",)

    def __init__(self, params: list[tuple[MainParam, Scaling]], settings: ScionTableSettings) -> None:
        super().__init__(params)
        self._settings = settings

    def updates(self, group: Group) -> list[torch.Tensor]:
        """The point of the ball that goes furthest along the average."""
        averages = group.state["momentum"]
        torch._foreach_lerp_(averages, group.grads, 1 - self._settings.momentum)
        return [self._corner(param, average) for param, average in zip(group.params, averages, strict=True)]

    def _corner(self, param: MainParam, average: torch.Tensor) -> torch.Tensor:
        width = param.meta.shape[1]
        tied = self._settings.tied and param.meta.role is Role.EMBEDDING
        if param.meta.role is Role.READOUT or tied:
            return torch.sign(average) * (self._settings.output_radius / width)
        norm = torch.linalg.vector_norm(average, dim=1, keepdim=True).clamp(min=1e-30)
        return average / norm * (self._settings.embedding_radius * math.sqrt(width))
