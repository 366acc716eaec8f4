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
        output_radius: of the head's ball; a tied embedding is a head.
        embedding_radius: of an untied embedding's ball.
        tied: whether the embedding is the head too.
        output_norm: sign or row.
        embedding_norm: column or sign.
    """

    momentum: float
    output_radius: float
    embedding_radius: float
    tied: bool
    output_norm: str = "sign"
    embedding_norm: str = "column"


def hidden_settings(radius: float, **shared: Any) -> MuonSettings:
    """Muon's settings under which its step is Scion's for hidden matrices.

    ``W <- (1 - lr wd) W - lr radius sqrt(out/in) O(M)`` with weight decay 1 (constrained) or 0.
    """
    return MuonSettings(nesterov=False, scale_mode="unit_rms_norm", extra_scale_factor=radius, **shared)


class ScionTables(ElementwiseOptimizer):
    """Scion for the embedding and the head, with M the average of gradients::

        W <- (1 - lr wd) W - lr radius C

        head, tied embedding   sign    C = sign(M) / in                         the norm is in max |W|
                               row     C = M_t / ||M_t|| / sqrt(in)             sqrt(in) max ||W_t||
        untied embedding       column  C = M_t / ||M_t|| sqrt(hidden)           max ||W_t|| / sqrt(hidden)
                               sign    C = sign(M)                              max |W|

    with t each token's vector, a row here and a column of the matrix that the paper has for an embedding. wd is 1
    (constrained: W stays in the ball) or 0. Rows are never cut, so nothing is exchanged here either.
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
        own, width = self._settings, param.meta.shape[1]
        norm, entry = own.embedding_norm, own.embedding_radius
        if param.meta.role is Role.READOUT or (own.tied and param.meta.role is Role.EMBEDDING):
            norm, entry = own.output_norm, own.output_radius / width
        if norm == "sign":
            return torch.sign(average) * entry
        length = torch.linalg.vector_norm(average, dim=1, keepdim=True).clamp(min=1e-30)
        return average / length * (entry * math.sqrt(width))
